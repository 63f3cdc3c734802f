"""files.py: the one way to touch the disk."""

import ast
import errno
import json
import os
from pathlib import Path

import pytest

from minirlhf.files import Lines, atomic, read_json, read_records, write_records, write_text
from minirlhf.runtime import UserError

PACKAGE = Path(__file__).parent.parent / "minirlhf"
WRITERS = {
    "write_text",
    "write_bytes",
    "save_file",
    "savefig",
    "mkstemp",
    "NamedTemporaryFile",
    "truncate",
    "ftruncate",
}
# What may open a file for writing besides files.py, and why.
EXEMPT = {
    "distributed.py": {"open"},  # os.devnull, for what processes other than the main one print
    "config.py": {"open"},  # os.devnull, in the place of a pipe that nobody reads any more
}


def opens_for_writing(call: ast.Call) -> bool:
    """open(...), path.open(...) or os.open(...) with a mode that writes, or with one that is not written out."""
    modes = [arg for arg in [*call.args, *(word.value for word in call.keywords)] if isinstance(arg, ast.Constant)]
    texts = [mode.value for mode in modes if isinstance(mode.value, str)]
    names = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
    writes = any(set(text) <= set("rwxabt+") and set(text) & set("wxa+") for text in texts)
    return writes or bool(names & {"O_RDWR", "O_WRONLY", "O_CREAT", "O_APPEND"})


def writers(source: str) -> set[str]:
    """Names of the calls in a module that write a file, by the syntax tree; what stands within `atomic` may."""
    tree = ast.parse(source)
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any("atomic(" in ast.unparse(item) for item in node.items):
            inside |= {id(child) for statement in node.body for child in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in inside:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of_files = name == "write_text" and isinstance(node.func, ast.Name)
            if (name in WRITERS and not of_files) or (name == "open" and opens_for_writing(node)):
                found.add(name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "path.write_text('x')",
        "open(path, 'w')",
        "path.open('a', encoding='utf-8')",
        "path.open(mode='r+b')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "save_file(tensors, path)",
        "figure.savefig(path)",
    ],
)
def test_a_writer_is_seen(source):
    assert writers(source)
    assert not writers("with atomic(path) as temporary:\n    " + source)


def test_readers_are_not_taken_for_writers():
    assert not writers("path.open()\npath.open('rb')\nopen(path, 'r')\nwrite_text(path, 'x')")


def test_nothing_else_in_the_package_writes_a_file():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name != "files.py":
            assert writers(path.read_text(encoding="utf-8")) <= EXEMPT.get(name, set()), name


# --------------------------------------------------------------------------------------------------------- whole files
def test_atomic_shows_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt(), ValueError("a record")])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(error, tmp_path):
    path = tmp_path / "file.jsonl"
    write_text(path, "old")

    def records():
        yield {"a": 1}
        raise error

    with pytest.raises(type(error)):
        write_records(path, records())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.jsonl"]


def test_the_disk_has_the_bytes_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("rename"), replace(self, to)))
    write_text(tmp_path / "file", "x")
    assert order == ["fsync", "rename", "fsync"]  # the file, its name, the folder that holds the name


def test_a_link_stays_a_link_and_a_pipe_is_written_to(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    write_text(os.devnull, "nowhere")
    assert not Path(os.devnull).is_file()


# ---------------------------------------------------------------------------------------------------------------- lines
def test_rows_are_there_as_they_come(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Lines(path) as file:
        for number in range(3):
            file.append({"number": number, "text": "a\u2028b \ud800"})
            assert [row["number"] for row in read_records(path)] == list(range(number + 1))
        assert file.sync() == path.stat().st_size
    assert path.read_text(encoding="utf-8").count("\n") == 3


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_anywhere_is_left_out_by_readers_and_cut_by_writers(cut, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    whole, last = b'{"a": 1}\n', b'{"b": [12]}\n'
    path.write_bytes(whole + last[:cut])
    kept = [{"a": 1}] + ([{"b": [12]}] if cut == 11 else [])  # all but its newline: nothing is missing
    assert read_records(path) == kept
    assert ("not written whole" in capsys.readouterr().err) == (cut < 11)
    with Lines(path) as file:
        file.append({"c": 2})
    assert read_records(path) == [*kept, {"c": 2}]


def test_a_run_that_goes_on_keeps_the_bytes_it_names(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Lines(path) as file:
        file.append({"a": 1})
        size = file.sync()
        file.append({"a": 2}, {"a": 3})
    with Lines(path, keep=size) as file:
        file.append({"a": 4})
    assert read_records(path) == [{"a": 1}, {"a": 4}]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    with Lines(path) as file:
        file.append({"a": 1})
        raw, calls = file._file, []

        class Full:
            def write(self, content):
                calls.append(1)
                if len(calls) > 1:
                    raise OSError(errno.ENOSPC, "no space left")
                return raw.write(content[:4])

            def __getattr__(self, name):
                return getattr(raw, name)

        monkeypatch.setattr(file, "_file", Full())
        with pytest.raises(OSError, match="no space"):
            file.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("line", ["[1]", "1", "{", "nonsense", '{"a": 1}}', "[" * 100_000])
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line + '\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: is not a JSON object"):
        read_records(path)
    path.write_text(line)
    with pytest.raises(UserError, match=r"rows\.jsonl: is not a JSON object"):
        read_json(path)


def test_what_is_missing_is_empty(tmp_path):
    assert read_records(tmp_path / "none") == [] and read_json(tmp_path / "none") == {}
    (tmp_path / "one").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "one") == {"a": 1}

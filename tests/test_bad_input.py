"""Malformed files, in one table: each is one UserError in words that names file and line, and never a traceback."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minirlhf import data
from minirlhf.runtime import UserError

GOOD = b'{"prompt": "p:", "response": " r"}\n'
GOOD_PAIR = b'{"prompt": "p:", "chosen": " a", "rejected": " b"}\n'
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
TASK = {"prompt": "Q?", "answer1": "one", "answer2": "two"}


def rows(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def task(selected: object) -> dict:
    return {"data": TASK, "annotations": [{"result": [{"value": {"selected": selected}}]}]}


def parquet(values: list[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), sink)
    return sink.getvalue()


PAIRS, DEMOS, PROMPTS = "pairs", "demonstrations", "prompts"
# (name, the file's bytes, kind, line that is named (None: the file), words of the error)
CASES = [
    ("an empty file", b"", DEMOS, None, "an empty file"),
    ("blank lines only", b"\n  \n\n", DEMOS, None, "holds no records"),
    ("an empty array", b"[]", DEMOS, None, "holds no records"),
    ("a broken line", GOOD + b"{oops\n", DEMOS, 2, "not JSON"),
    ("a line cut off", GOOD + GOOD[:-9], DEMOS, 2, "not JSON"),
    ("two objects on a line", GOOD + GOOD[:-1] + GOOD, DEMOS, 2, "not JSON (Extra data)"),
    ("single quotes", GOOD + b"{'prompt': 'p', 'response': 'r'}\n", DEMOS, 2, "not JSON"),
    ("a trailing comma", GOOD + b'{"prompt": "p", "response": "r",}\n', DEMOS, 2, "not JSON"),
    (
        "a raw control character",
        GOOD + b'{"prompt": "p\x00", "response": "r"}\n',
        DEMOS,
        2,
        "Invalid control character",
    ),
    ("a line of words", GOOD + b"and so on\n", DEMOS, 2, "not JSON"),
    ("a byte order mark", b"\xef\xbb\xbf" + GOOD, DEMOS, 1, "byte order mark; save the file as UTF-8 without it"),
    ("UTF-16", GOOD.decode().encode("utf-16"), DEMOS, 1, "UTF-16 text; save the file as UTF-8"),
    (
        "Latin-1",
        GOOD + '{"prompt": "p", "response": "é"}\n'.encode("latin-1"),
        DEMOS,
        2,
        "not UTF-8 (byte 0xe9 at column 30)",
    ),
    ("a surrogate in raw UTF-8", GOOD + b'{"prompt": "\xed\xa0\x80", "response": "r"}\n', DEMOS, 2, "not UTF-8"),
    (
        "a lone surrogate",
        GOOD + b'{"prompt": "p", "response": "a\\ud800b"}\n',
        DEMOS,
        2,
        "half a character (lone surrogate '\\ud800' at 1)",
    ),
    ("NaN", GOOD + b'{"prompt": "p", "response": "r", "score": NaN}\n', DEMOS, 2, "NaN is not JSON"),
    ("Infinity", GOOD + b'{"prompt": "p", "response": "r", "score": -Infinity}\n', DEMOS, 2, "-Infinity is not JSON"),
    (
        "a key twice",
        GOOD + b'{"prompt": "p", "response": "r", "prompt": "q"}\n',
        DEMOS,
        2,
        "the field 'prompt' stands twice",
    ),
    (
        "a key twice, deeper",
        b'[{"prompt": "p", "response": "r"},\n {"prompt": "p", "response": "r", "x": {"a": 1, "a": 2}}]',
        DEMOS,
        2,
        "the field 'a' stands twice",
    ),
    ("nested too deeply", GOOD + b"[" * 200_000 + b"\n", DEMOS, 2, "not JSON"),
    (
        "an integer of 5,000 digits",
        GOOD + b'{"prompt": "p", "response": "r", "n": ' + b"9" * 5000 + b"}\n",
        DEMOS,
        2,
        "not JSON",
    ),
    (
        "an array that does not end",
        b'[{"prompt": "p", "response": "r"},\n{"prompt": "p", "response": "r"}\n',
        DEMOS,
        2,
        "the array does not end as it should",
    ),
    (
        "an array with a broken element",
        b'[{"prompt": "p", "response": "r"},\n{"prompt": p}]',
        DEMOS,
        2,
        "the rest of the file was not read",
    ),
    (
        "an array without a comma",
        b'[{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": "r"}]',
        DEMOS,
        2,
        "the array does not end as it should",
    ),
    (
        "text after an array",
        b'[{"prompt": "p", "response": "r"}]\nthe end',
        DEMOS,
        2,
        "the array does not end as it should",
    ),
    ("a number for a record", GOOD + b"7\n", DEMOS, 2, "not an object with fields"),
    ("a list for a record", GOOD + b'["p", "r"]\n', DEMOS, 2, "not an object with fields"),
    ("null for a record", GOOD + b"null\n", DEMOS, 2, "not an object with fields"),
    ("a missing field", GOOD_PAIR + rows({"prompt": "p", "chosen": "c"}), PAIRS, 2, "no field 'rejected'"),
    (
        "a number for a text",
        GOOD + rows({"prompt": "p", "response": 7}),
        DEMOS,
        2,
        "the field 'response' is the number 7, not text",
    ),
    (
        "null for a text",
        GOOD_PAIR + rows({"prompt": "p", "chosen": None, "rejected": "b"}),
        PAIRS,
        2,
        "the field 'chosen' is null, not text",
    ),
    (
        "a list for a text",
        GOOD + rows({"prompt": ["p"], "response": "r"}),
        DEMOS,
        2,
        "the field 'prompt' is a list, not text",
    ),
    (
        "true for a text",
        GOOD + rows({"prompt": True, "response": "r"}),
        DEMOS,
        2,
        "the field 'prompt' is true or false, not text",
    ),
    (
        "an object for a text",
        GOOD + rows({"prompt": {}, "response": "r"}),
        DEMOS,
        2,
        "the field 'prompt' is an object, not text",
    ),
    ("a blank prompt", GOOD + rows({"prompt": " \n", "response": " r"}), DEMOS, 2, "the prompt is blank"),
    ("an empty prompt to answer", rows({"prompt": "p"}, {"prompt": ""}), PROMPTS, 2, "the prompt is blank"),
    (
        "a blank instruction",
        rows({"instruction": "a", "output": "b"}, {"instruction": " ", "output": "b"}),
        DEMOS,
        2,
        "the prompt is blank",
    ),
    ("an unknown role", CHAT + CHAT.replace(b'"user"', b'"wizard"'), DEMOS, 2, "unknown role 'wizard'"),
    (
        "a message without content",
        CHAT + rows({"messages": [{"role": "user"}]}),
        DEMOS,
        2,
        "no field 'content or value'",
    ),
    ("a message that is a text", CHAT + rows({"messages": ["hello"]}), DEMOS, 2, "'messages' must be a list of mess"),
    (
        "messages that are a text",
        CHAT + rows({"messages": "hello"}),
        DEMOS,
        2,
        "the field 'messages' is a text, not a list",
    ),
    ("no messages", CHAT + rows({"messages": []}), DEMOS, 2, "no messages"),
    (
        "an image in a message",
        CHAT + rows({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        DEMOS,
        2,
        "no field 'text'",
    ),
    (
        "chosen a list, rejected a text",
        rows({"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}),
        PAIRS,
        1,
        "the field 'rejected' is a text",
    ),
    (
        "instances that are a text",
        rows({"instruction": "a", "instances": "b"}),
        DEMOS,
        1,
        "the field 'instances' is a text, not a list",
    ),
    (
        "neither left nor right",
        rows(task("left"), task("middle")),
        PAIRS,
        2,
        "selected is 'middle'; it must be left or right",
    ),
    (
        "a task without its answers",
        rows(task("left"), {**task("left"), "data": {"prompt": "Q?"}}),
        PAIRS,
        2,
        "no field 'answer1'",
    ),
    (
        "annotations that are a number",
        rows(task("left"), {"data": TASK, "annotations": 3}),
        PAIRS,
        2,
        "the field 'annotations' is the number 3, not a list",
    ),
    (
        "ranks of another length",
        rows({"prompt": "p", "responses": ["a", "b"], "ranks": [0]}),
        PAIRS,
        1,
        "'ranks' has 1 values for 2 responses",
    ),
    (
        "ranks that are no whole numbers",
        rows({"prompt": "p", "responses": ["a", "b"], "ranks": [0, "1"]}),
        PAIRS,
        1,
        "'ranks' must be whole numbers",
    ),
    (
        "response ids that are texts",
        rows({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "response_ids": [["x"], [1]]}),
        PAIRS,
        1,
        "'response_ids' must be",
    ),
    (
        "a rating in words",
        rows({"text": "a", "label": 1}, {"text": "a", "label": "good"}),
        DEMOS,
        2,
        "the field 'label' is 'good', not a finite number",
    ),
    (
        "an endless rating",
        rows({"text": "a", "label": 1}) + b'{"text": "a", "label": 1e999}\n',
        DEMOS,
        2,
        "not a finite number",
    ),
    (
        "TSV with a column too few",
        b"prompt\tresponse\na\tb\nc\n",
        DEMOS,
        3,
        "1 columns where prompt, response are expected",
    ),
    (
        "TSV with a column too many",
        b"prompt\tresponse\na\tb\nc\td\te\n",
        DEMOS,
        3,
        "3 columns where prompt, response are expected",
    ),
    ("CSV", b"prompt,response\na,b\n", DEMOS, 1, "looks like CSV, which is not read; save it as TSV or JSON Lines"),
    ("fields that nobody knows", rows({"foo": "a", "bar": "b"}), DEMOS, 1, "from the fields foo, bar; name the fields"),
    ("pairs wanted, demonstrations given", GOOD, PAIRS, 1, "no pairs can be read from the fields prompt, response"),
    ("demonstrations wanted, prompts given", rows({"prompt": "p"}), DEMOS, 1, "no demonstrations can be read"),
    ("pairs wanted, plain text given", b"Once upon a time\n", PAIRS, 1, "plain text, which holds no pairs"),
    ("damaged gzip", gzip.compress(GOOD)[:-12], DEMOS, None, "gzip data that cannot be unpacked"),
    ("a zip archive", b"PK\x03\x04" + b"x" * 40, DEMOS, 1, "a zip archive; unpack it first"),
    ("a damaged Parquet file", parquet([{"prompt": "p"}])[:-20], PROMPTS, None, "Parquet that cannot be read"),
    (
        "Parquet with a number for a text",
        parquet([{"prompt": 1}]),
        PROMPTS,
        1,
        "the field 'prompt' is the number 1, not text",
    ),
    ("bytes that are no text", b"\x93\x80\x02\xff" * 9, DEMOS, 1, "not UTF-8"),
]


@pytest.mark.parametrize(("content", "kind", "line", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_malformed_files(content: bytes, kind: data.Kind, line: int | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        data.load(file, kind)
    message = str(caught.value)
    place = f"{file}: " if line is None else f"{file}:{line}: "
    assert message.startswith(place) and words in message, message
    assert "\n" not in message


def test_every_bad_line_is_found_in_one_pass(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(
        GOOD + b"{oops\n" + GOOD + b"\xff\n" + rows({"prompt": "p"}, {"prompt": " ", "response": "r"}) + GOOD
    )
    found = data.read(file, "demonstrations")
    assert [bad.place for bad in found.bad] == [f"{file}:{n}" for n in (2, 4, 5, 6)] and len(found.records) == 3
    with pytest.raises(UserError, match=r"a:2: not JSON .* \(bad lines: 4; "):
        data.load(file, "demonstrations")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"source": "folder"}, "folder: a folder; give one file"),
        ({"split": "[1:2:3]"}, "--split [1:2:3]: write a name, a slice or both"),
        ({"split": "[-5:]"}, "--split [-5:]: write a name"),
        ({"split": "train"}, "--split train: a file has no splits; give a slice"),
        ({"split": "[7:]"}, "holds no records"),
        ({"columns": ["prompt"]}, "--columns prompt: write ours=theirs"),
        (
            {"columns": ["prompt=query"]},
            "good.jsonl:1: no field 'query' for --columns prompt=query; there are prompt, response",
        ),
    ],
)
def test_settings_that_a_file_cannot_follow(
    arguments: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_bytes(GOOD)
    Path("folder").mkdir()
    with pytest.raises(UserError, match=re.escape(words)):
        data.load(**{"source": "good.jsonl", "kind": "demonstrations", **arguments})

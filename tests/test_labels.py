"""Files of labels: what is read, and fifteen and more ways to be malformed, each named with file and line."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from minirlhf.config import run_script
from minirlhf.feedback import pairs, stats
from minirlhf.feedback.labels import Candidates, Label, read_candidates, read_labels
from minirlhf.runtime import UserError

GOOD = {
    "item": Candidates("p", (" a", " b")).item,
    "prompt": "p",
    "responses": [" a", " b"],
    "ranks": [0, 1],
    "verdict": "right",
    "labeller": "anna",
    "shown": [1, 0],
    "repeat": False,
    "note": "n",
    "seconds": 1.5,
    "sources": ["x", "y"],
    "response_ids": [[1], [2, 3]],
}
CASES = [
    ("half a line", json.dumps(GOOD)[:-7], "not JSON"),
    ("not UTF-8", b"\xff\xfe\x00", "not UTF-8"),
    ("a list", "[1]", "not an object with fields"),
    ("NaN", '{"seconds": NaN}', "NaN is not JSON"),
    ("a field twice", '{"prompt": "p", "prompt": "q"}', "stands twice"),
    ("no prompt", {"prompt": None}, "the field 'prompt' is null, not text"),
    ("one response", {"responses": [" a"]}, "1 responses; a comparison needs at least 2"),
    ("responses as text", {"responses": " a b"}, "the field 'responses' is a text, not a list"),
    ("a response that is a number", {"responses": [" a", 3]}, "the field 'responses[1]' is the number 3, not text"),
    ("half a character", {"responses": [" a", "\ud800"]}, "half a character"),
    ("the same text twice", {"responses": [" a", " a"]}, "two responses are the same text"),
    ("too few ranks", {"ranks": [0]}, "'ranks' has 1 values for 2 responses"),
    ("a rank left out", {"ranks": [0, 2]}, "'ranks' [0, 2] leave a rank out"),
    ("ranks from one", {"ranks": [1, 2]}, "'ranks' [1, 2] leave a rank out"),
    ("a negative rank", {"ranks": [0, -1]}, "'ranks' [0, -1] leave a rank out"),
    ("ranks that are true or false", {"ranks": [False, True]}, "'ranks' must be whole numbers"),
    ("an unknown verdict", {"verdict": "better"}, "the verdict is 'better'; it must be one of left, right"),
    (
        "a verdict against its ranks",
        {"ranks": [1, 0]},
        "the verdict 'right' and the ranks [1, 0] contradict each other",
    ),
    ("a tie with a best", {"verdict": "tie"}, "the verdict 'tie' and the ranks [0, 1] contradict"),
    ("ranked, but all equal", {"verdict": "ranked", "ranks": [0, 0]}, "contradict each other"),
    ("a side without an order", {"shown": None}, "the field 'shown' is null, not a list"),
    ("an order that repeats", {"shown": [0, 0]}, "'shown' [0, 0] must name each of the 2 positions once"),
    ("a blank labeller", {"labeller": " "}, "the field 'labeller' is blank"),
    ("repeat as a word", {"repeat": "yes"}, "the field 'repeat' is a text, not true or false"),
    ("negative seconds", {"seconds": -1}, "the field 'seconds' is the number -1, not a number of 0 or more"),
    ("a source missing", {"sources": ["x"]}, "'sources' has 1 values for 2 responses"),
    ("ids that are texts", {"response_ids": [["a"], []]}, "'response_ids' must be a list of token ids"),
    ("a score missing", {"scores": [1.0]}, "'scores' has 1 values for 2 responses"),
    ("a score in words", {"scores": [1.0, "high"]}, "'scores' must be numbers"),
    ("a probability above 1", {"orders": [0.5, 1.5]}, "'orders' must be probabilities, from 0 to 1"),
    ("another item", {"item": "0123456789ab"}, "'item' is '0123456789ab', but this prompt"),
    ("another prompt", {"prompt": "q"}, f"'item' is '{GOOD['item']}', but this prompt"),
]


def write(path: Path, bad: object) -> None:
    lines = [json.dumps(GOOD).encode()]
    if isinstance(bad, dict):
        bad = json.dumps({**GOOD, **bad})
    lines.append(bad.encode() if isinstance(bad, str) else bad)
    path.write_bytes(b"\n".join([*lines, lines[0]]) + b"\n")


@pytest.mark.parametrize("bad, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_malformed_labels(bad: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    write(path, bad)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: .*{re.escape(words)}") as error:
        read_labels(path)
    assert "bad lines: 1" in str(error.value) and "\n" not in str(error.value)


def test_the_first_of_several_bad_lines_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    write(path, json.dumps({**GOOD, "ranks": [0, 2]}) + "\n{oops")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: 'ranks'.*bad lines: 2"):
        read_labels(path)


@pytest.mark.parametrize("command", [stats, pairs], ids=["stats", "pairs"])
def test_the_commands_exit_with_2(command, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.jsonl"
    write(path, {"ranks": [0, 2]})
    monkeypatch.setattr(sys, "argv", ["x", "--labels", str(path), "--output", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        run_script(command.main, {"": command.Config()})
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {path}:2: ") and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # the other tests have imported it
def test_commands_by_name(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["feedback", *arguments])
        runpy.run_module("minirlhf.feedback", run_name="__main__", alter_sys=True)

    run("stats", "--labels", str(path))
    assert "1 labels of 1 items on 1 prompts" in capsys.readouterr().out
    run("pairs", "--labels", str(path), "--output", str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").exists()
    with pytest.raises(SystemExit) as stop:
        run("lable")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: lable: not one of collect, label, export, import, stats, pairs\n"
    for name in ("collect", "label", "export", "import"):
        with pytest.raises(SystemExit) as stop:
            run(name, "--help")
        assert stop.value.code == 0 and f"minirlhf.feedback {name}" in capsys.readouterr().out


@pytest.mark.parametrize("content, words", [(None, "no such file"), (b"", "holds no records"), (b"\n", "holds no rec")])
def test_files_with_nothing(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*{words}"):
        read_labels(path)


def test_a_label_is_read_as_it_was_written(tmp_path: Path) -> None:
    label = Label(
        "p",
        (" a", " b"),
        (0, 1),
        "right",
        "anna",
        (1, 0),
        False,
        "n",
        1.5,
        sources=("x", "y"),
        response_ids=([1], [2, 3]),
    )
    assert label.record() == {**GOOD, **{k: tuple(GOOD[k]) for k in GOOD if isinstance(GOOD[k], list)}}
    (tmp_path / "l.jsonl").write_text(json.dumps(label.record()) + "\n")
    assert read_labels(tmp_path / "l.jsonl") == [label]


def test_an_item_is_the_same_in_any_order() -> None:
    same = {Candidates("p", responses).item for responses in ((" a", " b"), (" b", " a"))}
    others = [("q", (" a", " b")), ("p", (" a", " c")), ("p", (" a b",)), ("p a", (" b",))]
    assert len(same) == 1 and len(same | {Candidates(*other).item for other in others}) == 5


def test_rankings_and_pairs_of_other_origin_are_labels(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "responses": [" a", " b", " c"], "ranks": [1, 0, 1], "labeller": "simulated", "seed": 0},
        {"prompt": "p", "responses": [" a", " b"], "ranks": [0, 0]},
        {"prompt": "p", "chosen": " b", "rejected": " a"},
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_labels(tmp_path / "l.jsonl") == [
        Label("p", (" a", " b", " c"), (1, 0, 1), "ranked", "simulated"),
        Label("p", (" a", " b"), (0, 0), "tie", "unknown"),
        Label("p", (" b", " a"), (0, 1), "ranked", "unknown"),
    ]


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"responses": [" a"]}, "needs at least 2"),
        ({"sources": [1, 2]}, "the field 'sources[0]' is the number 1"),
        ({"response_ids": [[1]]}, "'response_ids' has 1 values for 2 responses"),
        ({"prompt": 1}, "the field 'prompt' is the number 1"),
    ],
)
def test_malformed_candidates(bad: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write(path, bad)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: .*{re.escape(words)}"):
        read_candidates(path)


def test_the_simulated_labellers_rankings_can_be_labelled_by_hand(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "p", "responses": [" a", " b"], "ranks": [0, 1]}) + "\n")
    assert read_candidates(tmp_path / "r.jsonl") == [Candidates("p", (" a", " b"))]

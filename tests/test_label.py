"""Labelling by hand: the tasks and their order, what each key does, what is on the disk, and the terminal."""

from __future__ import annotations

import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import labelling
import pytest
import tiny
from labelling import session_on, write_candidates

import train_reward
from minirlhf.feedback import collect, label, terminal
from minirlhf.feedback.label_file import LabelFile
from minirlhf.feedback.labels import Label, read_labels
from minirlhf.feedback.tasks import TaskConfig, make_tasks
from minirlhf.files import write_records
from minirlhf.reward import RewardModel
from minirlhf.runtime import UserError

ROOT = Path(__file__).parent.parent
killing = labelling.benchmark("kill_labelling")


# --------------------------------------------------------------------------------------------------------------- tasks
def tasks_of(folder: Path, *, prompts: int, count: int = 2, **changes) -> list:
    write_candidates(folder / "c.jsonl", prompts, count)
    config = TaskConfig(candidates=folder / "c.jsonl", pairs_per_prompt=changes.pop("pairs_per_prompt", 1))
    return make_tasks(config, **{"labeller": "anna", "repeat_share": 0.1, **changes})


def test_one_item_in_ten_is_asked_again_the_other_way_round(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, prompts=60)
    repeats = [i for i, task in enumerate(tasks) if task.repeat]
    assert repeats == [10 + 11 * n for n in range(6)]
    first = {task.key[0]: (i, task) for i, task in enumerate(tasks) if not task.repeat}
    assert len(first) == 60
    for i in repeats:
        before, original = first[tasks[i].key[0]]
        assert i - before > 5 and tasks[i].shown == original.shown[::-1]
    every = [task.key for task in tasks_of(tmp_path, prompts=40, repeat_share=1.0)]
    assert len(set(every)) == len(every) > 70, "an item is asked again once"


def test_order_and_sides_are_random_and_the_labellers_own(tmp_path: Path) -> None:
    anna, ben = (tasks_of(tmp_path, prompts=200, repeat_share=0.0, labeller=name) for name in ("anna", "ben"))
    assert anna == tasks_of(tmp_path, prompts=200, repeat_share=0.0)
    assert {t.key for t in anna} == {t.key for t in ben} and [t.key for t in anna] != [t.key for t in ben]
    sides = {t.key: t.shown for t in ben}
    assert 70 < sum(t.shown == (0, 1) for t in anna) < 130  # 200 fair tosses: 100 +- 30 is over four deviations
    assert 70 < sum(t.shown == sides[t.key] for t in anna) < 130


def test_pairs_of_many_candidates(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, prompts=30, count=4, pairs_per_prompt=2, repeat_share=0.0)
    assert len({t.key for t in tasks}) == 60 and all(len(t.candidates.responses) == 2 for t in tasks)
    for task in tasks:  # what belongs to a response stays with it
        numbers = [text[-1] for text in task.candidates.responses]
        assert [source[-1] for source in task.candidates.sources] == numbers
        assert [str(ids[1]) for ids in task.candidates.response_ids] == numbers
    every = tasks_of(tmp_path, prompts=3, count=4, pairs_per_prompt=99, repeat_share=0.0)
    assert len(every) == 18, "4 candidates have 6 pairs"
    rankings = tasks_of(tmp_path, prompts=3, count=4, mode="rankings", repeat_share=0.0)
    assert [sorted(t.shown) for t in rankings] == [[0, 1, 2, 3]] * 3


# ---------------------------------------------------------------------------------------------------------------- keys
@pytest.mark.parametrize(
    "key, verdict, best",
    [
        ("1", "left", 0),
        ("2", "right", 1),
        ("left", "left", 0),
        ("right", "right", 1),
        ("t", "tie", None),
        ("b", "bad", None),
        ("s", "skip", None),
    ],
)
def test_keys_for_two(key: str, verdict: str, best: int | None, tmp_path: Path) -> None:
    session = session_on(tmp_path, prompts=6)
    tasks = list(session.tasks)
    assert {task.shown for task in tasks} == {(0, 1), (1, 0)}
    for task in tasks:
        assert session.current is task and session.note == ""
        session.note = "why"
        session.press(key)
    found = read_labels(tmp_path / "labels.jsonl")
    assert found == session.file.labels
    assert found == [
        Label(
            task.candidates.prompt,
            task.candidates.responses,
            (0, 0) if best is None else tuple(int(i != task.shown[best]) for i in range(2)),
            verdict,
            labeller="anna",
            shown=task.shown,
            note="why",
            seconds=2.0,
            sources=task.candidates.sources,
            response_ids=task.candidates.response_ids,
        )
        for task in tasks
    ]


def test_an_unknown_key_saves_nothing(tmp_path: Path) -> None:
    session = session_on(tmp_path)
    before = session.current
    for key in ("x", "3", "enter", "=", ""):
        session.press(key)
        assert session.current is before and session.file.labels == [] and "does nothing" in session.message


@pytest.mark.parametrize(
    "keys, levels",
    [
        ("3142", [[2], [0], [3], [1]]),
        ("3=142", [[2, 0], [3], [1]]),
        ("31=24", [[2], [0, 1], [3]]),
        ("2\n", [[1], [0, 2, 3]]),
        ("13=4\n", [[0], [2, 3], [1]]),
        ("1u3142", [[2], [0], [3], [1]]),
        ("11423", [[0], [3], [1], [2]]),
        ("1=2=3=4", [[0, 1, 2, 3]]),
        ("=3142", [[2], [0], [3], [1]]),
    ],
)
def test_keys_for_a_ranking(keys: str, levels: list[list[int]], tmp_path: Path) -> None:
    session = session_on(tmp_path, count=4)
    task = session.current
    for key in keys:
        assert not session.file.labels
        session.press("enter" if key == "\n" else key)
    (found,) = session.file.labels
    for rank, level in enumerate(levels):
        assert all(found.ranks[task.shown[position]] == rank for position in level)
    assert found.verdict == ("tie" if len(levels) == 1 else "ranked") and len(found.ranks) == 4


def test_undo_takes_the_label_out_of_the_file_and_asks_again(tmp_path: Path) -> None:
    session = session_on(tmp_path)
    asked = [session.current.key]
    session.press("1")
    asked.append(session.current.key)
    content = (tmp_path / "labels.jsonl").read_bytes()
    session.note = "hm"
    session.press("2")
    session.press("u")
    assert (tmp_path / "labels.jsonl").read_bytes() == content
    assert session.current.key == asked[1] and session.note == "hm"
    session.press("u")
    assert (tmp_path / "labels.jsonl").read_bytes() == b"" and session.current.key == asked[0]
    session.press("u")
    assert session.message == "nothing to undo" and session.current.key == asked[0]
    session.press("t")
    assert session.current.key == asked[1] and [x.verdict for x in session.file.labels] == ["tie"]


def test_undo_leaves_the_labels_of_others_alone(tmp_path: Path) -> None:
    anna = session_on(tmp_path)
    anna.press("1")
    anna.file.close()
    ben = session_on(tmp_path, labeller="ben")
    assert ben.progress["done"] == 0
    ben.press("u")
    assert ben.message == "nothing to undo" and len(read_labels(tmp_path / "labels.jsonl")) == 1


def test_a_session_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    first = session_on(tmp_path, prompts=12, repeats=0.1)
    order = [task.key for task in first.tasks]
    for key in "121":
        first.press(key)
    first.file.close()
    second = session_on(tmp_path, repeats=0.1)
    assert second.current.key == order[3] and second.progress["done"] == 3
    while second.current:
        second.press("1")
    assert [(x.item, x.repeat) for x in second.file.labels] == order and len(order) == 13
    assert second.progress["done"] == second.progress["total"] == 13
    second.press("1")
    assert len(second.file.labels) == 13 and "all done" in second.message


def test_what_was_skipped_is_not_asked_again(tmp_path: Path) -> None:
    session = session_on(tmp_path, prompts=10, repeats=0.5)
    while session.current:
        session.press("s")
    assert len(session.file.labels) == 10 and not any(x.repeat for x in session.file.labels)
    session.file.close()
    other = session_on(tmp_path, labeller="ben", repeats=0.5)
    while other.current:
        for key in "su1":  # a skip that was taken back is none
            other.press(key)
    assert sum(x.repeat for x in other.file.labels if x.labeller == "ben") == sum(t.repeat for t in other.tasks) > 2


def test_progress_and_rate(tmp_path: Path) -> None:
    session = session_on(tmp_path)
    assert session.progress == {"done": 0, "total": 4, "rate": 0.0, "minutes_left": None}
    session.clock = lambda: 30.0  # 28 s after it began at 2 s
    session.press("1")
    assert session.progress["rate"] == pytest.approx(60 / 28)
    assert session.progress["minutes_left"] == pytest.approx(3 * 28 / 60)


# ------------------------------------------------------------------------------------------------------------ the file
def a_label(number: int) -> Label:
    return Label(f"p{number}", (" a", " b"), (0, 1), "left", labeller="anna", shown=(0, 1))


def test_every_label_is_synced_before_the_next_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, fsync = [], os.fsync
    with LabelFile(tmp_path / "l.jsonl") as file:
        monkeypatch.setattr(os, "fsync", lambda d: (fsync(d), sizes.append(os.fstat(d).st_size)))
        for n in range(3):
            file.append(a_label(n))
            assert sizes[-1] == (tmp_path / "l.jsonl").stat().st_size and len(sizes) == n + 1
        file.pop()
        assert sizes[-1] == (tmp_path / "l.jsonl").stat().st_size < sizes[-2]
    assert [x.prompt for x in read_labels(tmp_path / "l.jsonl")] == ["p0", "p1"]


def test_a_torn_line_is_cut_off_and_a_whole_one_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "l.jsonl"
    line = json.dumps(a_label(0).record()).encode() + b"\n"
    for size in (1, 40, len(line) - 2):
        path.write_bytes(line + line[:size])
        with LabelFile(path) as file:
            assert len(file.labels) == 1
            assert "cut off" in capsys.readouterr().err and path.read_bytes() == line
    path.write_bytes(line[:-1])
    with LabelFile(path) as file:
        file.append(a_label(1))
    assert [x.prompt for x in read_labels(path)] == ["p0", "p1"]


def test_a_full_disk_loses_no_saved_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.jsonl"
    with LabelFile(path) as file:
        file.append(a_label(0))
        before = path.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the label was not saved .No space left"):
            file.append(a_label(1))
        assert path.read_bytes() == before and len(file.labels) == 1


def test_two_processes_cannot_write_to_one_file(tmp_path: Path) -> None:
    with LabelFile(tmp_path / "l.jsonl"):
        with pytest.raises(UserError, match="is writing there; wait for its end or give another --output"):
            LabelFile(tmp_path / "l.jsonl")
    LabelFile(tmp_path / "l.jsonl").close()


def test_a_damaged_file_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"prompt": "p"}\n')
    refused = {path: "l.jsonl:1: no field 'responses'", tmp_path: "cannot be opened for writing .Is a directory"}
    errors = []  # whose frames hold what was opened
    for file, words in [*refused.items()] * 2:  # the second time too: no lock is left
        with pytest.raises(UserError, match=words) as error:
            LabelFile(file)
        errors.append(error)
    assert path.read_text() == '{"prompt": "p"}\n'


def test_kills_lose_at_most_the_last_label(tmp_path: Path) -> None:
    outcomes = killing.kill_repeatedly(tmp_path, kills=2, seed=3, command=False)
    assert len(outcomes) == 2 and outcomes[1].shown > 3


# -------------------------------------------------------------------------------------------------------- the terminal
def test_screens_say_everything_and_steer_nothing(tmp_path: Path) -> None:
    evil = " \x1b]0;gone\x07\x1b[2J\u202eback\ttab\nline"
    write_records(tmp_path / "candidates.jsonl", [{"prompt": "Q \x9b1m?", "responses": [evil, " word" * 60]}])
    session = session_on(tmp_path)
    session.note = "n\x1b"
    for width in (120, 60, 10):
        lines = terminal.page(session, session.current, width)
        text = "\n".join(lines)
        assert all(c.isprintable() or c == "\n" for c in text)
        assert max(map(len, lines)) <= max(width, 20)
        assert text.count("word") == 60 and "back" in text and "0 of 1" in text
        assert all(f"[{key}" in text for key in ("1", "2", "t", "b", "s", "u", "n", "q")), text
    assert sum("|" in line for line in terminal.page(session, session.current, 120)) > 5  # side by side
    assert not any("|" in line for line in terminal.page(session, session.current, 60))


def test_keys_as_terminals_send_them() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"1\x1b[D\x1b[C\x1bOCT\x7f\n\r\x1b[A=\x04")
    keys = [terminal.read_key(reader) for _ in range(11)]
    assert keys == ["1", "left", "right", "right", "t", "u", "enter", "enter", "escape", "=", ""]
    os.close(writer)
    assert terminal.read_key(reader) == ""
    os.close(reader)


def test_a_note_is_typed_with_backspace_and_escape() -> None:
    reader, writer = os.pipe()
    os.write(writer, "zué\x7f\x7f w ö\r".encode() + b"x\x1b")
    assert terminal.read_line(reader, "note: ", "a") == "az w ö"
    assert terminal.read_line(reader, "note: ", "old") == "old"
    os.close(reader)
    os.close(writer)


def test_without_a_terminal_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_candidates(tmp_path / "c.jsonl", 2)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with pytest.raises(UserError, match="not a terminal; start it in one, or use --page"):
        label.main(label.Config(candidates=tmp_path / "c.jsonl", output=tmp_path / "l.jsonl"))


def test_twenty_labels_from_the_keyboard_train_a_reward_model(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft")
    settings = {"prompts": str(run / "train.jsonl"), "candidates": 2, "max_new_tokens": 8, "device": "cpu"}
    collect.main(collect.Config(run=run, **settings))
    keys = "12t1b\x1b[C1" + "nfoo\r" + "1u2" + "121s21212121" + "q"  # 20 labels, one of them taken back and given anew
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "minirlhf.feedback", "label", "--run", str(run)]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, cwd=ROOT)
    os.close(follower)
    output = b""
    while b"\x1b[2J" not in output:
        output += os.read(leader, 65_536)
    os.write(leader, keys.encode())
    try:
        while chunk := os.read(leader, 65_536):
            output += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0, output.decode()
    assert b"20 of 22 done" in output
    labels = read_labels(run / "labels" / "labels.jsonl")
    verdicts = {"1": "left", "2": "right", "t": "tie", "b": "bad", "s": "skip"}
    assert [x.verdict for x in labels] == [verdicts[key] for key in "12t1b212121s21212121"]
    assert [x.note for x in labels] == ["foo" if i == 7 else "" for i in range(20)]
    assert [i for i, x in enumerate(labels) if x.repeat] == [10]

    config = tiny.reward_config(run)
    config.comparisons, config.reference_prompts = str(run / "labels" / "labels.jsonl"), None
    RewardModel.from_pretrained(train_reward.main(config))


def test_a_key_without_candidates_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="candidates.jsonl: no such file; make it with `python -m minirlhf.feedback"):
        label.main(label.Config(run=tmp_path))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"labeller": " "}, "give a name"),
        ({"repeats": 1.5}, "--repeats 1.5"),
        ({"pairs_per_prompt": 0}, "--pairs-per-prompt 0"),
    ],
)
def test_settings_out_of_range(settings: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        label.main(label.Config(run=tmp_path, **settings))


def test_random_sessions_keep_file_and_memory_the_same(tmp_path: Path) -> None:
    stream = random.Random(0)
    session = session_on(tmp_path, prompts=8, repeats=0.3)
    for _ in range(120):
        session.press(stream.choice("1122tbsuu"))
        content = (tmp_path / "labels.jsonl").stat().st_size
        on_disk = read_labels(tmp_path / "labels.jsonl") if content else []
        assert on_disk == session.file.labels
        keys = [(x.item, x.repeat) for x in on_disk]
        assert len(set(keys)) == len(keys), "no task is labelled twice"

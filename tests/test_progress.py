"""What a stage says of its progress: plain lines now and then, or one live line on a terminal."""

from __future__ import annotations

import os
import re
import sys
import termios
from types import SimpleNamespace

import pytest

from minirlhf.runs import log
from minirlhf.runs.log import Progress

ROW = {"loss": 0.51234, "accuracy": 0.75, "grad_norm": 9.0}


def lines(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *, steps: int, seconds: float) -> list[str]:
    """What a stage says without a terminal, whose steps take so many seconds and 50 tokens each."""
    now = [0.0]
    patch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    shown = Progress("dpo", steps=steps)
    for _ in range(steps):
        now[0] += seconds
        shown.update(ROW, tokens=50)
    shown.close()
    out, said = capsys.readouterr()
    assert out == ""
    return said.splitlines()


def test_without_a_terminal_a_line_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said = lines(monkeypatch, capsys, steps=50, seconds=0.5)
    assert said == [
        "dpo: step 20 of 50, loss 0.5123, accuracy 0.75, 100 tokens/s, 00:15 left",
        "dpo: step 40 of 50, loss 0.5123, accuracy 0.75, 100 tokens/s, 00:05 left",
        "dpo: step 50 of 50, loss 0.5123, accuracy 0.75, 100 tokens/s, 00:00 left",
    ]


def test_a_long_run_has_fifty_lines_and_a_stage_of_one_step_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said = lines(monkeypatch, capsys, steps=1000, seconds=40.0)
    assert len(said) == 50 and said[0].startswith("dpo: step 20 of 1000,") and said[0].endswith(" 10:53:20 left")
    assert lines(monkeypatch, capsys, steps=1, seconds=40.0) == []


def test_a_resumed_stage_counts_from_where_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    shown = Progress("sft", steps=100, done=90)
    now[0] = 12.0
    shown.update({"loss": 2.0}, tokens=24)
    assert capsys.readouterr().err == ""  # one step is less than a fiftieth
    now[0] = 24.0
    shown.update({"loss": 2.0}, tokens=24)
    assert capsys.readouterr().err == "sft: step 92 of 100, loss 2, 2 tokens/s, 01:36 left\n"


def test_on_a_terminal_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = os.openpty()
    termios.tcsetwinsize(side, (24, 140))
    with os.fdopen(side, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = Progress("sft", steps=3)
        shown.bar.mininterval = 0.0  # each step is drawn
        for number in range(3):
            shown.update(ROW, tokens=100)
            if number == 1:
                shown.say("hint: something")
        shown.close()
        drawn = b""
        while b" 3/3 " not in drawn or not drawn.endswith(b"\r\n"):
            drawn += os.read(main, 1000)
    os.close(main)
    said = drawn.decode()
    assert re.search(r"sft:  67%\|[^\r]*\| 2/3 \[00:00<00:00, loss 0.5123, accuracy 0.75, [\d,]+ tokens/s\]", said)
    assert re.search(r"\r *\rhint: something\r\n", said), "a line of its own, where the live one was"
    assert said.count("\n") == 2 and "step 3 of 3" not in said  # the hint's line and the end of the live one

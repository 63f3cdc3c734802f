"""The benchmarks that stop and damage runs: a stage that resumes well passes, and what is wrong is noticed."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import children
import corrupt
import kill_resume

GIVEN = argparse.Namespace(seed=0, kills=1, checkpoint_every=None, processes=1)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> children.Workshop:
    monkeypatch.setattr(children, "RECORDS", 64)
    return children.Workshop(tmp_path, sft="--epochs 3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_stage_ends_with_the_same_bits(number: int, workshop: children.Workshop) -> None:
    result = kill_resume.measure(workshop, "sft", number, GIVEN)
    assert (result["stopped"], result["equal"], result["wrong"]) == (1, 1, [])


def test_a_signal_that_does_not_stop_the_stage_is_noticed(
    workshop: children.Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = children.work

    def deaf(order: children.Order) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which scripts leave as it is
        work(order)

    monkeypatch.setattr(children, "work", deaf)
    result = kill_resume.measure(workshop, "sft", signal.SIGTERM, GIVEN)
    assert result["ended_well"] == 0 and {trial["code"] for trial in result["wrong"]} == {0}


def test_damage_is_refused_or_survived(workshop: children.Workshop) -> None:
    result = corrupt.count(workshop, ["bit flipped in the manifest", "latest missing"], ["sft"], cases=2, seed=0)
    assert (result["right"], result["outcomes"]) == (2, {"refused": 1, "resumed": 1})


def test_other_weights_after_a_resume_are_noticed(workshop: children.Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    work = children.work

    def half(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            group["lr"] /= 2

    def differently(order: children.Order) -> None:
        if order.resume:
            register_optimizer_step_pre_hook(half)
        work(order)

    monkeypatch.setattr(children, "work", differently)
    result = kill_resume.measure(workshop, "sft", signal.SIGTERM, GIVEN)
    assert result["equal"] == 0 and len(result["wrong"]) == 1
    result = corrupt.count(workshop, ["latest missing"], ["sft"], cases=1, seed=0)
    assert result["right"] == 0 and result["cases"][0]["outcome"] == "WRONG: other weights"

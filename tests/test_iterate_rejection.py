"""The study of iterated rejection sampling: each choice learns from its own file, and from the model before it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))
import iterate_rejection

import train_sft
from minirlhf.evaluate.statistics import bootstrap_interval


def figures(seed: int, choice: str, judged: list[list[float]]) -> dict:
    rows = [{"seed": seed, "choice": choice, "kl": 0.5 * seed + i} for i in range(len(judged))]
    return {"rows": rows, "judged": judged}


def test_seeds_are_averaged_a_prompt_at_a_time() -> None:
    study = {
        "a": figures(0, "best", [[0.0, 0.0, 0.3], [1.0, 0.5, 0.0]]),
        "b": figures(1, "best", [[0.2, 0.0, 0.1], [0.0, 0.5, 1.0]]),
        "c": figures(0, "random", [[0.0, 0.0, 0.3], [0.0, 0.2, 0.1]]),
        "d": figures(1, "random", [[0.2, 0.0, 0.1], [0.0, 0.0, 0.3]]),
    }
    best, control, gap, *later = iterate_rejection.over_seeds(study, 1)
    assert best["judge"] == control["judge"] == pytest.approx(0.1) and gap["judge"] == gap["low"] == gap["high"] == 0
    assert [row["choice"] for row in later] == ["best", "random", "best - random"]
    assert [row["judge"] for row in later] == pytest.approx([0.5, 0.1, 0.4])
    assert later[0]["low"] == later[0]["high"] == pytest.approx(0.5)  # both seeds together are 0.5 on each prompt
    expected = bootstrap_interval(np.array([0.5, 0.4, 0.3]), seed=0)
    assert (later[2]["low"], later[2]["high"]) == pytest.approx(expected)
    assert [row["kl"] for row in (best, *later[:2])] == [0.25, 1.25, 1.25]


def test_each_iteration_goes_on_from_the_last_on_other_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stages that only say what they were asked for, and the real evaluation of the small run's own model."""
    sampled, learned = [], []
    own = tiny.finished_run() / "sft" / "model"
    monkeypatch.setattr(iterate_rejection.rejection, "main", sampled.append)

    def learn(config: train_sft.Config) -> Path:
        learned.append(config)
        return Path(shutil.copytree(own, tmp_path / f"model-{len(learned)}"))

    monkeypatch.setattr(iterate_rejection.train_sft, "main", learn)
    settings = {"run": str(tiny.finished_run()), "seed": 2, "choice": "random", "held_out": 4}
    settings |= {"iterations": 3, "candidates": 5, "learning_rate": 1e-4, "epochs": 1.0}
    found = iterate_rejection.iterate(tmp_path, settings)
    assert [c.split for c in sampled] == ["[0:987]", "[987:1974]", "[1974:2960]"]
    assert [c.seed for c in sampled] == [c.seed for c in learned] == [201, 202, 203]
    assert {c.candidates for c in sampled} == {5} and {c.learning_rate for c in learned} == {1e-4}
    models = [str(own), str(tmp_path / "model-1"), str(tmp_path / "model-2")]
    assert [c.policy for c in sampled] == [c.model for c in learned] == models
    assert {c.reward_model for c in sampled} == {str(tiny.finished_run() / "reward" / "model")}
    assert [c.train for c in learned] == [str(tmp_path / f"rejection-{i}" / "random.jsonl") for i in (1, 2, 3)]
    assert [row["iteration"] for row in found["rows"]] == [0, 1, 2, 3]
    assert all(row["kl"] == pytest.approx(0.0, abs=1e-4) for row in found["rows"])
    assert np.mean(found["judged"][3]) == pytest.approx(found["rows"][3]["judge"], abs=1e-4)

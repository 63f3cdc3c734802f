"""Ensembles of reward models, and whether a reward model knows how sure it may be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import ENCODING, PROMPTS

import train_ppo
from minirlhf import data, tokenizer
from minirlhf.batch import pad
from minirlhf.encode import encode_comparison, encode_example, split_by_prompt
from minirlhf.evaluate import calibration
from minirlhf.evaluate.calibration import Pairs, bins_of, expected_calibration_error, score_pairs, summarise
from minirlhf.evaluate.judges import ModelFolder, RewardScorer
from minirlhf.reward import RewardEnsemble, RewardModel, combine
from minirlhf.runtime import UserError

# ------------------------------------------------------------------------------------------------------------- ensemble
SCORES = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])


@pytest.mark.parametrize(
    "aggregate, expected",
    [
        ("mean", [3.0, 1.0]),
        ("worst", [1.0, 0.0]),
        # variances ((-2)^2 + (-1)^2 + 3^2) / 3 = 14/3 and (1 + 1 + 4) / 3 = 2, half of which is taken off
        ("mean-minus-variance", [3.0 - 7 / 3, 0.0]),
    ],
)
def test_one_score_of_many_by_hand(aggregate: str, expected: list[float]) -> None:
    torch.testing.assert_close(combine(SCORES, aggregate=aggregate, penalty=0.5), torch.tensor(expected))
    same = SCORES[:1].expand(4, -1)
    torch.testing.assert_close(combine(same, aggregate=aggregate, penalty=0.5), SCORES[0])  # members that agree


def test_an_ensemble_scores_like_its_members() -> None:
    folder = tiny.finished_run() / "reward" / "model"
    members = [RewardModel.from_pretrained(folder) for _ in range(2)]
    with torch.no_grad():
        members[1].score.weight.mul_(-2)
    batch = pad([encode_example(ENCODING, p, " Yes.", max_length=96) for p in PROMPTS[:3]])
    one, two = (member(batch.tokens, batch.lengths) for member in members)
    ensemble = RewardEnsemble(members, aggregate="worst")
    torch.testing.assert_close(ensemble(batch.tokens, batch.lengths), torch.minimum(one, two))


def test_ppo_maximises_the_score_of_the_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "reward")
    other = RewardModel.from_pretrained(run / "reward" / "model")
    with torch.no_grad():
        other.score.weight.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save(ENCODING, tmp_path / "other")
    rollouts = tiny.spy(monkeypatch, train_ppo, "end_iteration")
    settings = {"ensemble": (str(tmp_path / "other"),), "aggregate": "mean-minus-variance", "variance_penalty": 2.0}
    config = replace(tiny.ppo_config(run), iterations=1, missing_eos_score=None, **settings)
    train_ppo.main(config)
    rollout = rollouts[0].arguments["experience"]
    with torch.no_grad():
        r = RewardModel.from_pretrained(run / "reward" / "model")(rollout.tokens, rollout.lengths)
    # the two are r and -r: mean 0, variance r^2
    torch.testing.assert_close(rollout.scores, -2 * r.square(), atol=1e-5, rtol=1e-4)  # float32 in other batches


# ---------------------------------------------------------------------------------------------------------- calibration
def pairs_of(margins: list[float], longer: list[int] | None = None, sources: list[str] | None = None) -> Pairs:
    count = len(margins)
    return Pairs(np.array(margins, dtype=float), np.array(longer or [0] * count), np.array(sources or [""] * count))


def test_bins_and_error_by_hand() -> None:
    # sigmoid(0.1) = 0.525, in the first bin, right once and wrong once; sigmoid(2) = 0.881, right three times of four
    pairs = pairs_of([0.1, -0.1, 2.0, 2.0, 2.0, -2.0])
    low, high = bins_of(pairs.margins)
    assert (low["from"], low["pairs"], low["accuracy"]) == (0.5, 2, 0.5) and high["from"] == pytest.approx(0.85)
    assert low["confidence"] == pytest.approx(0.524979) and high["confidence"] == pytest.approx(0.880797)
    error = 2 / 6 * 0.024979 + 4 / 6 * (0.880797 - 0.75)
    assert expected_calibration_error([low, high]) == pytest.approx(error, abs=1e-6)


def test_labels_drawn_from_the_model_itself_are_calibrated_and_doubled_scores_are_found_out() -> None:
    random = np.random.default_rng(0)
    gaps = random.normal(0, 2, 20_000)
    won = random.random(20_000) < 1 / (1 + np.exp(-gaps))
    margins = np.where(won, gaps, -gaps)
    assert expected_calibration_error(bins_of(margins)) < 0.01
    assert expected_calibration_error(bins_of(2 * margins)) > 0.05


def test_equal_scores_are_half_right_and_extremes_stay_finite() -> None:
    summary = summarise(pairs_of([0.0, 1e4, -1e4]))
    assert summary["accuracy"] == 0.5 and math.isfinite(summary["expected_calibration_error"])
    assert summary["bins"][-1]["confidence"] == 1.0


def test_accuracy_by_margin_length_and_sources() -> None:
    pairs = pairs_of(
        [0.1, -0.2, 0.3, 1.0, 2.0, -3.0], longer=[-6, -5, -1, 0, 5, 6], sources=["a and b"] * 4 + ["b and b"] + [""]
    )
    summary = summarise(pairs)
    assert summary["by_margin"] == {
        "small": {"pairs": 2, "accuracy": 0.5},
        "medium": {"pairs": 2, "accuracy": 1.0},
        "large": {"pairs": 2, "accuracy": 0.5},
    }
    assert {name: row["pairs"] for name, row in summary["by_length_of_the_better"].items()} == {
        "shorter by 6 or more": 1,
        "shorter by 1 to 5": 2,
        "equally long": 1,
        "longer by 1 to 5": 1,
        "longer by 6 or more": 1,
    }
    assert summary["by_length_of_the_better"]["shorter by 1 to 5"]["accuracy"] == 0.5
    assert summary["by_sources"] == {
        "a and b": {"pairs": 4, "accuracy": 0.75},
        "b and b": {"pairs": 1, "accuracy": 1.0},
    }


def test_pairs_are_scored_with_the_scale_of_training() -> None:
    folder = ModelFolder.find(str(tiny.finished_run() / "reward"), RewardModel)
    scorer = RewardScorer(folder, torch.device("cpu"), 64)
    model = scorer.model
    texts = [" Yes.", " I do not know.", " No, it does not."]
    records = [
        {"prompt": PROMPTS[0], "responses": texts, "ranks": [1, 0, 2], "sources": ["x", "y", "x"]},
        {"prompt": PROMPTS[1], "chosen": " Yes.", "rejected": " No."},
        {"prompt": PROMPTS[2], "chosen": " Yes.", "rejected": " Yes."},  # nothing to compare
    ]
    found = score_pairs(scorer, records, scale=3.0)

    def score(prompt: str, text: str) -> float:
        batch = pad([encode_example(ENCODING, prompt, text, max_length=96)])
        return model(batch.tokens, batch.lengths).item()

    r = [score(PROMPTS[0], text) for text in texts]
    other = score(PROMPTS[1], " Yes.") - score(PROMPTS[1], " No.")
    expected = [r[0] - r[2], r[1] - r[0], r[1] - r[2], other]
    np.testing.assert_allclose(found.margins, 3 * np.array(expected), atol=1e-5)  # float32 in another batch
    assert found.sources.tolist() == ["x and x", "x and y", "x and y", ""]
    lengths = [len(encode_example(ENCODING, PROMPTS[0], text, max_length=96).response_ids) for text in texts]
    assert found.longer[0] == lengths[0] - lengths[2]


def test_the_command_measures_what_training_held_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "feedback", "reward")
    summary = calibration.main(calibration.Config(run=run, device="cpu"))
    config = tiny.reward_config(run)
    records = data.load(run / "feedback" / "rankings.jsonl", "pairs")
    _, held_out = split_by_prompt(records, share=config.validation_share, seed=config.seed)
    every = [encode_comparison(ENCODING, record, max_length=96) for record in held_out]
    assert summary["pairs"] == sum(len(c.pairs) for c in every if c)
    last = json.loads((run / "reward" / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["accuracy"] == pytest.approx(last["validation_accuracy"], abs=1e-6)
    assert summary["loss"] == pytest.approx(last["validation_loss"], rel=1e-3), "the scale of training is undone"
    assert json.loads((run / "calibration.json").read_text()) == summary
    assert (run / "calibration.png").read_bytes().startswith(b"\x89PNG") and "accuracy" in capsys.readouterr().out


def test_without_a_scale_it_says_so(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "reward")
    (run / "reward" / "normalisation.json").unlink()
    with pytest.raises(UserError, match="normalisation.json: no such file; give --scale"):
        calibration.main(calibration.Config(run=run))
    with pytest.raises(UserError, match="run.json: no such file; train with train_reward.py, or give --comparisons"):
        calibration.main(calibration.Config(run=tmp_path, model=str(run / "reward" / "model"), scale=1.0))

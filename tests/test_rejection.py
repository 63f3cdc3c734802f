"""Rejection sampling: the estimator over all subsets, which candidate wins, the control, and what is written."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_sft
from minirlhf import data, rejection, tokenizer
from minirlhf.encode import encode_prompt
from minirlhf.model import GPT
from minirlhf.rejection import best_of_n_mean, choose, choose_randomly
from minirlhf.reward import RewardModel
from minirlhf.runs.log import read_rows
from minirlhf.runtime import Stream, UserError


# ------------------------------------------------------------------------------------------------------ the estimator
def test_best_of_two_of_three_by_hand() -> None:
    scores, judge = np.array([[3.0, 1.0, 2.0]]), np.array([[10.0, 20.0, 40.0]])
    # The three pairs have maxima 3, 3 and 2.
    assert best_of_n_mean(scores, scores, 2) == pytest.approx([8 / 3], rel=1e-12)
    # and their winners the judge's 10, 10 and 40.
    assert best_of_n_mean(scores, judge, 2) == pytest.approx([20.0], rel=1e-12)
    assert best_of_n_mean(scores, judge, 1) == pytest.approx([70 / 3], rel=1e-12)
    assert best_of_n_mean(scores, judge, 3) == pytest.approx([10.0], rel=1e-12)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-9, 9)), min_size=1, max_size=7),
    st.data(),
)
def test_it_is_the_mean_over_all_subsets(samples: list[tuple[int, int]], draw: st.DataObject) -> None:
    """Every subset of n, its winner by score; of equal best ones the mean of their values."""
    n = draw.draw(st.integers(1, len(samples)))
    outcomes = []
    for subset in itertools.combinations(samples, n):
        best = max(score for score, _ in subset)
        winners = [value for score, value in subset if score == best]
        outcomes.append(sum(winners) / len(winners))
    scores, values = (np.array([[sample[i] for sample in samples]], dtype=float) for i in (0, 1))
    found = best_of_n_mean(scores, values, n)
    assert found == pytest.approx([sum(outcomes) / len(outcomes)], rel=1e-9, abs=1e-9)
    assert best_of_n_mean(scores, scores, n) >= best_of_n_mean(scores, scores, 1) - 1e-12
    order = np.random.default_rng(n).permutation(len(samples))
    assert best_of_n_mean(scores[:, order], values[:, order], n) == pytest.approx(found, rel=1e-9, abs=1e-9)


def test_it_has_no_bias() -> None:
    """Over all samples of 4 from three outcomes, its expectation is that of the best of 2 fresh ones."""
    chances = {0.0: 0.5, 1.0: 0.3, 5.0: 0.2}

    def expected(size: int, of: object) -> float:
        every = itertools.product(chances, repeat=size)
        return sum(math.prod(chances[x] for x in drawn) * of(np.array([drawn])) for drawn in every)

    estimate = expected(4, lambda drawn: best_of_n_mean(drawn, drawn, 2)[0])
    assert estimate == pytest.approx(expected(2, lambda drawn: drawn.max()), rel=1e-12)


def test_rows_are_prompts_and_many_samples_are_no_trouble() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 2000)).cumsum(axis=0)
    many = best_of_n_mean(scores, scores, 1000)
    assert many.shape == (3,) and np.isfinite(many).all() and (many <= scores.max(axis=1)).all()
    np.testing.assert_allclose(
        best_of_n_mean(scores[1:2, :50], scores[1:2, :50], 5), best_of_n_mean(scores[:, :50], scores[:, :50], 5)[1:2]
    )
    for n, shape in ((0, (1, 3)), (4, (1, 3)), (1, (3,))):
        with pytest.raises(ValueError):
            best_of_n_mean(np.zeros(shape), np.zeros(shape), n)
    with pytest.raises(ValueError, match="shape"):
        best_of_n_mean(np.zeros((1, 3)), np.zeros((1, 2)), 1)


# -------------------------------------------------------------------------------------------------------- the choices
def test_the_best_that_finished_wins() -> None:
    scores = np.array([[1.0, 9.0, 3.0], [-5.0, -7.0, -6.0], [1.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    finished = np.array([[True, False, True], [True, True, True], [True, True, True], [False, False, False]])
    assert choose(scores, finished).tolist() == [2, 0, 1, -1]


def test_the_control_is_blind_to_scores_and_even() -> None:
    finished = np.ones((6000, 4), dtype=bool)
    finished[:, 3] = False
    finished[5] = False
    chosen = choose_randomly(finished, seed=0)
    assert chosen[5] == -1 and chosen.tolist() == choose_randomly(finished, seed=0).tolist()
    counts = np.bincount(chosen[chosen >= 0], minlength=4)
    assert counts[3] == 0 and abs(counts[:3] - 2000).max() < 4 * math.sqrt(6000 * 2 / 9)  # four deviations
    assert (chosen != choose_randomly(finished, seed=1)).mean() > 0.5
    assert choose_randomly(finished[:10], seed=0).tolist() == chosen[:10].tolist()  # a row depends on no other


# ----------------------------------------------------------------------------------------------------------- the stage
def config_of(run: Path) -> rejection.Config:
    return rejection.Config(
        run=run,
        prompts=str(run / "prompts.jsonl"),
        candidates=4,
        max_new_tokens=tiny.LONGEST,
        temperature=0.8,
        micro_batch_tokens=100,
        seed=tiny.SEED,
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("rejection") / "run", "sft", "reward")
    assert rejection.main(config_of(run)) == run / "rejection" / "best.jsonl"
    return run


def test_the_winners_are_the_best_of_what_the_policy_answers(run: Path) -> None:
    """Each candidate sampled alone, scored alone by the reward model on the ids that were sampled."""
    policy, reward = GPT.from_pretrained(run / "sft" / "model"), RewardModel.from_pretrained(run / "reward" / "model")
    files = [run / "rejection" / f"{name}.jsonl" for name in ("best", "random")]
    best, control = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    expected, candidates = [], {}
    for i, prompt in enumerate(tiny.PROMPTS[:10]):
        ids = encode_prompt(tiny.ENCODING, prompt)
        scored = []
        for k in range(4):
            sample = rejection.generate(
                policy,
                [ids],
                max_new_tokens=tiny.LONGEST,
                eos_id=tiny.EOS,
                temperature=0.8,
                seed=tiny.SEED,
                keys=[(Stream.REJECTION, i, k)],
            )
            text = rejection.response_text(tiny.ENCODING, sample.response_ids()[0])
            with torch.no_grad():
                score = reward(sample.tokens, sample.lengths).item()
            scored += [(score, text)] if sample.finished[0] and text.strip() else []
        candidates[prompt] = scored
        expected += [(prompt, max(scored)[1], pytest.approx(max(scored)[0], abs=1e-4))] if scored else []
    assert [(r["prompt"], r["response"], r["score"]) for r in best] == expected
    assert 0 < len(best) and [r["prompt"] for r in control] == [r["prompt"] for r in best]
    for record in control:
        assert record["response"] in {text for _, text in candidates[record["prompt"]]}
    assert any(a["response"] != b["response"] for a, b in zip(best, control, strict=True))
    assert {r["choice"] for r in best} == {"best"} and {r["choice"] for r in control} == {"random"}
    (row,) = read_rows(run / "rejection")
    assert row["score_best"] == pytest.approx(np.mean([r["score"] for r in best]), abs=1e-6)
    assert row["score_random"] < row["score_best"]
    assert row["prompts"] + row["prompts_without_a_finished_answer"] == 10


def test_sft_learns_the_winners(run: Path, tmp_path: Path) -> None:
    config = replace(tiny.sft_config(tmp_path), model=str(run / "sft" / "model"), batch_size=4, validation_share=0.2)
    train_sft.main(replace(config, train=str(run / "rejection" / "best.jsonl"), validation=None))
    rows = read_rows(tmp_path / "sft")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_function_may_be_the_reward_and_a_finished_stage_is_left_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short_answers.py").write_text("def f(prompts, responses):\n    return [-len(r) for r in responses]\n")
    alone = tiny.copy_of(run, tmp_path / "alone", "sft")  # no reward model there
    config = replace(config_of(alone), reward=("short_answers:f",))
    best = data.load(rejection.main(config), "demonstrations")
    assert all(r["score"] == -len(r["response"]) for r in best)
    before = {p: p.stat().st_mtime_ns for p in (alone / "rejection").iterdir()}
    rejection.main(replace(config, resume=True))
    assert "rejection: is finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (alone / "rejection").iterdir()}


def test_an_ensemble_scores_and_columns_are_named(run: Path, tmp_path: Path) -> None:
    """The second member gives each answer two less, which the mean shows as one less and the worst as two."""
    lower = RewardModel.from_pretrained(run / "reward" / "model")
    lower.normalise(2.0, 1.0)
    lower.save_pretrained(tmp_path / "lower")
    tokenizer.save(tiny.ENCODING, tmp_path / "lower")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"query": prompt}) + "\n" for prompt in tiny.PROMPTS[:10]), encoding="utf-8")
    both = replace(config_of(run), ensemble=(str(tmp_path / "lower"),), prompts=str(asked), columns=("prompt=query",))
    alone, scores = read_rows(run / "rejection")[0]["score"], {}
    for aggregate in ("mean", "worst"):
        rejection.main(replace(both, stage=aggregate, aggregate=aggregate))
        scores[aggregate] = read_rows(run / aggregate)[0]["score"]
    assert scores == {"mean": pytest.approx(alone - 1, abs=1e-5), "worst": pytest.approx(alone - 2, abs=1e-5)}


def test_the_table(run: Path) -> None:
    scores = np.array([[0.0, 1.0, 2.0, 3.0, 4.0]])
    rows = [line.split() for line in rejection.table(scores).splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "4", "5"]
    # The best of 2 of 0..4: pairs with maximum m number m, so (1 + 4 + 9 + 16) / 10; log 2 - 1/2 = 0.19.
    assert rows[1] == ["2", "3.000", "0.19"] and rows[3][1] == "4.000"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"candidates": 1}, "--candidates 1: must be at least 2"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"max_new_tokens": 600}, "leaves no room for a prompt"),
        ({"reward": ("gone:f",)}, "cannot import gone"),
        ({"stage": "sft"}, "--stage sft: must be a name"),
    ],
)
def test_mistakes(run: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rejection.main(replace(config_of(run), **({"stage": "other"} | changes)))

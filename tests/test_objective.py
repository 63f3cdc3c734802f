"""What a reward model is trained for: the losses of whole batches, by their definition, and the options that choose."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny import ENCODING

import train_reward
from minirlhf.batch import Example
from minirlhf.comparisons import (
    Comparison,
    PairBatch,
    best_against_rest,
    best_first,
    pair_micro_batches,
    pair_weights,
)
from minirlhf.encode import encode_comparison
from minirlhf.files import write_records
from minirlhf.reward import RewardModel
from minirlhf.runtime import UserError


def encode(ranks: list[int], *, ties: bool = False, **more: object) -> Comparison | None:
    record = {"prompt": "p", "responses": [f" {i}" for i in range(len(ranks))], "ranks": ranks, **more}
    return encode_comparison(ENCODING, record, max_length=90, ties=ties)


class Given(torch.nn.Module):
    """A reward model that gives these scores, whatever it reads."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(scores)


def loss_of(
    patch: pytest.MonkeyPatch,
    comparisons: list[Comparison],
    scores: torch.Tensor,
    *,
    contrast: float = 0.0,
    max_tokens: int = 10_000,
    **settings: object,
) -> tuple[float, torch.Tensor]:
    """The loss of `train_reward.train_step` on these comparisons and scores, and its gradient."""
    counts = [len(c.examples) for c in comparisons]
    places = {id(c): part for c, part in zip(comparisons, torch.arange(len(scores)).split(counts), strict=True)}
    model, order = Given(scores), iter(())

    def micro_batches(batch: list[Comparison], limit: int) -> Iterator[tuple[list[Comparison], PairBatch]]:
        nonlocal order
        parts = list(pair_micro_batches(batch, limit))
        order = iter([torch.cat([places[id(c)] for c in members]) for members, _ in parts])
        yield from parts

    patch.setattr(train_reward.comparisons, "pair_micro_batches", micro_batches)
    patch.setattr(train_reward, "response_scores", lambda model, _: model.scores[next(order)])
    config = train_reward.Config(**settings, max_grad_norm=1e9)
    state = train_reward.State(model, torch.optim.SGD(model.parameters(), lr=0.0))
    metrics = train_reward.train_step(
        state, comparisons, config, torch.device("cpu"), max_tokens=max_tokens, contrast=contrast
    )
    return metrics["loss"].item(), model.scores.grad


def scores_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loses(a: float, b: float) -> float:
    """-log sigmoid(a - b)."""
    return math.log1p(math.exp(b - a))


# ------------------------------------------------------------------------------------------------------ ties as records
def test_a_tie_is_two_pairs_of_half_weight() -> None:
    found = encode([0, 1, 1], ties=True)
    assert dict(zip(found.pairs, found.weights, strict=True)) == {(0, 1): 1, (0, 2): 1, (1, 2): 0.5, (2, 1): 0.5}
    assert encode([0, 1, 1]).pairs == [(0, 1), (0, 2)] and encode([0, 1, 1]).pair_weights == [1.0, 1.0]


def test_a_skip_is_no_tie_and_a_tie_alone_is_something() -> None:
    assert encode([0, 0], ties=True).pairs == [(0, 1), (1, 0)] and encode([0, 0]) is None
    assert encode([0, 0], ties=True, verdict="skip") is None
    assert encode([0, 0], ties=True, verdict="bad") is not None
    assert encode([0, 0], ties=True, response_ids=[[5], [5]]) is None, "the same ids are not a comparison"


def test_the_best_against_the_rest() -> None:
    best = best_against_rest(encode([1, 0, 2]))
    assert best.pairs == [(1, 0), (1, 2)]
    two = best_against_rest(encode([0, 1, 0], ties=True))
    assert set(zip(two.pairs, two.weights, strict=True)) == {((0, 1), 1), ((2, 1), 1), ((0, 2), 0.5), ((2, 0), 0.5)}


def test_a_strict_order_keeps_the_first_of_equals() -> None:
    assert best_first(encode([2, 0, 3, 1])) == [1, 3, 0, 2]
    assert best_first(encode([1, 0, 1, 2])) == best_first(encode([1, 0, 1, 2], ties=True)) == [1, 0, 3]


# --------------------------------------------------------------------------------------------------------------- losses
def test_pairs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons, scores = [encode([0, 1, 2]), encode([1, 0])], scores_of(1.0, 0.5, -1.0, 0.2, 0.3)
    four = [loses(1.0, 0.5), loses(1.0, -1.0), loses(0.5, -1.0), loses(0.3, 0.2)]
    assert loss_of(monkeypatch, comparisons, scores)[0] == pytest.approx(sum(four) / 4)
    best = [four[0], four[1], four[3]]
    comparisons = [best_against_rest(c) for c in comparisons]
    assert loss_of(monkeypatch, comparisons, scores)[0] == pytest.approx(sum(best) / 3)


def test_ties_that_count_half_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons, scores = [encode([0, 1, 1], ties=True)], scores_of(1.0, 0.5, -1.0)
    tie = 0.5 * loses(0.5, -1.0) + 0.5 * loses(-1.0, 0.5)
    expected = (loses(1.0, 0.5) + loses(1.0, -1.0) + tie) / 3
    assert loss_of(monkeypatch, comparisons, scores, ties="half")[0] == pytest.approx(expected)


def test_davidson_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons, scores, nu = [encode([0, 1, 1], ties=True)], scores_of(1.0, 0.5, -1.0), 0.7

    def probability(a: float, b: float, what: str) -> float:
        first, second, tie = math.exp(a), math.exp(b), nu * math.exp((a + b) / 2)
        return {"first": first, "tie": tie}[what] / (first + second + tie)

    likelihood = probability(1.0, 0.5, "first") * probability(1.0, -1.0, "first") * probability(0.5, -1.0, "tie")
    found = loss_of(monkeypatch, comparisons, scores, ties="davidson", davidson_nu=nu)[0]
    assert found == pytest.approx(-math.log(likelihood) / 3)
    for one in (encode([0, 1]), encode([0, 0], ties=True)):
        equal = loss_of(monkeypatch, [one], scores_of(0.0, 0.0), ties="davidson")[0]
        assert equal == pytest.approx(math.log(3))


def test_plackett_luce_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rankings of three and one of two: P(order) by choosing one after the other; a tie leaves the first alone."""
    comparisons = [encode([0, 1, 2]), encode([1, 0]), encode([2, 1, 0]), encode([0, 1, 1])]
    values = [(1.0, 0.5, -1.0), (0.2, 0.3), (0.0, 2.0, 1.0), (0.4, 0.1, 9.0)]
    orders = [(0, 1, 2), (1, 0), (2, 1, 0), (0, 1)]
    total = 0.0
    for own, order in zip(values, orders, strict=True):
        for n, best in enumerate(order[:-1]):
            total -= math.log(math.exp(own[best]) / sum(math.exp(own[i]) for i in order[n:]))
    scores = scores_of(*itertools.chain(*values))
    found = loss_of(monkeypatch, comparisons, scores, objective="plackett-luce")[0]
    assert found == pytest.approx(total / 4)


OBJECTIVES = [
    {},
    {"objective": "best-against-rest"},
    {"objective": "plackett-luce"},
    {"ties": "half"},
    {"ties": "davidson", "davidson_nu": 0.5},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_parts_of_a_batch_add_up(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comparison a micro-batch or all at once: the same loss and the same gradient."""
    rankings = [encode(r, ties="ties" in settings) for r in ([0, 1, 2], [1, 0], [0, 0, 1, 2], [2, 0, 1])]
    if settings.get("objective") == "best-against-rest":
        rankings = [best_against_rest(c) for c in rankings]
    scores = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (one, gradient), (whole, expected) = (
        loss_of(monkeypatch, rankings, scores, max_tokens=limit, **settings) for limit in (1, 10_000)
    )
    assert one == pytest.approx(whole, rel=1e-12) and expected.abs().max() > 0.01
    torch.testing.assert_close(gradient, expected)


def test_a_pairs_own_weight_and_its_contrast_multiply() -> None:
    examples = [Example([0], [1, 2, 3, 9]), Example([0], [1, 5, 6, 9])]  # two tokens differ
    comparison = Comparison(examples, [(0, 1), (1, 0)], weights=[1.0, 0.5])
    assert pair_weights([comparison], 2.0).tolist() == [0.25, 0.125]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"objective": "plackett-luce", "ties": "half"}, "--ties half: Plackett-Luce has no place for ties"),
        ({"objective": "plackett-luce", "contrast": 1.0}, "--objective plackett-luce: has no weights of pairs; use it"),
        ({"ties": "davidson", "contrast": 1.0}, "--ties davidson: has no weights of pairs"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_reward.check_settings(train_reward.Config(**{"contrast": 0.0, **settings}))


# ----------------------------------------------------------------------------------------------------------- the script
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "plackett-luce"},
        {"objective": "best-against-rest"},
        {"ties": "half"},
        {"ties": "davidson", "davidson_nu": 0.5},
    ],
    ids=str,
)
def test_the_script_trains_with_every_objective(settings: dict, tmp_path: Path, monkeypatch) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "feedback")
    rows = [json.loads(line) for line in (run / "feedback" / "rankings.jsonl").read_text().splitlines()]
    rows[0]["ranks"] = [0, 0, 1][: len(rows[0]["ranks"])]  # a tie
    write_records(run / "rankings.jsonl", rows)
    calls = tiny.spy(monkeypatch, train_reward, "train_step")
    config = replace(tiny.reward_config(run), comparisons=str(run / "rankings.jsonl"), contrast=0.0, epochs=1.0)
    RewardModel.from_pretrained(train_reward.main(replace(config, **settings)))
    halves = [w for call in calls for c in call.arguments["batch"] for w in c.weights if w == 0.5]
    assert bool(halves) == ("ties" in settings)


# ----------------------------------------------------------------------------------------------------------- early stop
def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "reward" / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]


def test_training_stops_early_and_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "feedback")
    config = replace(tiny.reward_config(run), epochs=30.0, learning_rate=5e-2, patience=2, validation_every=2)
    seen: dict[int, dict] = {}
    keep_best = train_reward.keep_best

    def noted(state: train_reward.State, loss: float) -> None:
        seen[state.step] = tiny.weights(state.model)
        keep_best(state, loss)

    kept = tiny.spy(monkeypatch, train_reward, "reference_scores", before=lambda a: tiny.weights(a["model"]))
    monkeypatch.setattr(train_reward, "keep_best", noted)
    train_reward.main(config)
    found = losses(run)
    best = min(found, key=lambda row: row[1])
    assert [step + 1 for step, _ in found] == [2 * n for n in range(1, len(found) + 1)]
    assert found.index(best) == len(found) - 3, "two measurements after the best one it stops"
    assert found[-1][0] + 1 < 30 * 3
    assert tiny.equal(kept[0].before, seen[best[0] + 1]) and not tiny.equal(kept[0].before, seen[found[-1][0] + 1])


def test_an_early_stop_is_the_same_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two measurements and resumed, it stops at the same step with the same weights."""
    settings = {"epochs": 30.0, "learning_rate": 5e-2, "patience": 2, "validation_every": 2, "checkpoint_every": 1}
    whole, killed = (tiny.copy_of(tiny.finished_run(), tmp_path / n, "sft", "feedback") for n in ("whole", "killed"))
    first = train_reward.main(replace(tiny.reward_config(whole), **settings))
    train_step, count = train_reward.train_step, itertools.count(1)

    def dying(*args, **more):
        if next(count) == 4:
            raise KeyboardInterrupt
        return train_step(*args, **more)

    monkeypatch.setattr(train_reward, "train_step", dying)
    config = replace(tiny.reward_config(killed), **settings)
    with pytest.raises(KeyboardInterrupt):
        train_reward.main(config)
    monkeypatch.setattr(train_reward, "train_step", train_step)
    second = train_reward.main(replace(config, resume=True))
    assert losses(killed) == losses(whole)
    assert tiny.equal(
        tiny.weights(RewardModel.from_pretrained(first)), tiny.weights(RewardModel.from_pretrained(second))
    )


def test_patience_needs_measurements(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "feedback")
    with pytest.raises(UserError, match="--patience: say with --validation-every how often"):
        train_reward.main(replace(tiny.reward_config(run), patience=2))

"""The parts of the studies on real data that can be wrong without a figure looking wrong: folds, linear baseline."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))
import folds
import linear
import paired
import reward_recipe

from minirlhf.batch import Example
from minirlhf.comparisons import Comparison


def record(turn: str, number: int) -> dict[str, str]:
    return {
        "prompt": f"\n\nHuman: {turn}\n\nAssistant: reply {number}\n\nHuman: more\n\nAssistant:",
        "chosen": " a",
        "rejected": " b",
    }


def test_pairs_that_begin_with_the_same_turn_are_in_one_fold():
    records = [record(f"question {i % 23}", i) for i in range(60)]
    turns = [folds.first_turn(r) for r in records]
    assert len(set(turns)) == 23
    found = folds.fold_of(turns, 5, seed=0)
    assert found.keys() == set(turns)
    assert sorted(Counter(found.values()).items()) == [(0, 5), (1, 5), (2, 5), (3, 4), (4, 4)]


def test_folds_depend_on_the_seed_and_not_on_the_order_of_the_pairs():
    turns = [f"question {i}" for i in range(30)]
    assert folds.fold_of(turns, 5, seed=0) == folds.fold_of(turns[::-1] * 2, 5, seed=0)
    assert folds.fold_of(turns, 5, seed=0) != folds.fold_of(turns, 5, seed=1)


def test_an_interval_counts_pairs_of_one_turn_as_one_observation():
    # 20 turns with ten equal outcomes each: half right, so the deviation of the mean is sqrt(1/4 / 20) = 0.112.
    values = torch.arange(20).remainder(2).repeat_interleave(10).double().numpy()
    turns = torch.arange(20).repeat_interleave(10).tolist()
    low, high = paired.estimate(values, turns, seed=0)["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.112, abs=0.05)  # steps of the bootstrap's mean are 0.05 wide
    assert paired.estimate(values, turns, seed=0)["mean"] == 0.5


PAIRS = [(" the cat sat here", " the dog sat there"), (" sat the cat", " cat cat the dog")]


def test_features_are_counts_of_words_and_bigrams():
    found = linear.differences(PAIRS[1:], "counts", lower=True).to_dense()[0]
    # sat 1, cat 1-2, the 0, dog -1; bigrams: <s> sat, sat the, the cat, cat </s> against
    # <s> cat, cat cat, cat the, the dog, dog </s>
    assert sorted(found.tolist()) == [-1.0] * 7 + [0.0] + [1.0] * 5


@pytest.mark.parametrize("transform", linear.TRANSFORMS)
def test_a_fit_on_coordinates_gives_the_margins_of_a_fit_on_features(transform):
    features = linear.differences(PAIRS, transform, lower=True)
    z = linear.coordinates(features)
    of_features, of_coordinates = (x @ linear.fit(x, 0.5) for x in (features.to_dense(), z))
    torch.testing.assert_close(of_coordinates, of_features, atol=1e-4, rtol=1e-4)  # where L-BFGS stops, not rounding


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings to choose from, where what is tested does not depend on which."""
    monkeypatch.setattr(linear, "PENALTIES", (10.0, 1.0))
    monkeypatch.setattr(linear, "TRANSFORMS", {"binary": linear.TRANSFORMS["binary"]})


@pytest.mark.usefixtures("few_settings")
def test_the_linear_model_finds_a_planted_word_on_pairs_it_never_saw():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, (90, 2, 6), generator=generator).tolist()
    pairs = [tuple(" ".join(f"w{w}" for w in side) for side in pair) for pair in words]
    pairs = [(f"{chosen} kindly", f"{rejected} bah") for chosen, rejected in pairs]
    outer, inner = torch.arange(90) % 3, torch.arange(90) // 3 % linear.INNER_FOLDS
    margins, settings = linear.cross_validate(pairs, outer, inner)
    assert (margins > 0).all() and len(settings) == 3
    swapped, _ = linear.cross_validate([pair[::-1] for pair in pairs], outer, inner)
    torch.testing.assert_close(swapped, margins, atol=1e-3, rtol=1e-3)  # the labels turn round with the pairs


@pytest.mark.usefixtures("few_settings")
def test_noise_is_not_learnt_across_folds():
    """Labels that depend on nothing: a leak of held-out labels would give more than chance."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(30, (200, 2, 8), generator=generator).tolist()
    pairs = [tuple(" ".join(f"w{w}" for w in side) for side in pair) for pair in words]
    outer, inner = torch.arange(200) % 3, torch.arange(200) // 3 % linear.INNER_FOLDS
    margins, _ = linear.cross_validate(pairs, outer, inner)
    assert 0.35 < paired.right(margins).mean() < 0.65  # 4.2 standard deviations of chance on 200 pairs


def test_dropped_tokens_leave_prompt_and_eos():
    example = Example([1, 2], [*range(3, 103), 7])
    pair = Comparison([example, example], [(0, 1)])
    thin = reward_recipe.drop_tokens(pair, 0.25, random.Random(0))
    for e in thin.examples:
        assert e.prompt_ids == [1, 2] and e.response_ids[-1] == 7 and 60 < len(e.response_ids) < 92
    assert reward_recipe.drop_tokens(pair, 0.0, random.Random(0)).examples == pair.examples

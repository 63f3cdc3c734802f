"""Reward model against judge: by hand, against plain definitions, and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.evaluate.statistics import against_judge, agreeing_pairs, correlation, resampled

REWARDS = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]])
MARKS = np.array([[1.0, -1.0, -1.0], [0.5, 0.0, 0.0]])
cells = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=12, max_size=12)


def test_pairs_by_hand() -> None:
    agreed, pairs = agreeing_pairs(REWARDS, MARKS)
    # The first prompt: 3 above 1 and above 2, rightly; the judge does not tell the others apart.
    # The second: 0 beside 0 is half right, 0 below 5 is wrong.
    assert agreed.tolist() == [2.0, 0.5] and pairs.tolist() == [2, 2]
    found = against_judge(REWARDS, MARKS, seed=0)["reward_agreement"]
    assert (found["mean"], found["pairs"]) == (2.5 / 4, 4)
    assert found["interval"] == (0.25, 1.0)  # both draws of one prompt alone have probability 1/4
    assert against_judge(REWARDS[:, :1], MARKS[:, :1], seed=0)["reward_agreement"] is None


@given(cells)
def test_both_figures_by_their_definitions(values: list[tuple[int, int]]) -> None:
    rewards, marks = (np.array([value[i] for value in values], dtype=float).reshape(4, 3) for i in (0, 1))
    agreed = pairs = 0.0
    for r, m in zip(rewards, marks, strict=True):
        for i in range(3):
            for j in range(i):
                if m[i] != m[j]:
                    pairs += 1
                    agreed += 0.5 if r[i] == r[j] else float((r[i] > r[j]) == (m[i] > m[j]))
    found = agreeing_pairs(rewards, marks)
    assert (found[0].sum(), found[1].sum()) == (agreed, pairs)
    back = agreeing_pairs(-rewards, marks)  # a proxy turned round agrees on the others
    assert (back[0] + found[0]).tolist() == found[1].tolist() == back[1].tolist()
    if rewards.std() > 0 and marks.std() > 0:
        assert correlation(rewards, marks) == pytest.approx(
            np.corrcoef(rewards.ravel(), marks.ravel())[0, 1], abs=1e-12
        )
        assert correlation(3 * rewards + 1, marks) == pytest.approx(correlation(rewards, marks), abs=1e-12)
    else:
        assert math.isnan(correlation(rewards, marks))


def test_a_draw_counts_pairs_and_not_prompts() -> None:
    """Prompts have 0 to 6 pairs that the judge tells apart; each draw's share is of all pairs drawn."""
    generator = np.random.default_rng(1)
    marks = generator.integers(3, size=(12, 4)).astype(float) * (generator.random((12, 1)) < 0.8)
    rewards = marks + generator.normal(size=(12, 4)) * np.arange(12)[:, None]
    agreed, pairs = (found.tolist() for found in agreeing_pairs(rewards, marks))
    assert min(pairs) == 0 and len(set(pairs)) > 2
    draws = resampled(12, seed=4).tolist()
    shares = [sum(agreed[i] for i in draw) / sum(pairs[i] for i in draw) for draw in draws]
    found = against_judge(rewards, marks, seed=4)["reward_agreement"]
    assert found["interval"] == pytest.approx(tuple(np.percentile(shares, [2.5, 97.5])))


def test_intervals_are_over_prompts_and_nothing_is_made_up() -> None:
    generator = np.random.default_rng(0)
    marks = generator.normal(size=(50, 1)).repeat(8, axis=1)
    rewards = marks + generator.normal(size=(50, 1))  # eight times the same answer: as sure as of one
    wide = against_judge(rewards, marks, seed=0)["reward_correlation"]
    one = against_judge(rewards[:, :1], marks[:, :1], seed=0)["reward_correlation"]
    assert wide["interval"] == pytest.approx(one["interval"]) and wide["mean"] == pytest.approx(one["mean"])
    low, high = wide["interval"]
    assert low + 0.05 < wide["mean"] < high - 0.05
    assert against_judge(rewards, np.ones((50, 8)), seed=0) == {"reward_correlation": None, "reward_agreement": None}

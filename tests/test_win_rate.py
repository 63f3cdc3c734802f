"""Win rates at equal length, judges that see both answers, and intervals over prompts: against slow definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.evaluate.statistics import bootstrap_interval, estimate, interval_of, resampled
from minirlhf.evaluate.win_rate import RIDGE, length_controlled, presentations, verdicts, wins


# ----------------------------------------------------------------------------------------------------------- intervals
def test_the_interval_of_a_mean_is_that_of_any_statistic_of_prompts() -> None:
    values = np.random.default_rng(1).normal(size=40)
    found = interval_of(lambda index: values[index].mean(), 40, seed=3)
    assert found == pytest.approx(bootstrap_interval(values, seed=3), rel=1e-12)
    index = resampled(40, seed=3)
    assert index.shape == (2000, 40) and index.min() == 0 and index.max() == 39


def test_a_prompts_answers_are_drawn_together() -> None:
    """K copies of each answer hold no more information than one: the interval must not shrink with K."""
    one = np.random.default_rng(2).normal(size=(30, 1))
    found = estimate(np.repeat(one, 16, axis=1), seed=0)
    assert found["mean"] == pytest.approx(one.mean())
    assert found["interval"] == pytest.approx(bootstrap_interval(one[:, 0], seed=0))


def test_draws_without_the_statistic_are_left_out() -> None:
    def first(index: np.ndarray) -> float:
        return math.nan if index[0] == 0 else float(index[0])

    assert interval_of(first, 3, seed=0) == (1.0, 2.0)
    assert interval_of(lambda index: math.nan, 3, seed=0) is None


# ------------------------------------------------------------------------------------------------------ equal length
def bisect(rising, low: float, high: float) -> float:
    """Where a rising function is 0."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def slow_length_controlled(outcomes: list[float], differences: list[float], ridge: float) -> float:
    """The two conditions of the minimum, one inside the other, solved by bisection row by row."""
    count = len(outcomes)
    mean = sum(differences) / count
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / count)
    xs = [math.tanh(d / spread) for d in differences]

    def residuals(theta: float, phi: float) -> list[float]:
        return [1 / (1 + math.exp(-theta - phi * x)) - y for x, y in zip(xs, outcomes, strict=True)]

    def theta_of(phi: float) -> float:
        return bisect(lambda theta: sum(residuals(theta, phi)), -60, 60)

    def slope(phi: float) -> float:
        return sum(r * x for r, x in zip(residuals(theta_of(phi), phi), xs, strict=True)) + ridge * phi

    return 1 / (1 + math.exp(-theta_of(bisect(slope, -50, 50))))


rows = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-6, 9)), min_size=3, max_size=12)


@settings(max_examples=30)
@given(rows)
def test_it_is_the_minimum_of_the_penalised_loss(pairs: list[tuple[float, int]]) -> None:
    outcomes, differences = ([pair[i] for pair in pairs] for i in (0, 1))
    found = length_controlled(np.array(outcomes), np.array(differences))
    share = sum(outcomes) / len(outcomes)
    if len(set(differences)) == 1 or share in (0, 1):
        assert found == share
    else:
        # Newton stops at a gradient of 1e-9 a row; where the loss is flat theta is known less well than that.
        assert found == pytest.approx(slow_length_controlled(outcomes, differences, RIDGE), abs=1e-6)


@given(rows)
def test_two_models_that_change_places(pairs: list[tuple[float, int]]) -> None:
    outcomes, differences = (np.array([pair[i] for pair in pairs], dtype=float) for i in (0, 1))
    back = length_controlled(1 - outcomes, -differences)
    assert length_controlled(outcomes, differences) == pytest.approx(1 - back, abs=1e-6)
    order = np.random.default_rng(len(pairs)).permutation(len(pairs))
    again = length_controlled(outcomes[order], differences[order])
    assert again == pytest.approx(length_controlled(outcomes, differences), abs=1e-6)


def test_a_model_that_wins_by_its_length_alone_is_no_better() -> None:
    """Outcomes that are a function of the difference in length and nothing else; the model is mostly longer."""
    differences = np.random.default_rng(0).integers(-4, 15, size=(200, 3)).astype(float)
    outcomes = 1 / (1 + np.exp(-1.7 * np.tanh(differences / differences.std())))
    assert outcomes.mean() > 0.65
    assert length_controlled(outcomes, differences, ridge=1e-9) == pytest.approx(0.5, abs=1e-6)
    assert length_controlled(outcomes, differences) == pytest.approx(0.5, abs=2e-3)  # what the ridge costs
    # Length decides without exception: the ridge alone keeps its coefficient finite.
    both_ways = np.concatenate([np.abs(differences) + 1, -np.abs(differences) - 1])
    assert length_controlled((both_ways > 0) * 1.0, both_ways) == pytest.approx(0.5, abs=1e-9)


def test_a_model_that_is_better_at_every_length_stays_better() -> None:
    """theta = 1 and phi = 2 are found again, where the model is shorter and its win rate therefore too low."""
    differences = np.random.default_rng(0).integers(-15, 4, size=600).astype(float)
    x = np.tanh(differences / differences.std())
    outcomes = 1 / (1 + np.exp(-1 - 2 * x))
    assert outcomes.mean() < 0.5
    assert length_controlled(outcomes, differences, ridge=1e-9) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)


def test_without_differences_in_length_it_is_the_win_rate() -> None:
    outcomes = np.array([[1.0, 0.5], [0.0, 1.0]])
    for differences in (np.zeros((2, 2)), np.full((2, 2), 7)):
        assert length_controlled(outcomes, differences) == outcomes.mean()
    assert length_controlled(np.ones(5), np.arange(5)) == 1.0
    assert length_controlled(np.zeros(5), np.arange(5)) == 0.0
    assert length_controlled(np.full(5, 0.5), np.arange(5)) == 0.5
    # Differences that say nothing about the outcome change nothing: each length with one win of two.
    assert length_controlled(np.array([1.0, 0, 1, 0]), np.array([3, 3, -2, -2])) == pytest.approx(0.5, abs=1e-12)


# ----------------------------------------------------------------------------------------- judges that see both answers
def ask(quality: dict[str, float], mine: list[str], theirs: list[str], liking: float, *, random: bool, seed: int = 0):
    """The verdicts of a judge with a liking for the place that is shown first."""
    equal = [a == b for a, b in zip(mine, theirs, strict=True)]
    questions = presentations(equal, random=random, seed=seed)
    preferred = []
    for pair, mine_first in questions:
        first, second = (mine[pair], theirs[pair]) if mine_first else (theirs[pair], mine[pair])
        preferred.append(1 / (1 + math.exp(quality[second] - quality[first] - liking)))
    return verdicts(questions, preferred, len(equal))


QUALITY = {"a": 0.0, "b": 1.0, "c": 3.0}
MINE, THEIRS = list("abcabcabc"), list("aaabbbccc")


def test_without_a_liking_for_a_place_the_order_makes_no_difference() -> None:
    expected = [wins(np.float64(QUALITY[a]), QUALITY[b]) for a, b in zip(MINE, THEIRS, strict=True)]
    for random in (False, True):
        said = ask(QUALITY, MINE, THEIRS, 0.0, random=random)
        assert said.outcomes.tolist() == expected
    assert ask(QUALITY, MINE, THEIRS, 0.0, random=False).first_preferred == 0.5
    assert ask(QUALITY, MINE, THEIRS, 0.0, random=False).contradictions == 0.0
    assert ask(QUALITY, MINE, THEIRS, 0.0, random=True).contradictions is None  # nothing was asked twice


def test_a_pair_on_which_the_place_decides_is_a_tie() -> None:
    said = ask(QUALITY, MINE, THEIRS, 1.5, random=False)
    # a and b differ by 1, less than the liking; c is 2 and 3 above them, which is more.
    assert said.outcomes.tolist() == [0.5, 0.5, 1, 0.5, 0.5, 1, 0, 0, 0.5]
    assert said.contradictions == 2 / 6  # of the six pairs of different texts
    assert said.first_preferred == (4 + 4) / 12  # 2 pairs twice, 4 pairs once, of 12 questions
    swapped = ask(QUALITY, THEIRS, MINE, 1.5, random=False)
    np.testing.assert_array_equal(swapped.outcomes, 1 - said.outcomes)


def test_a_judge_that_knows_the_place_alone_sees_no_winner() -> None:
    count = 400
    mine, theirs = ["c"] * count, ["a"] * count
    assert ask(QUALITY, mine, theirs, 9.0, random=False).outcomes.tolist() == [0.5] * count
    said = ask(QUALITY, mine, theirs, 9.0, random=True)
    assert said.first_preferred == 1.0 and set(said.outcomes.tolist()) == {0.0, 1.0}
    assert abs(said.outcomes.mean() - 0.5) < 4 * 0.5 / math.sqrt(count)  # four standard errors of a fair coin
    assert ask(QUALITY, mine, theirs, 9.0, random=True, seed=1).outcomes.tolist() != said.outcomes.tolist()


def test_equal_texts_are_ties_without_a_question() -> None:
    assert presentations([True, False, True], random=False, seed=0) == [(1, True), (1, False)]
    assert len(presentations([True, False, False], random=True, seed=0)) == 2
    said = ask(QUALITY, MINE, MINE, 2.0, random=True)
    assert said.outcomes.tolist() == [0.5] * 9
    assert said.first_preferred is None and said.contradictions is None
    # The draw for a pair does not depend on which other pairs are equal.
    everyone = presentations([False] * 9, random=True, seed=5)
    assert set(presentations([False, True, True] * 3, random=True, seed=5)) == set(everyone[::3])


def test_an_undecided_judge_ties() -> None:
    said = verdicts([(0, True), (0, False), (1, True), (1, False)], [0.5, 0.5, 0.5, 0.2], 2)
    assert said.outcomes.tolist() == [0.5, 0.75]
    assert said.contradictions == 0.0  # undecided once is no contradiction

"""Win rates at equal length, judges that see both answers, and intervals over prompts: against slow definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.evaluate import judges
from minirlhf.evaluate.judges import Answers
from minirlhf.evaluate.statistics import (
    RIDGE,
    bootstrap_interval,
    estimate,
    estimate_of,
    length_controlled,
    resampled,
    wins,
)


# ----------------------------------------------------------------------------------------------------------- intervals
def test_the_interval_of_a_mean_is_that_of_any_statistic_of_prompts() -> None:
    values = np.random.default_rng(1).normal(size=40)
    found = estimate_of(lambda index: values[index].mean(), 40, seed=3)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert found["interval"] == pytest.approx(bootstrap_interval(values, seed=3), rel=1e-12)
    index = resampled(40, seed=3)
    assert index.shape == (2000, 40) and index.min() == 0 and index.max() == 39


def test_a_prompts_answers_are_drawn_together() -> None:
    """K copies of each answer hold no more information than one: the interval must not shrink with K."""
    one = np.random.default_rng(2).normal(size=(30, 1))
    found = estimate(np.repeat(one, 16, axis=1), seed=0)
    assert found["mean"] == pytest.approx(one.mean())
    assert found["interval"] == pytest.approx(bootstrap_interval(one[:, 0], seed=0))


def test_draws_without_the_statistic_are_left_out() -> None:
    def last(index: np.ndarray) -> float:
        return math.nan if index[-1] == 0 else float(index[-1])

    assert estimate_of(last, 3, seed=0) == {"mean": 2.0, "interval": (1.0, 2.0)}
    assert estimate_of(lambda index: math.nan, 3, seed=0) is None


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
QUALITY = {"a": 0.0, "b": 1.0, "c": 3.0}
MINE, THEIRS = list("abcabcabc"), list("aaabbbccc")


class Liking:
    """A judge with a liking for the answer that is shown first; it remembers what it was asked."""

    def __init__(self, liking: float) -> None:
        self.liking = liking

    def preferred(self, questions: list[tuple[str, str, str]]) -> list[float]:
        self.asked = questions
        return [1 / (1 + math.exp(QUALITY[b] - QUALITY[a] - self.liking)) for _, a, b in questions]


def ask(judge: object, mine: list[str], theirs: list[str], *, random: bool, seed: int = 0) -> tuple[list[float], dict]:
    """Outcomes and habits."""
    prompts = [str(number) for number in range(len(mine))]
    sides = (Answers(prompts, texts, None, None) for texts in (mine, theirs))
    outcomes, habits = judges.verdicts(judge, *sides, random=random, seed=seed)
    return outcomes.tolist(), habits


def test_without_a_liking_for_a_place_the_order_makes_no_difference() -> None:
    expected = [wins(np.float64(QUALITY[a]), QUALITY[b]) for a, b in zip(MINE, THEIRS, strict=True)]
    assert ask(Liking(0.0), MINE, THEIRS, random=False) == (expected, {"first_preferred": 0.5, "contradictions": 0.0})
    outcomes, habits = ask(Liking(0.0), MINE, THEIRS, random=True)
    assert outcomes == expected and habits["contradictions"] is None  # nothing was asked twice


def test_a_pair_on_which_the_place_decides_is_a_tie() -> None:
    outcomes, habits = ask(Liking(1.5), MINE, THEIRS, random=False)
    # a and b differ by 1, less than the liking; c is 2 and 3 above them, which is more.
    assert outcomes == [0.5, 0.5, 1, 0.5, 0.5, 1, 0, 0, 0.5]
    assert habits["contradictions"] == 2 / 6  # of the six pairs of different texts
    assert habits["first_preferred"] == (4 + 4) / 12  # 2 pairs twice, 4 pairs once, of 12 questions
    assert ask(Liking(1.5), THEIRS, MINE, random=False)[0] == [1 - outcome for outcome in outcomes]


def test_a_judge_that_knows_the_place_alone_sees_no_winner() -> None:
    count = 400
    mine, theirs = ["c"] * count, ["a"] * count
    assert ask(Liking(9.0), mine, theirs, random=False)[0] == [0.5] * count
    outcomes, habits = ask(Liking(9.0), mine, theirs, random=True)
    assert habits["first_preferred"] == 1.0 and set(outcomes) == {0.0, 1.0}
    assert abs(np.mean(outcomes) - 0.5) < 4 * 0.5 / math.sqrt(count)  # four standard errors of a fair coin
    assert ask(Liking(9.0), mine, theirs, random=True, seed=1)[0] != outcomes


def test_equal_texts_are_ties_without_a_question() -> None:
    judge = Liking(2.0)
    assert ask(judge, MINE, MINE, random=True) == ([0.5] * 9, {"first_preferred": None, "contradictions": None})
    assert judge.asked == []
    ask(judge, list("abc"), list("aac"), random=False)
    assert judge.asked == [("1", "b", "a"), ("1", "a", "b")]
    # The draw for a pair does not depend on which other pairs are equal.
    ask(judge, list("a" * 9), list("b" * 9), random=True, seed=5)
    everyone = set(judge.asked)
    ask(judge, list("a" * 9), list("baa" * 3), random=True, seed=5)
    assert [prompt for prompt, _, _ in judge.asked] == ["0", "3", "6"] and set(judge.asked) < everyone


def test_an_undecided_judge_ties() -> None:
    class Undecided:
        def preferred(self, questions: list) -> list[float]:
            return [0.5, 0.5, 0.5, 0.2]

    outcomes, habits = ask(Undecided(), ["a", "a"], ["b", "b"], random=False)
    assert outcomes == [0.5, 0.75]
    assert habits["contradictions"] == 0.0  # undecided once is no contradiction

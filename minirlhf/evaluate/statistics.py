"""Statistics of K answers to each of P prompts: who wins, intervals by bootstrap, and do reward model and judge agree?

Prompts are drawn with replacement, as many as there are, and a prompt's answers go along together: answers to one
prompt are alike, so that resampling them one by one would promise too narrow an interval. Efron and Tibshirani 1993,
chapter 13.
Trap: it says nothing about another training run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minirlhf.runtime import Stream

RESAMPLES = 2000
ENDS = (2.5, 97.5)
RIDGE = 0.1  # weak: of 500 prompts it moves the coefficient of length by less than a hundredth of itself


# ----------------------------------------------------------------------------------------------------------- intervals
def resampled(count: int, *, seed: int) -> np.ndarray:
    """(RESAMPLES, count) numbers of prompts, each row a draw of `count` prompts with replacement."""
    return np.random.default_rng((seed, Stream.EVALUATION)).integers(count, size=(RESAMPLES, count))


def bootstrap_interval(values: np.ndarray, *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (P,), resampling the P prompts with replacement."""
    low, high = np.percentile(values[resampled(len(values), seed=seed)].mean(axis=1), ENDS)
    return float(low), float(high)


def estimate(values: np.ndarray, *, seed: int) -> dict[str, Any]:
    """{"mean", "interval"} of values (P, K), K a prompt; the interval is over prompts."""
    by_prompt = values.astype(np.float64).mean(axis=1)
    return {"mean": float(by_prompt.mean()), "interval": bootstrap_interval(by_prompt, seed=seed)}


def estimate_of(statistic: Callable[[np.ndarray], float], count: int, *, seed: int) -> dict[str, Any] | None:
    """`estimate` of any statistic of prompts, `statistic(numbers of prompts)` -> a number; None where it is nan.

    The draws are those of `bootstrap_interval`. Draws for which the statistic does not exist (nan) are left out.
    """
    value = float(statistic(np.arange(count)))
    if math.isnan(value):
        return None
    draws = [statistic(index) for index in resampled(count, seed=seed)]
    return {"mean": value, "interval": tuple(np.nanpercentile(draws, ENDS).tolist())}


# ------------------------------------------------------------------------------------------------------------ who wins
def wins(scores: np.ndarray, other: np.ndarray | float) -> np.ndarray:
    """1 where `scores` is above `other`, 1/2 where equal, else 0; the mean is the win rate.

    Two models change places by outcome -> 1 - outcome, and every number here with it.
    """
    return (scores > other) + 0.5 * (scores == other)


def length_controlled(outcomes: np.ndarray, differences: np.ndarray, *, ridge: float = RIDGE) -> float:
    """The win rate at equal length, by logistic regression of the outcome on the model and the difference in length.

    P(win_i) = sigmoid(theta + phi x_i),   x_i = tanh(d_i / std(d)),   d_i tokens that the model's answer is longer by
    theta, phi = argmin - sum_i [y_i log P_i + (1 - y_i) log(1 - P_i)] + ridge / 2 phi^2
    win rate = sigmoid(theta), which is P at d = 0

    Dubois et al. 2024 (arXiv 2404.04475), equation 2 for a single model: theta stands for its theta_m - theta_b. Left
    out: the difficulty of each instruction, which they fit on many models together. `outcomes` y and `differences` of
    one shape, any. The ridge keeps phi finite where length alone decides; theta is free, so that with all d alike, or
    with nothing but wins, or losses, the result is the win rate itself. Newton's method in float64.
    Raises FloatingPointError where it does not converge. Trap: std is over these d, so a model that is always longer by
    the same number of tokens cannot be told from a better one.
    """
    y, d = outcomes.ravel().astype(np.float64), differences.ravel().astype(np.float64)
    share, spread = y.mean(), d.std()
    if spread == 0 or share in (0, 1):
        return float(share)
    design = np.stack([np.ones_like(y), np.tanh(d / spread)])  # (2, rows)
    penalty = np.array([0.0, ridge])

    def loss(beta: np.ndarray) -> float:
        z = beta @ design
        return (np.logaddexp(0, z) - y * z).sum() + 0.5 * (penalty * beta**2).sum()

    beta = np.array([math.log(share / (1 - share)), 0.0])
    here = loss(beta)
    for _ in range(100):
        p = 1 / (1 + np.exp(-beta @ design))
        gradient = design @ (p - y) + penalty * beta
        if np.abs(gradient).max() < 1e-9 * len(y):
            return float(1 / (1 + np.exp(-beta[0])))
        step = np.linalg.solve((design * (p * (1 - p))) @ design.T + np.diag(penalty), gradient)
        while (there := loss(beta - step)) > here + 1e-12 * len(y):  # a whole step may overshoot far from the minimum
            step /= 2
        beta, here = beta - step, there
    raise FloatingPointError("the length-controlled win rate did not converge")


# --------------------------------------------------------------------------------------- the reward model and the judge
def correlation(rewards: np.ndarray, marks: np.ndarray) -> float:
    """Pearson's correlation of all rewards with all marks, (P, K) each; nan where either does not vary.

    A reward model that only knows which prompts are easy has some, too.
    """
    x, y = (values.ravel() - values.mean() for values in (rewards, marks))
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else math.nan


def agreeing_pairs(rewards: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P,) pairs of answers to each prompt that both put in the same order, and (P,) pairs that the judge tells apart.

    Answers to the same prompt are what training reads. Equal rewards agree by half.
    """
    i, j = np.triu_indices(marks.shape[1], 1)
    gaps = marks[:, i] - marks[:, j]  # (P, pairs)
    apart = np.abs(gaps) > 1e-9
    agreed = apart * wins((rewards[:, i] - rewards[:, j]) * gaps, 0.0)
    return agreed.sum(axis=1), apart.sum(axis=1)


def against_judge(rewards: np.ndarray, marks: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Correlation and agreement, (P, K) each, with intervals over prompts; None where there is nothing to compare."""
    rewards, marks = rewards.astype(np.float64), marks.astype(np.float64)
    agreed, pairs = agreeing_pairs(rewards, marks)

    def share(index: np.ndarray) -> float:
        return agreed[index].sum() / pairs[index].sum() if pairs[index].any() else math.nan

    def together(index: np.ndarray) -> float:
        return correlation(rewards[index], marks[index])

    agreement = estimate_of(share, len(marks), seed=seed)
    return {
        "reward_correlation": estimate_of(together, len(marks), seed=seed),
        "reward_agreement": agreement and agreement | {"pairs": int(pairs.sum())},
    }

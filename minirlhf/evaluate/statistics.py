"""Statistics of K answers to each of P prompts: intervals by bootstrap, and whether reward model and judge agree.

Prompts are drawn with replacement, as many as there are, and a prompt's answers go along together: answers to one
prompt are alike, so that resampling them one by one would promise too narrow an interval. Efron and Tibshirani 1993,
chapter 13.
Trap: it says nothing about another training run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minirlhf.evaluate.win_rate import wins
from minirlhf.runtime import Stream

RESAMPLES = 2000
ENDS = (2.5, 97.5)


def resampled(count: int, *, seed: int, samples: int = RESAMPLES) -> np.ndarray:
    """(samples, count) numbers of prompts, each row a draw of `count` prompts with replacement."""
    return np.random.default_rng((seed, Stream.EVALUATION)).integers(count, size=(samples, count))


def bootstrap_interval(values: np.ndarray, *, seed: int, samples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (P,), resampling the P prompts with replacement."""
    low, high = np.percentile(values[resampled(len(values), seed=seed, samples=samples)].mean(axis=1), ENDS)
    return float(low), float(high)


def interval_of(
    statistic: Callable[[np.ndarray], float], count: int, *, seed: int, samples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % percentile interval of any statistic of prompts: `statistic(numbers of prompts)` -> a number.

    The draws are those of `bootstrap_interval`. Draws for which the statistic does not exist (nan) are left out; None
    where it exists for none.
    """
    values = np.array([statistic(index) for index in resampled(count, seed=seed, samples=samples)])
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, ENDS).tolist()) if len(values) else None


def estimate(values: np.ndarray, *, seed: int) -> dict[str, float | tuple[float, float]]:
    """{"mean", "interval"} of values (P, K), K a prompt; the interval is over prompts."""
    by_prompt = values.mean(axis=1)
    return {"mean": float(by_prompt.mean()), "interval": bootstrap_interval(by_prompt, seed=seed)}


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
    agreed, apart = np.zeros(len(marks)), np.zeros(len(marks))
    for i, j in itertools.combinations(range(marks.shape[1]), 2):
        gap = marks[:, i] - marks[:, j]
        differ = np.abs(gap) > 1e-9
        apart += differ
        agreed += np.where(differ, wins((rewards[:, i] - rewards[:, j]) * gap, 0.0), 0.0)
    return agreed, apart


def against_judge(rewards: np.ndarray, marks: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Correlation and agreement with intervals over prompts; None where there is nothing to compare."""
    agreed, pairs = agreeing_pairs(rewards, marks)

    def together(index: np.ndarray) -> float:
        return correlation(rewards[index], marks[index])

    def share(index: np.ndarray) -> float:
        return agreed[index].sum() / pairs[index].sum() if pairs[index].sum() else math.nan

    def over_prompts(statistic: Callable[[np.ndarray], float]) -> dict[str, Any] | None:
        mean = float(statistic(np.arange(len(marks))))
        interval = interval_of(statistic, len(marks), seed=seed)
        return None if math.isnan(mean) else {"mean": mean, "interval": interval}

    agreement = over_prompts(share)
    return {
        "reward_correlation": over_prompts(together),
        "reward_agreement": agreement and agreement | {"pairs": int(pairs.sum())},
    }

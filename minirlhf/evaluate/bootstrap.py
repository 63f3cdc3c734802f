"""Intervals by bootstrap over prompts: what would another draw of prompts have given?

Prompts are drawn with replacement, as many as there are, and a prompt's answers go along together: answers to one
prompt are alike, so that resampling them one by one would promise too narrow an interval. Efron and Tibshirani 1993,
chapter 13.
Trap: it says nothing about another training run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
    found = np.array([statistic(index) for index in resampled(count, seed=seed, samples=samples)])
    found = found[~np.isnan(found)]
    return tuple(np.percentile(found, ENDS).tolist()) if len(found) else None


def estimate(values: np.ndarray, *, seed: int) -> dict[str, float | tuple[float, float]]:
    """{"mean", "interval"} of values (P, K), K a prompt; the interval is over prompts."""
    by_prompt = values.mean(axis=1)
    return {"mean": float(by_prompt.mean()), "interval": bootstrap_interval(by_prompt, seed=seed)}

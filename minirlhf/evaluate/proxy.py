"""Does the reward model, the proxy, say what the judge says? Over one model's answers, K to each of P prompts.

The two questions differ: the correlation is over all answers, and a reward model that only knows which prompts are easy
has some; the agreement is between answers to the same prompt, which is what training reads.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from minirlhf.evaluate.bootstrap import interval_of
from minirlhf.evaluate.win_rate import wins


def correlation(rewards: np.ndarray, marks: np.ndarray) -> float:
    """Pearson's correlation of all rewards with all marks, (P, K) each; nan where either does not vary."""
    x, y = (values.ravel() - values.mean() for values in (rewards, marks))
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else math.nan


def agreeing_pairs(rewards: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P,) pairs of answers to each prompt that both put in the same order, and (P,) pairs that the judge tells apart.

    Equal rewards agree by half.
    """
    agreed, told_apart = np.zeros(len(marks)), np.zeros(len(marks))
    for i, j in itertools.combinations(range(marks.shape[1]), 2):
        gap = marks[:, i] - marks[:, j]
        apart = np.abs(gap) > 1e-9
        told_apart += apart
        agreed += np.where(apart, wins((rewards[:, i] - rewards[:, j]) * gap, 0.0), 0.0)
    return agreed, told_apart


def against_judge(rewards: np.ndarray, marks: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Both figures with intervals over prompts; None where there is nothing to compare."""
    agreed, pairs = agreeing_pairs(rewards, marks)

    def share(index: np.ndarray) -> float:
        return agreed[index].sum() / pairs[index].sum() if pairs[index].sum() else math.nan

    together = correlation(rewards, marks)
    return {
        "reward_correlation": None
        if math.isnan(together)
        else {
            "mean": together,
            "interval": interval_of(lambda i: correlation(rewards[i], marks[i]), len(marks), seed=seed),
        },
        "reward_agreement": None
        if not pairs.any()
        else {
            "mean": float(agreed.sum() / pairs.sum()),
            "interval": interval_of(share, len(marks), seed=seed),
            "pairs": int(pairs.sum()),
        },
    }

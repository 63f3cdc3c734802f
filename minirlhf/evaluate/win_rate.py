"""Who wins: ties count half, and what would be left of it if the answers were equally long.

An outcome is 1 where the model wins against the baseline, 0 where it loses and 1/2 for a tie. Two models change places
by outcome -> 1 - outcome, and every number here with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minirlhf.runtime import Stream

RIDGE = 0.1  # weak: of 500 prompts it moves the coefficient of length by less than a hundredth of itself


def wins(scores: np.ndarray, other: np.ndarray | float) -> np.ndarray:
    """1 where `scores` is above `other`, 1/2 where equal, else 0; the mean is the win rate."""
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


# --------------------------------------------------------------------------------------- judges that see both answers
@dataclass(frozen=True)
class Verdicts:
    """What a judge that sees two answers said.

    outcomes         (B,) of the model against the baseline, the mean over the orders in which it was asked
    first_preferred  share of questions in which the answer shown first won, ties half: 1/2 without a habit
    contradictions   share of pairs, asked in both orders, on which it took the same place twice
    None where no question was asked, or none in both orders.
    """

    outcomes: np.ndarray
    first_preferred: float | None
    contradictions: float | None


def presentations(equal: Sequence[bool], *, random: bool, seed: int) -> list[tuple[int, bool]]:
    """The questions to ask about B pairs: (number of the pair, whether the model's answer is shown first).

    equal   where both answers are the same text: nothing is asked, it is a tie
    random  each pair in one order, drawn for it alone; else in both
    """
    first = np.random.default_rng((seed, Stream.EVALUATION, 0)).integers(2, size=len(equal)).astype(bool).tolist()
    return [
        (pair, order)
        for pair, same in enumerate(equal)
        if not same
        for order in ((first[pair],) if random else (True, False))
    ]


def verdicts(questions: Sequence[tuple[int, bool]], preferred: Sequence[float], count: int) -> Verdicts:
    """Outcomes of `count` pairs from the questions of `presentations`.

    preferred  probability, by the judge, that the answer shown first is the better one, of each question
    """
    first = wins(np.array(preferred, dtype=np.float64), 0.5)
    said: list[list[float]] = [[] for _ in range(count)]
    for (pair, model_first), won in zip(questions, first.tolist(), strict=True):
        said[pair].append(won if model_first else 1 - won)
    twice = [own for own in said if len(own) == 2]
    return Verdicts(
        np.array([np.mean(own) if own else 0.5 for own in said]),
        first_preferred=float(first.mean()) if len(first) else None,
        contradictions=float(np.mean([abs(one - other) == 1 for one, other in twice])) if twice else None,
    )

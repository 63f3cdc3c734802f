"""How a judge's score rises and falls with the distance from the SFT model: forms, fits, maxima and their intervals.

With d = sqrt(KL) and R the score above the SFT model's, Gao, Schulman and Hilton 2022 (arXiv 2210.10760) find

    best-of-n    R(d) = d (alpha - beta d)        highest at d = alpha / (2 beta)
    RL           R(d) = d (alpha - beta log d)    highest at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so a fit is one least-squares solution. R(0) = 0: scores are offset before the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["best-of-n", "rl"]


@dataclass(frozen=True)
class Curve:
    """One training run, or one set of samples, at growing distances: K points, P prompts, the SFT model first.

    kl    (K, P) log pi - log pi_sft of the answers, or (K, 1) where the KL is known
    gold  (K, P) the judge's score of the answers
    """

    kl: np.ndarray
    gold: np.ndarray

    def means(self, prompts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(K,) distances d and (K,) scores above the first point's; over the prompts of these numbers, or all."""
        known = self.kl.shape[1] == 1
        kl = self.kl if known or prompts is None else self.kl[:, prompts]
        gold = (self.gold if prompts is None else self.gold[:, prompts]).mean(axis=1)
        return np.sqrt(np.maximum(kl.mean(axis=1), 0.0)), gold - gold[0]  # an estimate near 0 may fall below it


def basis(d: np.ndarray, form: Form) -> np.ndarray:
    """(K, 2) what alpha and beta are multiplied with at the distances d > 0."""
    return np.stack([d, -d * d if form == "best-of-n" else -d * np.log(d)], axis=1)


def fit(d: np.ndarray, gain: np.ndarray, form: Form) -> tuple[float, float]:
    """alpha and beta by least squares over the points with d > 0; ValueError where fewer than two are left."""
    used = d > 0
    if used.sum() < 2:
        raise ValueError(f"{int(used.sum())} points beyond the SFT model; two coefficients need two")
    (alpha, beta), *_ = np.linalg.lstsq(basis(d[used], form), gain[used], rcond=None)
    return float(alpha), float(beta)


def predict(d: np.ndarray, alpha: float, beta: float, form: Form) -> np.ndarray:
    """R(d); 0 at d = 0, where d log d has its limit."""
    safe = np.where(d > 0, d, 1.0)
    return np.where(d > 0, basis(safe, form) @ np.array([alpha, beta]), 0.0)


def peak(alpha: float, beta: float, form: Form) -> float:
    """The d > 0 at which R is highest: infinite where R rises for ever (beta <= 0), 0 where it only falls."""
    if beta <= 0:
        return math.inf
    if form == "best-of-n":
        return max(0.0, alpha / (2 * beta))
    return math.exp(min(alpha / beta - 1, 700.0))


def mean_over_runs(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Distances and the mean over the runs there, each interpolated between its points, as far as all of them reach.

    curves  (d, gain) of each run, in any order of d: a run may come back nearer
    """
    grid = np.linspace(0.0, min(d.max() for d, _ in curves), 201)
    return grid, np.mean([np.interp(grid, np.sort(d), gain[np.argsort(d)]) for d, gain in curves], axis=0)


def measured_peak(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The d and the height of the maximum of the mean over runs."""
    grid, mean = mean_over_runs(curves)
    return float(grid[mean.argmax()]), float(mean.max())


@dataclass(frozen=True)
class Fit:
    """Estimates with 95 % intervals: the coefficients, the fit's and the measured maximum, and how well it fits."""

    alpha: tuple[float, float, float]
    beta: tuple[float, float, float]
    peak: tuple[float, float, float]
    measured: tuple[float, float, float]
    height: tuple[float, float, float]
    explained: float  # share of the variance of the points, R^2


def estimate(curves: Sequence[Curve], form: Form, *, furthest: float, draws: int = 1000, seed: int = 0) -> Fit:
    """Fit all curves as one, over points with d <= `furthest`; intervals by bootstrap over runs and prompts at once.

    A draw takes as many curves with replacement and, from all of them, as many prompts with replacement; distances,
    scores and the offset are computed anew from it. Percentiles 2.5 and 97.5 of the draws, a maximum at infinity
    included. Trap: with three runs there are ten draws of runs, so that these intervals are on the narrow side.
    """
    random = np.random.default_rng(seed)
    prompts = curves[0].gold.shape[1]
    d, gain = (np.concatenate(x) for x in zip(*(within(c.means(), furthest) for c in curves), strict=True))
    best = numbers([c.means() for c in curves], form, furthest)
    drawn = []
    for _ in range(draws):
        chosen = random.integers(len(curves), size=len(curves))
        these = random.integers(prompts, size=prompts)
        drawn.append(numbers([curves[i].means(these) for i in chosen], form, furthest))
    low, high = np.percentile(np.array(drawn), (2.5, 97.5), axis=0, method="closest_observation")
    residual = gain - predict(d, best[0], best[1], form)
    return Fit(
        *((b, float(x), float(y)) for b, x, y in zip(best, low, high, strict=True)),
        explained=float(1 - (residual**2).sum() / ((gain - gain.mean()) ** 2).sum()),
    )


def numbers(curves: Sequence[tuple[np.ndarray, np.ndarray]], form: Form, furthest: float) -> tuple[float, ...]:
    """alpha, beta, the fit's maximum, the measured maximum and its height."""
    d, gain = (np.concatenate(x) for x in zip(*(within(curve, furthest) for curve in curves), strict=True))
    alpha, beta = fit(d, gain, form)
    return alpha, beta, peak(alpha, beta, form), *measured_peak(curves)


def within(curve: tuple[np.ndarray, np.ndarray], furthest: float) -> tuple[np.ndarray, np.ndarray]:
    """The points up to a distance."""
    d, gain = curve
    return d[d <= furthest], gain[d <= furthest]


def with_interval(estimate: tuple[float, float, float], write: Callable[[float], str] = "{:.2f}".format) -> str:
    """An estimate and its interval as text."""
    value, low, high = (write(x) for x in estimate)
    return f"{value} ({low} to {high})"

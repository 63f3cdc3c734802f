"""How good the sources of the answers are, by the labels: Bradley-Terry strengths, and the same as Elo ratings.

P(a beats b) = sigmoid(s_a - s_b); a tie counts half a win for each. Bradley and Terry 1952.
All labels count alike whatever their order, unlike in a rating that is updated game by game. Answers of one source
that were compared with each other say nothing about it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minirlhf.feedback.agreement import Z, first_labels
from minirlhf.feedback.labels import Label

ELO_MEAN, ELO_SCALE = 1500.0, 400.0


@dataclass(frozen=True)
class Strength:
    """A source: its comparisons, its wins (ties count 1/2), and its strength (mean 0 over sources) -+ `half` (95 %)."""

    source: str
    comparisons: int
    wins: float
    strength: float
    half: float

    @property
    def elo(self) -> tuple[float, float, float]:
        """The rating, and the ends of its interval."""
        return elo(self.strength), elo(self.strength - self.half), elo(self.strength + self.half)


class NoStrengths(ValueError):
    """Labels from which no finite strengths follow; says why."""


@dataclass(frozen=True)
class Games:
    """G comparisons of two sources: first and second (G,), the first's score 1, 1/2 or 0, and the prompt (cluster)."""

    sources: list[str]
    first: np.ndarray
    second: np.ndarray
    score: np.ndarray
    cluster: np.ndarray


def elo(strength: float) -> float:
    """The Elo rating of a Bradley-Terry strength: 1500 + 400 s / ln 10.

    It makes P(a beats b) = 1 / (1 + 10^((R_b - R_a) / 400)), so that 400 points are ten to one: the usual scale,
    Elo 1978, "The rating of chessplayers". 1500 is the mean, a convention.
    Trap: on a scale of 10 in place of 400, ten points would be ten to one too.
    """
    return ELO_MEAN + ELO_SCALE * strength / math.log(10)


def expected_score(rating: float, other: float) -> float:
    """The probability that a player rated `rating` beats one rated `other`: 1 / (1 + 10^((other - rating) / 400))."""
    return 1 / (1 + 10 ** ((other - rating) / ELO_SCALE))


def games_of(labels: Sequence[Label]) -> Games:
    """Every pair of responses of different sources in the labellers' first labels."""
    known = [(label, label.sources) for label in first_labels(labels) if label.sources is not None]
    sources = sorted({source for _, answered in known for source in answered})
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(label.prompt for label, _ in known))}
    rows = []
    for label, answered in known:
        places = [sources.index(source) for source in answered]
        for i, j in itertools.combinations(range(len(places)), 2):
            if places[i] != places[j]:
                score = 0.5 + 0.5 * np.sign(label.ranks[j] - label.ranks[i])
                rows.append((places[i], places[j], score, prompts[label.prompt]))
    first, second, score, cluster = np.array(rows, dtype=float).reshape(-1, 4).T
    return Games(sources, first.astype(int), second.astype(int), score, cluster.astype(int))


def strengths(labels: Sequence[Label]) -> list[Strength]:
    """Maximum-likelihood strengths, best first.

    Newton's method on the concave log-likelihood; covariance F^+ (sum_c g_c g_c^T) F^+ C / (C - 1), with F the Fisher
    information and g_c the gradient from prompt c of C: pairs of one prompt are not independent, and the interval
    allows for it (Liang and Zeger 1986).
    Raises NoStrengths where there are fewer than two sources or prompts, or where some sources only won or only lost
    against the rest: their strengths would be infinite (Ford 1957).
    """
    games = games_of(labels)
    count, clusters = len(games.sources), len(set(games.cluster.tolist()))
    if not len(games.score):
        raise NoStrengths("no two sources were compared")
    if not _connected(games):
        raise NoStrengths("some sources only won or only lost against the others, or never met them")
    if clusters < 2:
        raise NoStrengths("the labels are about one prompt alone")
    values = fit(games)
    design = _design(games)  # (G, S)
    chance = 1 / (1 + np.exp(-design @ values))
    inverse = _inverse_information(design, chance)
    gradients = np.zeros((games.cluster.max() + 1, count))
    np.add.at(gradients, games.cluster, design * (games.score - chance)[:, None])
    covariance = inverse @ gradients.T @ gradients @ inverse * clusters / (clusters - 1)
    half = Z * np.sqrt(np.diag(covariance).clip(min=0))
    played = np.abs(design).sum(0).astype(int)
    won = (design.clip(min=0) * games.score[:, None] + (-design).clip(min=0) * (1 - games.score)[:, None]).sum(0)
    table = zip(games.sources, played.tolist(), won.tolist(), values.tolist(), half.tolist(), strict=True)
    return sorted((Strength(*row) for row in table), key=lambda row: -row.strength)


def fit(games: Games) -> np.ndarray:
    """(S,) strengths of mean 0 at which the log-likelihood is greatest; they must be finite (`_connected`)."""
    design = _design(games)
    values = np.zeros(len(games.sources))

    def likelihood(at: np.ndarray) -> float:
        gap = design @ at
        return float(-(games.score * np.logaddexp(0, -gap) + (1 - games.score) * np.logaddexp(0, gap)).sum())

    for _ in range(1000):
        chance = 1 / (1 + np.exp(-design @ values))
        step = _inverse_information(design, chance) @ (design.T @ (games.score - chance))
        while likelihood(values + step) < likelihood(values) - 1e-12:
            step = step / 2
        values = values + step
        if np.abs(step).max() < 1e-10:
            return values - values.mean()
    raise NoStrengths("the strengths did not converge; one source hardly ever lost or won")


def _design(games: Games) -> np.ndarray:
    """(G, S): 1 in the column of the first source, -1 in that of the second."""
    rows = np.arange(len(games.score))
    design = np.zeros((len(rows), len(games.sources)))
    design[rows, games.first] = 1
    design[rows, games.second] = -1
    return design


def _inverse_information(design: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(S, S) pseudo-inverse of the Fisher information, which is 0 along equal changes of all strengths.

    Trap: np.linalg.pinv takes the rounding error in that direction for information, and divides by it.
    """
    information = design.T @ (design * (chance * (1 - chance))[:, None])
    equal = np.full_like(information, 1 / len(information))
    return np.linalg.inv(information + equal) - equal


def _connected(games: Games) -> bool:
    """Whether every source reaches every other by a chain of wins or ties."""
    reach = np.eye(len(games.sources), dtype=bool)
    reach[games.first[games.score > 0], games.second[games.score > 0]] = True
    reach[games.second[games.score < 1], games.first[games.score < 1]] = True
    for _ in games.sources:
        reach = reach | (reach.astype(int) @ reach.astype(int) > 0)
    return bool(reach.all())

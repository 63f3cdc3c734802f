"""Strengths of the sources of the answers, by the labels: Bradley-Terry strengths, and the same as Elo ratings.

P(a beats b) = sigmoid(s_a - s_b); a tie counts half a win for each. Bradley and Terry 1952.
All labels count alike whatever their order, unlike in a rating that is updated game by game. Answers of one source
that were compared with each other say nothing about it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minirlhf.feedback.agreement import Z, first_labels
from minirlhf.feedback.labels import Label
from minirlhf.runtime import UserError, require

ELO_MEAN, ELO_SCALE = 1500.0, 400.0


class NoStrengths(UserError):
    """Labels from which no finite strengths follow; says why."""


@dataclass(frozen=True)
class Games:
    """G comparisons of two of S sources.

    design  (G, S) 1 in the column of the first source, -1 in that of the second
    score   (G,) the first's: 1, 1/2 or 0;  cluster  (G,) number of the prompt
    """

    sources: list[str]
    design: np.ndarray
    score: np.ndarray
    cluster: np.ndarray


def elo(strength: float) -> float:
    """The Elo rating of a Bradley-Terry strength: 1500 + 400 s / ln 10.

    It makes P(a beats b) = 1 / (1 + 10^((R_b - R_a) / 400)), so that 400 points are ten to one: the usual scale,
    Elo 1978, "The rating of chessplayers". 1500 is the mean, a convention.
    Trap: on a scale of 10 in place of 400, ten points would be ten to one too.
    """
    return ELO_MEAN + ELO_SCALE * strength / math.log(10)


def games_of(labels: Sequence[Label]) -> Games:
    """Every pair of responses of different sources in the labellers' first labels."""
    answered = [(label, label.sources) for label in first_labels(labels) if label.sources is not None]
    names = sorted({source for _, sources in answered for source in sources})
    column = dict(zip(names, np.eye(len(names)), strict=True))
    games = [
        (column[one] - column[other], 0.5 + 0.5 * np.sign(other_rank - rank), label.prompt)
        for label, sources in answered
        for (one, rank), (other, other_rank) in itertools.combinations(zip(sources, label.ranks, strict=True), 2)
        if one != other
    ]
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for *_, prompt in games))}
    design = np.array([row for row, _, _ in games]).reshape(len(games), len(names))
    score = np.array([score for _, score, _ in games])
    return Games(names, design, score, np.array([prompts[prompt] for *_, prompt in games]))


def strengths(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Maximum-likelihood strengths, best first: each source with its comparisons, wins (ties count 1/2), strength
    (mean 0 over sources) and Elo rating, both with their 95 % intervals.

    Newton's method on the concave log-likelihood; covariance F^+ (sum_c g_c g_c^T) F^+ C / (C - 1), with F the Fisher
    information and g_c the gradient from prompt c of C: pairs of one prompt are not independent, and the interval
    allows for it (Liang and Zeger 1986).
    Raises NoStrengths where there are fewer than two sources or prompts, or where some sources only won or only lost
    against the rest: their strengths would be infinite (Ford 1957).
    """
    games = games_of(labels)
    require(len(games.score) > 0, "no two sources were compared", NoStrengths)
    words = "some sources only won or only lost against the others, or never met them"
    require(_connected(games), words, NoStrengths)
    clusters = int(games.cluster.max()) + 1
    require(clusters > 1, "the labels are about one prompt alone", NoStrengths)
    values, score = fit(games), games.score[:, None]
    chance = 1 / (1 + np.exp(-games.design @ values))
    inverse = _inverse_information(games.design, chance)
    gradients = np.zeros((clusters, len(games.sources)))
    np.add.at(gradients, games.cluster, games.design * (score - chance[:, None]))
    covariance = inverse @ gradients.T @ gradients @ inverse * clusters / (clusters - 1)
    halves = Z * np.sqrt(np.diag(covariance).clip(min=0))
    played = np.abs(games.design).sum(0).astype(int)
    won = (games.design.clip(min=0) * score + (-games.design).clip(min=0) * (1 - score)).sum(0)
    rows = []
    for source, count, wins, value, half in zip(games.sources, played, won, values, halves, strict=True):
        ends = [float(value - half), float(value + half)]
        row = {"source": source, "comparisons": int(count), "wins": float(wins), "strength": float(value)}
        rows.append({**row, "interval": ends, "elo": elo(float(value)), "elo_interval": [elo(end) for end in ends]})
    return sorted(rows, key=lambda row: -row["strength"])


def fit(games: Games) -> np.ndarray:
    """(S,) strengths of mean 0 at which the log-likelihood is greatest; they must be finite (`_connected`).

    Newton's steps, shortened where one moves a difference by more than 1: then each raises the likelihood (Bach 2010,
    "Self-concordant analysis for logistic regression").
    """
    values = np.zeros(len(games.sources))
    for _ in range(1000):
        chance = 1 / (1 + np.exp(-games.design @ values))
        step = _inverse_information(games.design, chance) @ (games.design.T @ (games.score - chance))
        values = values + step / max(1, np.abs(games.design @ step).max())
        if np.abs(step).max() < 1e-10:
            return values - values.mean()
    raise NoStrengths("the strengths did not converge; one source hardly ever lost or won")


def _inverse_information(design: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(S, S) pseudo-inverse of the Fisher information, which is 0 along equal changes of all strengths.

    Trap: np.linalg.pinv takes the rounding error in that direction for information, and divides by it.
    """
    information = design.T @ (design * (chance * (1 - chance))[:, None])
    equal = np.full_like(information, 1 / len(information))
    return np.linalg.inv(information + equal) - equal


def _connected(games: Games) -> bool:
    """True where every source reaches every other by a chain of wins or ties."""
    first, second, score = games.design > 0, games.design < 0, games.score[:, None]
    reach = np.eye(len(games.sources)) + first.T @ (second * (score > 0)) + second.T @ (first * (score < 1))
    for _ in games.sources:
        reach = (reach @ reach > 0).astype(float)
    return bool(reach.all())

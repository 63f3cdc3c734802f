"""What a reward model is trained for: how the scores of the responses to a prompt should explain their ranking.

    pairs              Bradley-Terry over all (better, worse) pairs of a ranking
    best-against-rest  the same, over the pairs of the best alone
    plackett-luce      the best is chosen of all, the next of the rest, and so on; of equal ones the first counts alone

and of ties: `drop` learns nothing from them, `half` takes one for half a win each way, `davidson` models them.
The equations are in `bradley_terry.py`. All pairs of a prompt are in one batch element; the loss is a mean over the
whole batch, of pairs by their weights, of rankings by their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minirlhf.bradley_terry import bradley_terry_loss, davidson_loss, plackett_luce_loss
from minirlhf.comparisons import Comparison, best_against_rest, best_first
from minirlhf.encode import differing_tokens
from minirlhf.runtime import require

Form = Literal["pairs", "best-against-rest", "plackett-luce"]
Ties = Literal["drop", "half", "davidson"]


@dataclass(frozen=True)
class Objective:
    """One of the objectives above; `nu` is how common ties are, see `bradley_terry.davidson_loss`."""

    form: Form = "pairs"
    ties: Ties = "drop"
    nu: float = 1.0

    def check(self, contrast: float) -> None:
        """Raise UserError where the settings contradict each other."""
        ranked = self.form == "plackett-luce"
        require(not ranked or self.ties == "drop", f"--ties {self.ties}: Plackett-Luce has no place for ties; use drop")
        plain = self.form != "plackett-luce" and self.ties != "davidson"
        name = "--objective plackett-luce" if ranked else "--ties davidson"
        require(plain or contrast == 0, f"{name}: has no weights of pairs; use it with --contrast 0")

    def prepare(self, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """The comparisons with the pairs that this objective is about."""
        best = self.form == "best-against-rest"
        return [best_against_rest(c) if best else c for c in comparisons]

    def size(self, comparisons: Sequence[Comparison], contrast: float) -> float:
        """What the loss of a whole batch is divided by: the weights of its pairs, or the number of its rankings."""
        ranked = self.form == "plackett-luce"
        return float(len(comparisons)) if ranked else pair_weights(comparisons, contrast).sum().item()

    def loss(
        self,
        scores: Tensor,
        comparisons: Sequence[Comparison],
        pairs: Tensor,
        *,
        contrast: float,
        denominator: float,
    ) -> Tensor:
        """The loss of a part of a batch: (R,) scores of all responses, (N, 2) their pairs -> scalar.

        denominator  `size` of the whole batch
        """
        if self.form == "plackett-luce":
            return _ranking_loss(scores, comparisons, denominator)
        first, second = scores[pairs[:, 0]], scores[pairs[:, 1]]
        weights = pair_weights(comparisons, contrast).to(scores)
        if self.ties == "davidson":
            return _tie_loss(first, second, weights, self.nu, denominator)
        return bradley_terry_loss(first, second, weights=weights, denominator=denominator)


def pair_weights(comparisons: Sequence[Comparison], contrast: float) -> Tensor:
    """(N,) weights of all pairs: a pair's own times d^-contrast, where its two responses differ in d tokens."""
    weights = [
        weight * differing_tokens(c.examples[i].response_ids, c.examples[j].response_ids) ** -contrast
        for c in comparisons
        for (i, j), weight in zip(c.pairs, c.pair_weights, strict=True)
    ]
    return torch.tensor(weights, dtype=torch.float64)


def _ranking_loss(scores: Tensor, comparisons: Sequence[Comparison], denominator: float) -> Tensor:
    by_size: dict[int, list[Tensor]] = defaultdict(list)
    for own, comparison in zip(scores.split([len(c.examples) for c in comparisons]), comparisons, strict=True):
        order = best_first(comparison)
        by_size[len(order)].append(own[order])
    parts = [plackett_luce_loss(torch.stack(rows), denominator=denominator) for rows in by_size.values()]
    return torch.stack(parts).sum()


def _tie_loss(first: Tensor, second: Tensor, weights: Tensor, nu: float, denominator: float) -> Tensor:
    """A tie stands here once each way with weight 1/2, and its likelihood is the same both ways."""
    tied = weights < 1
    won = davidson_loss(first[~tied], second[~tied], tied[~tied], nu=nu, denominator=denominator)
    ties = davidson_loss(first[tied], second[tied], tied[tied], nu=nu, denominator=denominator)
    return won + 0.5 * ties

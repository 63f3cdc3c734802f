"""Several reward models as one, so that a policy cannot exploit the mistakes of any single one.

    mean                 (1/M) sum_m r_m
    worst                min_m r_m
    mean-minus-variance  (1/M) sum_m r_m - penalty * (1/M) sum_m (r_m - mean)^2

Coste et al. 2023, "Reward model ensembles help mitigate overoptimization", arXiv 2310.02743, equations 2 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from minirlhf.reward import RewardModel

Aggregate = Literal["mean", "worst", "mean-minus-variance"]


class RewardEnsemble(nn.Module):
    """forward(tokens (B, T), lengths (B,)) -> scores (B,), like a RewardModel's.

    members  reward models with one tokenizer, trained with different seeds or on different labels
    penalty  of the variance, in units of 1 / score; used by mean-minus-variance alone
    Trap: their scores must have one scale. `train_reward.py` gives each mean 0 and deviation 1 over reference answers.
    """

    def __init__(self, members: Sequence[RewardModel], *, aggregate: Aggregate = "mean", penalty: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.aggregate, self.penalty = aggregate, penalty

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        scores = torch.stack([member(tokens, lengths) for member in self.members])  # (M, B)
        return combine(scores, aggregate=self.aggregate, penalty=self.penalty)


def combine(scores: Tensor, *, aggregate: Aggregate, penalty: float) -> Tensor:
    """(M, B) scores of M members -> (B,), as at the head of this file. The variance divides by M: one member has 0."""
    if aggregate == "worst":
        return scores.amin(dim=0)
    mean = scores.mean(dim=0)
    return mean if aggregate == "mean" else mean - penalty * scores.var(dim=0, correction=0)

"""Losses of the reward model: how scores should explain human choices between responses.

Scores are one number per sequence, `(N,)`, or `(N, K)` for rankings. Adding a constant to all scores of a comparison
changes no loss but the centring term, so scores mean something only as differences.

A ranking of K gives K(K-1)/2 dependent pairs: keep them in one optimizer batch and divide once by their number
(`denominator`), or use `plackett_luce_loss`, which counts each ranking once.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from minirlhf import ops


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: float | Tensor = 0.0,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood that the chosen response beats the rejected one: the mean over pairs.

    L = mean_n -log sigmoid(r_chosen - r_rejected - margin), or with weights sum_n w_n (...) / denominator

    Bradley and Terry 1952; InstructGPT (Ouyang et al. 2022), eq. 1; margin of Llama 2 (Touvron et al. 2023).
    Shapes: (N,), (N,), margin a number or (N,), weights (N,) -> scalar. Equal scores without margin give ln 2.
    The denominator is N unless given, with weights too: pass the sum of the whole batch's weights for their mean.
    Raises ValueError for other shapes. Trap: the margin is subtracted, so that a larger one asks for more.
    """
    ops.check_pairs(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    if isinstance(margin, Tensor):
        ops.check_shapes(chosen_scores=chosen_scores, margin=margin)
    # log(sigmoid(x)) would be -inf from x = -104 on; logsigmoid is not.
    losses = -F.logsigmoid(ops.upcast(chosen_scores) - ops.upcast(rejected_scores) - margin)
    if weights is not None:
        ops.check_shapes(chosen_scores=chosen_scores, weights=weights)
        losses = losses * weights
    return ops.mean(losses, denominator=denominator)


def centring_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, denominator: float | Tensor | None = None
) -> Tensor:
    """Pull each pair's scores towards a mean of 0: the mean over pairs, to be added with a small coefficient.

    L = mean_n (r_chosen + r_rejected)^2

    Eisenstein et al. 2023, "Helping or herding?", eq. 2. Shapes: (N,), (N,) -> scalar. Raises ValueError for others.
    Trap: the sum, not the difference: the difference is what the pair is about.
    """
    ops.check_pairs(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    return ops.mean((ops.upcast(chosen_scores) + ops.upcast(rejected_scores)).square(), denominator=denominator)


def plackett_luce_loss(scores: Tensor, *, denominator: float | Tensor | None = None) -> Tensor:
    """Negative log-likelihood of a ranking of K: the best is chosen of all, the next of the rest, and so on.

    L = mean_n -sum_{i=1}^{K-1} [r_i - log sum_{j >= i} exp r_j],  r_1 the best

    Plackett 1975, Luce 1959; DPO (Rafailov et al. 2023), appendix A.3. Shapes: (N, K), best first -> scalar.
    K = 2 is `bradley_terry_loss`. Summed over the K-1 choices, averaged over the N rankings.
    Raises ValueError for other shapes or K < 2. Trap: ties have no place in it; see `davidson_loss`.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; pass (N, K), best first, with K of 2 or more")
    scores = ops.upcast(scores)
    # Not logcumsumexp: its gradient loses digits when scores are far apart.
    choices = [scores[:, i:].logsumexp(-1) - scores[:, i] for i in range(scores.shape[1] - 1)]
    return ops.mean(torch.stack(choices).sum(0), denominator=denominator)


def davidson_loss(
    first_scores: Tensor,
    second_scores: Tensor,
    ties: Tensor,
    *,
    nu: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of comparisons that may end in a tie: the mean over pairs.

    P(first) = p_1 / Z,  P(tie) = nu sqrt(p_1 p_2) / Z,  Z = p_1 + p_2 + nu sqrt(p_1 p_2),  p = exp r

    Davidson 1970. Shapes: (N,), (N,), `ties` bool (N,) -> scalar; where `ties` is false the first one won.
    `nu` > 0 is how common ties are: between equals a tie has probability nu / (2 + nu); nu -> 0 is Bradley-Terry.
    Raises ValueError for other shapes or nu <= 0, TypeError for ties that are not bool.
    Trap: a tie is information. Recorded as a win of the one listed first it teaches the labeller's position bias.
    """
    ops.check_pairs(first_scores=first_scores, second_scores=second_scores, ties=ties)
    ops.check_positive(nu=nu)
    if ties.dtype != torch.bool:
        raise TypeError(f"ties has dtype {ties.dtype}; pass bool, true where neither response won")
    first, second = ops.upcast(first_scores), ops.upcast(second_scores)
    tie = math.log(nu) + 0.5 * (first + second)
    log_normaliser = torch.stack([first, second, tie]).logsumexp(0)
    return ops.mean(log_normaliser - torch.where(ties, tie, first), denominator=denominator)


def accuracy(chosen_scores: Tensor, rejected_scores: Tensor, *, denominator: float | Tensor | None = None) -> Tensor:
    """Share of pairs whose chosen response has the higher score; equal scores count one half.

    accuracy = mean_n ([r_chosen > r_rejected] + 1/2 [r_chosen = r_rejected])

    Shapes: (N,), (N,) -> scalar, no gradient. Raises ValueError for others.
    Trap: without the half a model that scores everything 0 would look worse than chance.
    """
    ops.check_pairs(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    wins = (chosen_scores > rejected_scores) + 0.5 * (chosen_scores == rejected_scores)
    return ops.mean(wins, denominator=denominator)

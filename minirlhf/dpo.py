"""Direct preference losses: the policy is its own reward model, r(x, y) = beta log pi(y|x) / ref(y|x).

Every log-probability here is one number per sequence, `(N,)`, summed over the response's tokens, never averaged: length
matters in DPO. The losses that do average (ORPO, SimPO) take the lengths and divide themselves. `ref_` values are
detached.

Each loss returns the mean over pairs; `denominator` is the number of pairs in the whole optimizer batch. All raise
ValueError for unequal shapes, for per-token input and for coefficients out of range.

Left out on purpose: one function with a `loss_type`. Seven short functions say what they compute, and a script that
offers several chooses between them by name (online_dpo.py).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from minirlhf import ops


def _log_ratios(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """log pi(y|x) / ref(y|x) of the chosen and of the rejected responses, (N,) each."""
    ops.check_pairs(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    chosen = ops.log_ratio(chosen_logprobs, ref_chosen_logprobs.detach())
    return chosen, ops.log_ratio(rejected_logprobs, ref_rejected_logprobs.detach())


def _margins(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor
) -> Tensor:
    """The difference of the two log-ratios, (N,), not yet times beta: `delta` in the equations below."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return chosen - rejected


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """DPO, and with label smoothing conservative DPO (cDPO).

    h = beta [log pi/ref (chosen) - log pi/ref (rejected)]
    L = mean_n -(1 - e) log sigmoid(h) - e log sigmoid(-h),  e = label_smoothing

    Rafailov et al. 2023, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences" (cDPO). Shapes: four (N,) ->
    scalar. beta > 0, 0 <= e <= 1/2. Policy equal to reference gives ln 2 for every e. With e > 0 the best h is log((1 -
    e) / e), not infinity. Trap: the loss sees only the difference; the chosen log-probability itself may fall while it
    improves.
    """
    ops.check_positive(beta=beta)
    ops.check_between(0.0, 0.5, label_smoothing=label_smoothing)
    h = beta * _margins(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return ops.mean(losses, denominator=denominator)


def robust_dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Robust DPO: an unbiased estimate of the clean DPO loss when a share e of the labels is flipped.

    L = mean_n [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e),  e = label_smoothing, h as in `dpo_loss`

    Chowdhury et al. 2024, "Provably robust DPO". Shapes: four (N,) -> scalar. beta > 0, 0 <= e < 1/2.
    Averaged over flips of probability e it equals `dpo_loss` without smoothing.
    Trap: the second sign is the opposite of cDPO's, and the loss has no lower bound: it falls for ever as h grows.
    """
    ops.check_positive(beta=beta)
    ops.check_between(0.0, 0.5, label_smoothing=label_smoothing)
    if label_smoothing == 0.5:
        raise ValueError("label_smoothing is 0.5; labels that are flipped half of the time say nothing, use less")
    h = beta * _margins(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
    return ops.mean(losses / (1 - 2 * label_smoothing), denominator=denominator)


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """IPO: regress the difference of the log-ratios to a finite target instead of pushing it to infinity.

    L = mean_n (delta - 1 / (2 beta))^2,  delta = log pi/ref (chosen) - log pi/ref (rejected)

    Azar et al. 2023, eq. 17 (their tau is beta). Shapes: four (N,) -> scalar. beta > 0.
    Trap: delta is not multiplied by beta, and it is summed over tokens here; TRL averages over the length.
    """
    ops.check_positive(beta=beta)
    delta = _margins(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return ops.mean((delta - 1 / (2 * beta)).square(), denominator=denominator)


def hinge_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The hinge form of the preference loss: no gradient once the margin is reached.

    L = mean_n max(0, 1 - h),  h as in `dpo_loss`

    Zhao et al. 2023 (SLiC-HF, there without a reference); Liu et al. 2023 (RSO, "hinge-norm"). Shapes: four (N,) ->
    scalar. beta > 0. Trap: the kink lies at delta = 1 / beta, so a small beta asks for a large margin.
    """
    ops.check_positive(beta=beta)
    h = beta * _margins(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return ops.mean(F.relu(1 - h), denominator=denominator)


def kto_reference_point(mismatched_logprobs: Tensor, ref_mismatched_logprobs: Tensor) -> Tensor:
    """The reference point of KTO: a rough KL from mismatched pairs, shared by a batch, without gradient.

    z_0 = max(0, mean_n [log pi(y_{n+1}|x_n) - log ref(y_{n+1}|x_n)]),  y_{N+1} = y_1

    Ethayarajh et al. 2024, section 4.1. Shapes: two (N,) -> scalar, detached. Raises ValueError for N < 2, where no
    response belongs to another prompt. Trap: matched pairs bias it: the desirable ones would move their own zero.
    """
    ops.check_pairs(mismatched_logprobs=mismatched_logprobs, ref_mismatched_logprobs=ref_mismatched_logprobs)
    if len(mismatched_logprobs) < 2:
        raise ValueError(f"N is {len(mismatched_logprobs)}; mismatched pairs need a batch of 2 or more")
    return ops.mean(ops.log_ratio(mismatched_logprobs, ref_mismatched_logprobs).detach()).clamp(min=0)


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """KTO: single responses labelled good or bad, valued against a shared reference point.

    L = mean_n w_n (1 - sigmoid(s_n beta (log pi/ref - z_0)))
    s = 1, w = desirable_weight where desirable, else s = -1, w = undesirable_weight

    Ethayarajh et al. 2024, section 4.1. Shapes: `logprobs`, `ref_logprobs` and bool `desirable` (N,), `reference_point`
    z_0 a 0-d tensor of the whole batch (`kto_reference_point`) -> scalar. beta and the two weights > 0. Raises
    TypeError if `desirable` is not bool. Trap: z_0 is a constant; a gradient through it undoes the update.
    """
    ops.check_positive(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    ops.check_pairs(logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable has dtype {desirable.dtype}; pass bool, true where the response was liked")
    if reference_point.dim() != 0:
        raise ValueError(f"reference_point has shape {tuple(reference_point.shape)}; pass one 0-d tensor for the batch")
    gains = beta * (ops.log_ratio(logprobs, ref_logprobs.detach()) - reference_point.detach())
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits for a large x.
    losses = torch.where(desirable, desirable_weight * torch.sigmoid(-gains), undesirable_weight * torch.sigmoid(gains))
    return ops.mean(losses, denominator=denominator)


def _length_normalised(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean log-probability a token of the chosen and of the rejected responses, (N,) each."""
    ops.check_pairs(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return ops.upcast(chosen_logprobs) / chosen_lengths, ops.upcast(rejected_logprobs) / rejected_lengths


def _log_odds(logprobs: Tensor) -> Tensor:
    """log p / (1 - p) from log p < 0; 1 - p by expm1, which keeps its digits where p is near 1."""
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)  # p = 1 has infinite odds, and a nan gradient
    return logprobs - torch.log(-torch.expm1(logprobs))


def orpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    lam: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """ORPO: fine-tuning on the chosen response and an odds-ratio penalty in one loss, without a reference.

    L = mean_n -l_chosen - lam log sigmoid(log odds(l_chosen) - log odds(l_rejected))
    l = log pi(y|x) / |y|,  log odds(l) = l - log(1 - exp l)

    Hong et al. 2024, eq. 6 and 7. Shapes: log-probs summed over the response and lengths in tokens, (N,) -> scalar. lam
    > 0. Trap: odds need a mean log-probability; a summed one makes 1 - exp l equal 1, and the odds a plain ratio.
    """
    ops.check_positive(lam=lam)
    chosen, rejected = _length_normalised(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths)
    losses = -chosen - lam * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return ops.mean(losses, denominator=denominator)


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """SimPO: the mean log-probability as the reward, with a target margin and without a reference.

    L = mean_n -log sigmoid(beta (l_chosen - l_rejected) - gamma),  l = log pi(y|x) / |y|

    Meng et al. 2024, eq. 6. Shapes: log-probs summed over the response and lengths in tokens, (N,) -> scalar. beta > 0
    (2 to 2.5 in the paper), gamma >= 0. Trap: gamma is not multiplied by beta; the paper quotes gamma / beta too.
    """
    ops.check_positive(beta=beta)
    ops.check_between(0.0, math.inf, gamma=gamma)
    chosen, rejected = _length_normalised(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths)
    return ops.mean(-F.logsigmoid(beta * (chosen - rejected) - gamma), denominator=denominator)


@torch.no_grad()
def implicit_rewards(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The rewards that the policy implies, of the chosen and of the rejected responses, for logging.

    r = beta log pi(y|x) / ref(y|x), known up to a constant of the prompt

    Rafailov et al. 2023, section 4. Shapes: four (N,) -> two (N,), detached. beta > 0.
    Trap: log both. A growing difference hides a chosen reward that falls.
    """
    ops.check_positive(beta=beta)
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return beta * chosen, beta * rejected


# A loss and what `diagnostics` gives: sums over pairs, each divided by the pairs of the whole batch.
MEASURED = ("loss", "accuracy", "reward_chosen", "reward_rejected", "margin", "logprob_chosen", "logprob_rejected")


@torch.no_grad()
def diagnostics(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    denominator: float,
) -> dict[str, Tensor]:
    """Values to log beside a loss; same arguments, 0-d tensors, no gradient. All are sums over pairs / denominator.

    `reward_chosen`, `reward_rejected`: the implicit rewards; `margin`: their difference. `accuracy`: share of pairs
    whose chosen response has the higher one, equal ones count half. `logprob_chosen`, `logprob_rejected`: of the
    policy, since the chosen one may fall too. Over micro-batches all add up.
    """
    logprobs = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = implicit_rewards(*logprobs, beta=beta)  # (N,)
    wins = ops.mean((chosen > rejected) + 0.5 * (chosen == rejected))
    sums = {
        "accuracy": wins * len(chosen),
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "margin": (chosen - rejected).sum(),
        "logprob_chosen": chosen_logprobs.sum(),
        "logprob_rejected": rejected_logprobs.sum(),
    }
    return {name: value / denominator for name, value in sums.items()}

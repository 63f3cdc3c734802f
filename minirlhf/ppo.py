"""PPO's maths: rewards with the KL penalty, GAE, clipped policy and value losses, the adaptive KL controller.

Equation by equation: tensors in, tensors out.

All per-token tensors are `(B, T-1)`: index t is the action that wrote token t+1, and values at t are V(state before
that action). `mask` is true on the response including its EOS; results are exactly 0 elsewhere. Only `logprobs` in
`policy_loss` and `values` in `value_loss` carry gradient; what was recorded at the rollout is detached here.

Left out on purpose: an entropy bonus, and a value after the last action, which is 0: a response that ran into its
length limit is scored like any other. The KL is in the rewards (`ops.kl_k1` says why); `grpo.kl_loss` puts it into the
loss.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf import ops


@torch.no_grad()
def kl_penalised_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """Per-token rewards: the KL penalty at every token, the score at the last.

    r_t = -beta (log pi(a_t) - log ref(a_t)) + [t is the last masked index] score

    Ziegler et al. 2019; Stiennon et al. 2020. Shapes: `scores` (B,), the rest (B, T-1) -> (B, T-1), no gradient.
    A row sums to score - beta KL, where KL is k1 summed over the response (nats). A row without a response is all 0.
    Raises ValueError for other shapes or beta < 0, TypeError for a mask that is not bool.
    Trap: the score belongs to the last real token, which is column -1 in none but the longest row.
    """
    ops.check_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    ops.check_between(0.0, math.inf, beta=beta)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; pass one per row, {tuple(mask.shape[:1])}")
    kl = ops.kl_k1(logprobs, ref_logprobs)  # >= 0 in expectation over the policy's own samples
    masked_so_far = mask.cumsum(-1)
    last = mask & (masked_so_far == masked_so_far[:, -1:])
    return ops.select(torch.where(last, scores[:, None] - beta * kl, -beta * kl), mask)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the masked actions of each row: `(advantages, returns)`.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t

    Schulman et al. 2016, eq. 16; V and A after the last action are 0. Shapes: all (B, T-1), no gradient.
    lam = 1 is the discounted sum of rewards less V_t, lam = 0 is delta_t.
    Raises ValueError for other shapes or gamma, lam outside [0, 1], TypeError for a mask that is not bool.
    Trap: returns are the target of the value model, so they are made before the advantages are whitened.
    """
    ops.check_mask(mask, rewards=rewards, values=values)
    ops.check_between(0.0, 1.0, gamma=gamma, lam=lam)
    rewards, values = ops.upcast(rewards), ops.upcast(values)
    advantages = torch.zeros_like(rewards + values)  # the wider dtype of the two
    next_value = torch.zeros_like(values[:, :1])
    next_advantage = torch.zeros_like(advantages[:, :1])
    for t in reversed(range(mask.shape[1])):
        acts, value = mask[:, t : t + 1], values[:, t : t + 1]
        delta = rewards[:, t : t + 1] + gamma * next_value - value
        # Padding hands on what came after it (0 behind the response), so that its content never enters.
        next_advantage = torch.where(acts, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(acts, value, next_value)
        advantages[:, t : t + 1] = next_advantage
    return ops.select(advantages, mask), ops.select(advantages + values, mask)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The clipped surrogate of PPO, as a loss: the mean over masked tokens.

    L = mean_t max(-A_t rho_t, -A_t clamp(rho_t, 1 - clip, 1 + clip)),  rho_t = exp(log pi(a_t) - log pi_old(a_t))

    Schulman et al. 2017, eq. 7. Shapes: all (B, T-1) -> scalar; gradient to `logprobs` alone. `denominator` is the
    count of masked tokens in the whole optimizer batch. An empty mask gives 0. `clip=math.inf` clips nothing. Raises
    ValueError for unequal shapes or clip <= 0, TypeError for a mask that is not bool. Trap: the sign. The paper
    maximises the min of A rho; a loss takes the max of the negatives.
    """
    ops.check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ops.check_positive(clip=clip)
    # Selected before exp: an inf in the padding would be nan in the gradient.
    ratio = ops.select(ops.log_ratio(logprobs, old_logprobs.detach()), mask).exp()
    advantages = ops.select(advantages, mask).detach()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return ops.masked_mean(losses, mask, denominator=denominator)


def _clipped_values(values: Tensor, old_values: Tensor, *, clip: float) -> Tensor:
    return values.clamp(old_values - clip, old_values + clip)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Half the squared error of the values, clipped around those of the rollout: the mean over masked tokens.

    L = mean_t 1/2 max((V_t - R_t)^2, (clamp(V_t, V_old - clip, V_old + clip) - R_t)^2)

    Ziegler et al. 2019 (their code); the half is part of it. Shapes: all (B, T-1) -> scalar; gradient to `values`
    alone. `denominator`, empty masks, `clip=math.inf` and errors as `policy_loss`. `clip` is in units of the value.
    Trap: max, not min: clipping may only raise the loss, so a value that has moved too far away gets no gradient back
    from the clipped term but still gets one from the plain term where that is the larger.
    """
    ops.check_mask(mask, values=values, old_values=old_values, returns=returns)
    ops.check_positive(clip=clip)
    values = ops.select(values, mask)
    old_values = ops.select(old_values, mask).detach()
    returns = ops.select(returns, mask).detach()
    clipped = _clipped_values(values, old_values, clip=clip)
    losses = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return ops.masked_mean(losses, mask, denominator=denominator)


@dataclass
class AdaptiveKL:
    """The controller that moves beta so that the KL stays near a target.

    beta <- beta (1 + clamp(kl / target - 1, -0.2, 0.2) n / horizon)

    Ziegler et al. 2019, section 2.2, with 0.1 for n / horizon, which is their code's. `beta`, `target` (nats a
    sequence) and `horizon` (episodes) must be above 0, else ValueError; the fields are all of its state. Trap: `target`
    is for the KL summed over a sequence, not for the mean over tokens.
    """

    beta: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        ops.check_positive(beta=self.beta, target=self.target, horizon=self.horizon)

    def update(self, kl: float | Tensor, n: int) -> None:
        """Move `beta` after `n` episodes whose mean sequence KL was `kl` (see `ops.sequence_kl`).

        Raises ValueError for a kl that is not finite, for n <= 0 and for n of 5 horizons or more, where a low KL would
        make beta negative.
        """
        ops.check_positive(n=n)
        if not math.isfinite(kl):
            raise ValueError(f"kl is {kl}; the run has diverged, and beta cannot follow it")
        if 0.2 * n >= self.horizon:
            raise ValueError(f"n is {n} but horizon is {self.horizon}; update more often or raise the horizon")
        error = min(max(float(kl) / self.target - 1.0, -0.2), 0.2)  # float: a tensor would turn beta into one
        self.beta *= 1.0 + error * n / self.horizon


@torch.no_grad()
def policy_diagnostics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    denominator: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Diagnostics to log beside `policy_loss`; same arguments, 0-d tensors, no gradient.

    `approximate_kl`: 1/2 mean (log rho)^2, an estimate of KL(old || new) that is never negative, in nats per token.
    `clip_fraction`: share of tokens whose clipped term is the larger loss, which get no gradient.
    `ratio`: mean rho, 1 before the first update. `ratio_deviation`: largest |rho - 1|.
    Over micro-batches with `denominator` the first three add up; the last combines by its maximum.
    """
    ops.check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ops.check_positive(clip=clip)
    log_ratio = ops.select(ops.log_ratio(logprobs, old_logprobs), mask)
    ratio = log_ratio.exp()
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip) > -advantages * ratio
    deviation = torch.expm1(log_ratio).abs()
    return {
        "approximate_kl": 0.5 * ops.masked_mean(log_ratio.square(), mask, denominator=denominator),
        "clip_fraction": ops.masked_mean(clipped.to(ratio.dtype), mask, denominator=denominator),
        "ratio": ops.masked_mean(ratio, mask, denominator=denominator),
        "ratio_deviation": deviation.max() if deviation.numel() else deviation.sum(),
    }


@torch.no_grad()
def value_diagnostics(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float,
    denominator: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Diagnostics to log beside `value_loss`; same arguments, 0-d tensors, no gradient.

    `value_clip_fraction`: share of tokens whose clipped term is the larger loss, which get no gradient.
    `value_error`: mean |V - R|, in units of the reward. Over micro-batches with `denominator` both add up.
    """
    ops.check_mask(mask, values=values, old_values=old_values, returns=returns)
    ops.check_positive(clip=clip)
    values, old_values, returns = (ops.select(x, mask) for x in (values, old_values, returns))
    plain = (values - returns).abs()
    clipped = (_clipped_values(values, old_values, clip=clip) - returns).abs()
    return {
        "value_clip_fraction": ops.masked_mean((clipped > plain).to(plain.dtype), mask, denominator=denominator),
        "value_error": ops.masked_mean(plain, mask, denominator=denominator),
    }


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of the returns that the values explain, over the whole rollout.

    1 - Var(R - V) / Var(R), variances over the mask; 0 where the returns do not vary (deviation below 1e-4)

    Shapes: all (B, T-1) -> scalar, no gradient. 1 is a perfect value model, 0 a constant one, below 0 a harmful one.
    Trap: not additive over micro-batches; call it once with the values of the rollout.
    """
    ops.check_mask(mask, values=values, returns=returns)

    def variance(x: Tensor) -> Tensor:
        return ops.masked_mean((x - ops.masked_mean(x, mask)).square(), mask)

    returns = ops.upcast(returns)
    total = variance(returns)
    return torch.where(total > ops.VARIANCE_EPS, 1.0 - variance(returns - values) / total, 0.0)

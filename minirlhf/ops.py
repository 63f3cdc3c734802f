"""Operations that every loss shares: token log-probabilities, masked means, whitening, KL estimators, entropy.

Index t of a per-token tensor `(B, T-1)` belongs to the token at t+1. `token_logprobs` shifts so, and so do
`Batch.mask`, `GPT.logprobs`, `Samples.logprobs` and `ValueModel`: their results line up.

Two rules hold in all of the maths modules. A mask is bool, has the shape of what it masks and is applied by
`select` before any arithmetic, because `nan * 0` is nan, in the gradient too. Half types are upcast to float32;
float64 stays.

Left out on purpose: broadcasting masks and `mask=None`. Both turn a forgotten mask into a plausible number.
"""

import torch
from torch import Tensor

VARIANCE_EPS = 1e-8


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged if it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def select(x: Tensor, mask: Tensor) -> Tensor:
    """Keep `x` where `mask` is true and put exactly 0 elsewhere: the padding reaches neither value nor gradient.

    Shapes equal, any -> the same, float32 or float64. Trap: x * mask is not this, since nan * 0 is nan.
    """
    return torch.where(mask, upcast(x), 0.0)


def check_shapes(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the shape of the first: broadcasting would give a plausible number."""
    first, *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first[1].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but {first[0]} has shape {tuple(first[1].shape)}; "
                "pass tensors of equal shape"
            )


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Raise TypeError unless `mask` is bool, ValueError unless the tensors have its shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; pass a bool mask, for example mask != 0")
    check_shapes(mask=mask, **tensors)


def check_pairs(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are `(N,)`, one number per sequence: per-token input must be summed first."""
    name, first = next(iter(tensors.items()))
    if first.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(first.shape)}; pass one number per sequence, shape (N,)")
    check_shapes(**tensors)


def check_positive(**numbers: float) -> None:
    """Raise ValueError unless every number is above 0 (nan is not)."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}; it must be above 0")


def check_between(low: float, high: float, **numbers: float) -> None:
    """Raise ValueError unless every number lies in the closed interval from `low` to `high` (nan does not)."""
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name} is {number}; it must lie between {low} and {high}")


def mean(x: Tensor, *, denominator: float | Tensor | None = None) -> Tensor:
    """Sum all of `x` and divide by the count of its elements, or by `denominator`.

    mean(x) = sum_i x_i / max(count, 1)

    Shapes: any -> scalar. A number or 0-d tensor as `denominator` is the count of the whole optimizer batch, so that
    the results of micro-batches add up to the result of the batch; a number must be above 0. No elements give 0 with
    zero gradient. Trap: a tensor `denominator` is not checked for 0, since that would wait for the device.
    """
    if denominator is None:
        denominator = max(x.numel(), 1)
    elif isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}; pass a number or a 0-d tensor")
    else:
        check_positive(denominator=denominator)
    return upcast(x).sum() / denominator


def masked_mean(x: Tensor, mask: Tensor, *, denominator: float | Tensor | None = None) -> Tensor:
    """Average `x` where `mask` is true.

    masked_mean(x, m) = sum_i m_i x_i / max(sum_i m_i, 1)

    Shapes: `x` and `mask` equal, any -> scalar. `denominator` replaces the count, see `mean`. An empty mask gives 0
    with zero gradient. Raises TypeError for a mask that is not bool and ValueError for unequal shapes. Trap: over
    micro-batches of unequal length the mean of means is not the mean; pass the whole batch's count.
    """
    check_mask(mask, x=x)
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    return mean(select(x, mask), denominator=denominator)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale `x` to mean 0 and deviation 1 over the mask; 0 off the mask.

    whiten(x) = (x - mu) / sqrt(sigma^2 + 1e-8),  sigma^2 = masked_mean((x - mu)^2), the biased variance

    Shapes: `x` and `mask` equal, any -> the same. Biased as in Ziegler et al. 2019 (their code); TRL divides by the
    count less one. One masked element, or equal ones, give 0. Errors as `masked_mean`.
    Trap: whiten the advantages of the whole rollout at once; a micro-batch of one token would become 0.
    """
    centred = select(upcast(x) - masked_mean(x, mask), mask)
    return centred * torch.rsqrt(masked_mean(centred.square(), mask) + VARIANCE_EPS)


def rescale(x: Tensor, mask: Tensor) -> Tensor:
    """Scale `x` to deviation 1 over the mask and keep its mean; 0 off the mask.

    rescale(x) = whiten(x) + mu

    Shapes and errors as `whiten`. For rewards: shifting their mean would reward or punish every token and so change the
    task (Ziegler et al. 2019, code: `shift_mean=False`).
    """
    return select(whiten(x, mask) + masked_mean(x, mask), mask)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Score each token with the logits of the position before it.

    token_logprobs[b, t] = log softmax(logits[b, t])[tokens[b, t+1]]

    Shapes: `logits` (B, T, V), `tokens` (B, T) of an integer type -> (B, T-1), float32 or float64.
    Raises ValueError for other shapes. Every id must lie in 0..V-1, padding included.
    Trap: the result at a padded position is a number like any other; only the mask says that it does not count.
    """
    if logits.dim() != 3 or tokens.shape != logits.shape[:2]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and tokens {tuple(tokens.shape)}; pass (B, T, V) and (B, T)"
        )
    logprobs = torch.log_softmax(upcast(logits[:, :-1]), dim=-1)  # (B, T-1, V)
    return logprobs.gather(-1, tokens[:, 1:, None].long()).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the distribution that each row of logits stands for, in nats.

    H = -sum_v p_v log p_v,  p = softmax(logits)

    Shapes: (..., V) -> (...), float32 or float64. A logit of -inf is a token that cannot occur and adds 0.
    Trap: the mean of -logprobs over sampled tokens only estimates this, and only while the sampler is this policy.
    """
    logprobs = torch.log_softmax(upcast(logits), dim=-1)
    # 0 log 0 is 0 here, but 0 * -inf is nan: the logarithm of an impossible token becomes a large finite number.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log p(y) / q(y) from log p(y) and log q(y), in float32 or float64.

    Shapes: equal, any -> the same. Raises ValueError for unequal shapes.
    Trap: half types must be upcast before the difference, which is smaller than their rounding.
    """
    check_shapes(logprobs=logprobs, other_logprobs=other_logprobs)
    return upcast(logprobs) - upcast(other_logprobs)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The plain estimator of KL(pi || ref) for each token: unbiased, of either sign.

    k1 = log pi(y) - log ref(y),  E_pi[k1] = KL(pi || ref) >= 0

    Shapes: equal, any -> the same. Schulman, "Approximating KL divergence", 2020. Raises ValueError for unequal shapes.
    Trap: for rewards only. As a loss on samples of pi its expected gradient is 0: it regularises nothing.
    """
    return log_ratio(logprobs, ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio for each token: low variance, biased, never negative.

    k2 = (log pi(y) - log ref(y))^2 / 2

    Shapes and errors as `kl_k1`. Schulman 2020. As a loss on samples of pi its expected gradient is that of KL(pi ||
    ref). Trap: its value is not the KL. Padding must hold numbers (0 on both sides) before this, for the gradient's
    sake.
    """
    return 0.5 * log_ratio(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimator of KL(pi || ref) with a control variate for each token: unbiased and never negative.

    k3 = (ref(y) / pi(y) - 1) - log(ref(y) / pi(y)),  E_pi[k3] = KL(pi || ref)

    Shapes and errors as `kl_k1`. Schulman 2020. expm1, because exp(x) - 1 loses all digits of a small x.
    Trap: as a loss on samples of pi its expected gradient is that of KL(ref || pi), the other direction.
    Padding must hold numbers (0 on both sides) before this, for the gradient's sake.
    """
    reverse = log_ratio(ref_logprobs, logprobs)  # log ref(y) / pi(y)
    return torch.expm1(reverse) - reverse


@torch.no_grad()
def sequence_kl(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, denominator: float | Tensor | None = None
) -> Tensor:
    """KL(policy || reference) in nats per sequence, estimated on the policy's own samples.

    KL = mean_b sum_t k1_{b,t}

    Shapes: all (B, T-1) -> scalar, no gradient. `denominator` replaces B. Raises ValueError for other shapes, TypeError
    for a mask that is not bool.
    Trap: meant for fresh samples; after updates the recorded samples are no longer the policy's own.
    """
    check_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    kl = select(kl_k1(logprobs, ref_logprobs), mask).sum(-1)  # (B,)
    return mean(kl, denominator=denominator)

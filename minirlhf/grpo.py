"""Advantages without a value model: one number per response, from the rewards of others or from those of the past.

    rloo          r_i - mean of the other responses to the prompt
    grpo          (r_i - mean of all responses to the prompt) / their standard deviation
    grpo-no-std   r_i - mean of all responses to the prompt
    reinforce     r_i - running mean of earlier rewards

The gradient estimate is mean_i A_i grad log pi(y_i). `groups` holds one number per response and says which of them
answer the same prompt; their order says nothing. Every token of a response has the response's advantage.

Left out on purpose: GRPO's division of each response's loss by its own length. `ppo.policy_loss` is a mean over all
tokens of the minibatch for every estimator, as Liu et al. 2025 (arXiv 2503.20783) argue it should be: dividing by
their own length makes long wrong responses cheap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf import ops


def _centred(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards less their group's mean (B,), each row's group as 0..G-1 (B,), and the sizes of the groups (G,)."""
    ops.check_pairs(rewards=rewards, groups=groups)
    if groups.is_floating_point() or groups.dtype == torch.bool:
        raise TypeError(f"groups has dtype {groups.dtype}; pass integers, the number of each row's prompt")
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    if bool((sizes < 2).any()):
        raise ValueError("a group has one response, and nothing to be compared with; sample at least 2 to each prompt")
    rewards = ops.upcast(rewards)
    return rewards - _group_mean(rewards, group, sizes), group, sizes


def _group_mean(x: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    """(B,) the mean of `x` over each row's own group."""
    sums = x.new_zeros(len(sizes)).index_add(0, group, x)
    return (sums / sizes)[group]


@torch.no_grad()
def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """REINFORCE with the mean of the other responses as baseline.

    A_i = r_i - 1/(K-1) sum_{j != i} r_j = K/(K-1) (r_i - mean of the group)

    Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free!"); Ahmadian et al. 2024, arXiv 2402.14740.
    Shapes: `rewards` (B,), `groups` (B,) integers -> (B,), no gradient. A group's advantages sum to 0. As no response
    is in its own baseline, the expected gradient is that of E[r], exactly. Raises ValueError for other shapes or a
    group of one, TypeError for groups that are not integers.
    """
    centred, group, sizes = _centred(rewards, groups)
    k = sizes[group].to(centred.dtype)
    return centred * (k / (k - 1))


@torch.no_grad()
def grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards whitened within each group.

    A_i = (r_i - mean) / sqrt(variance + 1e-8), mean and biased variance over the group

    Shao et al. 2024, arXiv 2402.03300, section 4.1.2. Shapes and errors as `rloo`. Equal rewards give 0.
    Trap: the division weighs prompts: one on which almost all responses are equally good counts as much as one on which
    they differ widely. With rewards 0 and 1 and many responses the expected gradient of a prompt that is answered right
    with probability p is that of 2 arcsin sqrt(p), not that of p.
    """
    centred, group, sizes = _centred(rewards, groups)
    return centred * torch.rsqrt(_group_mean(centred.square(), group, sizes) + ops.VARIANCE_EPS)


@torch.no_grad()
def grpo_no_std(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards less the mean of their group, not divided by its deviation.

    A_i = r_i - mean over the group, the response itself included

    Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783. Shapes and errors as `rloo`, of which it is (K-1)/K: the expected
    gradient is (K-1)/K of that of E[r].
    """
    return _centred(rewards, groups)[0]


@dataclass
class RunningBaseline:
    """The exponential mean of earlier rewards, a baseline for `reinforce`.

    baseline = sum_k decay^(n-k) m_k / sum_k decay^(n-k),  m_1..m_n the mean rewards of the rollouts so far; 0 at first

    Williams 1992. The fields are all of its state. Trap: update it after the rollout's advantages are made:
    a baseline that holds the response's own reward is not independent of it, and the gradient would be biased.
    """

    decay: float
    total: float = 0.0
    weight: float = 0.0

    def __post_init__(self) -> None:
        ops.check_between(0.0, 1.0, decay=self.decay)

    @property
    def value(self) -> float:
        """The baseline now, in units of the reward."""
        return self.total / self.weight if self.weight else 0.0

    def update(self, reward: float) -> None:
        """Take in the mean reward of a rollout."""
        self.total = self.decay * self.total + reward
        self.weight = self.decay * self.weight + 1.0


@torch.no_grad()
def reinforce(rewards: Tensor, *, baseline: float) -> Tensor:
    """Rewards less one number that does not depend on them.

    A_i = r_i - baseline

    Williams 1992. Shapes: (B,) -> (B,), no gradient. Any constant baseline leaves the expected gradient that of E[r]; a
    good one lowers its variance. Raises ValueError for other shapes.
    """
    ops.check_pairs(rewards=rewards)
    return ops.upcast(rewards) - baseline


@torch.no_grad()
def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """A response's advantage at each of its tokens: (B,) and a mask (B, T-1) -> (B, T-1), 0 off the mask.

    Right because the reward is for the whole response: its gradient is A sum_t grad log pi(a_t).
    """
    ops.check_mask(mask, advantages=advantages[:, None].expand(mask.shape))
    return ops.select(advantages[:, None].expand(mask.shape), mask)


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The KL penalty as a loss: the mean over masked tokens of `k2` or `k3`.

    k2 = (log pi - log ref)^2 / 2,  k3 = ref / pi - 1 - log(ref / pi)

    On samples of pi, at each position the expected gradient
        of k1 = log pi - log ref as a loss is 0: E_pi[grad log pi] = 0, it regularises nothing and is refused;
        of k2 is E_pi[(log pi - log ref) grad log pi], that of KL(pi || ref), what k1 in the reward also descends;
        of k3 is E_pi[(1 - ref / pi) grad log pi], that of KL(ref || pi), the other direction, though its value
        estimates KL(pi || ref).
    Schulman 2020; k3 as in Shao et al. 2024, eq. 4. Shapes: (B, T-1) each -> scalar; gradient to `logprobs` alone.
    Both see each token's own choice alone. In the reward the KL is a sum over the response, so that an early token also
    pays for where it leads; and after an update the samples are the old policy's, for which nothing corrects here.
    Raises ValueError for another estimator or other shapes, TypeError for a mask that is not bool.
    """
    ops.check_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    kinds = {"k2": ops.kl_k2, "k3": ops.kl_k3}
    if estimator not in kinds:
        raise ValueError(f"estimator is {estimator!r}; pass k2 or k3: as a loss k1 has no gradient in expectation")
    # Selected first: padding may hold anything, and exp of it would be inf or nan in the gradient.
    kl = kinds[estimator](ops.select(logprobs, mask), ops.select(ref_logprobs, mask).detach())
    return ops.masked_mean(kl, mask, denominator=denominator)

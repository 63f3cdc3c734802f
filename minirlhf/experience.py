"""A rollout with what the update learns from it: rewards with the KL penalty, and the advantages estimated once.

With values, rewards are a token's and advantages come from GAE. Without, a response has one reward and one advantage,
from the other responses to its prompt or from a running mean (minirlhf/advantages.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf import ops, ppo
from minirlhf.grpo import RunningBaseline, grpo, grpo_no_std, per_token, reinforce, rloo
from minirlhf.rollout import Rollout
from minirlhf.runtime import require_finite

GROUPED = {"rloo": rloo, "grpo": grpo, "grpo-no-std": grpo_no_std}  # these compare the responses to a prompt


@dataclass
class Experience(Rollout):
    """A rollout with what the update learns from it, (B, T-1) each: advantages, and returns (0 without values)."""

    advantages: Tensor
    returns: Tensor


def learn_from(
    rollout: Rollout, *, beta: float, gamma: float, lam: float, whiten_rewards: bool, whiten_advantages: bool = True
) -> Experience:
    """Rewards with the KL penalty, then GAE; advantages are whitened over the whole rollout, after the returns."""
    mask = rollout.mask
    rewards = ppo.kl_penalised_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask, beta=beta)
    if whiten_rewards:
        rewards = ops.rescale(rewards, mask)
    advantages, returns = ppo.gae(rewards, rollout.values, mask, gamma=gamma, lam=lam)
    if whiten_advantages:
        advantages = ops.whiten(advantages, mask)
    require_finite(scores=rollout.scores, rewards=rewards, advantages=advantages, returns=returns)
    return Experience(**vars(rollout), advantages=advantages, returns=returns)


def learn_without_values(
    rollout: Rollout, *, advantages: str, beta: float, baseline: RunningBaseline | None
) -> Experience:
    """One reward a response, its score less beta KL, then one advantage a response, at each of its tokens alike."""
    mask = rollout.mask
    rewards = ppo.kl_penalised_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask, beta=beta)
    rewards = rewards.sum(dim=1)
    if advantages in GROUPED:
        each = GROUPED[advantages](rewards, rollout.groups)
    else:
        each = reinforce(rewards, baseline=baseline.value)
    require_finite(scores=rollout.scores, rewards=rewards, advantages=each)
    return Experience(**vars(rollout), advantages=per_token(each, mask), returns=torch.zeros_like(rollout.values))


def rollout_metrics(rollout: Rollout, experience: Experience, *, valued: bool = True) -> dict[str, Tensor]:
    """What the policy did before this iteration's update; `valued` says that there is a value model to measure."""
    mask = rollout.mask
    explained = {"explained_variance": ppo.explained_variance(rollout.values, experience.returns, mask)}
    return {
        "score": rollout.scores.mean(),
        "kl": ppo.sequence_kl(rollout.old_logprobs, rollout.ref_logprobs, mask),
        "score_std": rollout.scores.std(correction=0),
        "response_length": mask.sum(dim=1).float().mean(),
        "eos_rate": rollout.finished.float().mean(),
        **(explained if valued else {}),
        "sampling_gap": rollout.sampling_gap.max(),
    }

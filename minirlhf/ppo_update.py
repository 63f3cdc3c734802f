"""The update of PPO: several epochs of shuffled minibatches over one rollout, policy and value model together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from minirlhf import distributed, ops, ppo
from minirlhf.batch import Batch, Example, own_micro_batches, pad, permutation
from minirlhf.experience import Experience
from minirlhf.grpo import RunningBaseline, kl_loss
from minirlhf.model import GPT
from minirlhf.optim import clip_gradients
from minirlhf.reward import ValueModel
from minirlhf.runtime import Stream, require_finite


class Config(Protocol):
    """What the update reads of the stage's configuration; train_ppo.py explains and sets each."""

    seed: int
    epochs: int
    minibatches: int
    temperature: float
    beta: float
    clip: float | None
    value_clip: float | None
    kl_in: Literal["reward", "loss"]
    kl_estimator: Literal["k2", "k3"]
    ptx_coefficient: float
    stop_kl: float | None
    max_grad_norm: float
    micro_batch_tokens: int


@dataclass
class State:
    """All that changes while the stage runs. Prompt order and random streams are functions of `iteration`."""

    policy: GPT
    value_model: ValueModel | None  # None where the advantages need no values
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer | None
    kl_controller: ppo.AdaptiveKL | None
    iteration: int = 0
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out
    baseline: RunningBaseline | None = None  # reinforce's


def beta_now(state: State, config: Config) -> float:
    """The coefficient of the KL penalty in this iteration."""
    return state.kl_controller.beta if state.kl_controller else config.beta


def summed_metrics(state: State, config: Config) -> list[str]:
    """What a step measures as sums over tokens, each divided by the tokens of the whole minibatch."""
    names = ["policy_loss", *(["value_loss"] if state.value_model else [])]
    names += ["kl_loss"] if config.kl_in == "loss" else []
    names += ["entropy", "approximate_kl", "clip_fraction", "ratio"]
    return names + (["value_clip_fraction", "value_error"] if state.value_model else [])


Losses = tuple[dict[str, Tensor], dict[str, Tensor]]  # with gradient, and what else to log


def policy_losses(state: State, part: Experience, config: Config, tokens: Tensor) -> Losses:
    """The policy's losses on a micro-batch of a minibatch with so many `tokens`."""
    mask, clip = part.mask, math.inf if config.clip is None else config.clip
    logprobs, entropy = state.policy.logprobs_and_entropy(part.tokens, mask, temperature=config.temperature)
    old = (part.old_logprobs, part.advantages, mask)
    losses = {"policy_loss": ppo.policy_loss(logprobs, *old, clip=clip, denominator=tokens)}
    if config.kl_in == "loss":
        kind = config.kl_estimator
        kl = kl_loss(logprobs, part.ref_logprobs, mask, estimator=kind, denominator=tokens)
        losses["kl_loss"] = beta_now(state, config) * kl
    return losses, {
        "entropy": ops.masked_mean(entropy, mask, denominator=tokens),
        **ppo.policy_diagnostics(logprobs, *old, clip=clip, denominator=tokens),
    }


def value_losses(state: State, part: Experience, config: Config, tokens: Tensor) -> Losses:
    """The value model's loss on such a micro-batch; none without a value model."""
    if state.value_model is None:
        return {}, {}
    clip = math.inf if config.value_clip is None else config.value_clip
    values, targets = state.value_model(part.tokens, part.mask), (part.values, part.returns, part.mask)
    losses = {"value_loss": ppo.value_loss(values, *targets, clip=clip, denominator=tokens)}
    return losses, ppo.value_diagnostics(values, *targets, clip=clip, denominator=tokens)


def part_gradient(state: State, part: Experience, config: Config, tokens: Tensor) -> dict[str, Tensor]:
    """Add a micro-batch's gradient of all losses; returns them, and what else to log of it.

    One model after the other, for the two share no parameter: the activations of one alone are in memory at a time.
    """
    values = {}
    for losses_of in (policy_losses, value_losses):
        losses, seen = losses_of(state, part, config, tokens)
        if losses:
            sum(losses.values()).backward()
        values |= {**{name: loss.detach() for name, loss in losses.items()}, **seen}
    return values


def train_step(
    state: State, minibatch: Experience, config: Config, *, pretraining: Batch | None = None
) -> dict[str, Tensor]:
    """One optimizer step of policy and value model; losses are means over all tokens of the minibatch."""
    tokens = minibatch.mask.sum()  # over micro-batches and processes
    sums = dict.fromkeys(summed_metrics(state, config), torch.zeros(()))
    ratio_deviation = torch.zeros(())
    models = {"policy": (state.policy, state.policy_optimizer), "value": (state.value_model, state.value_optimizer)}
    trained = {name: pair for name, pair in models.items() if pair[0] is not None}
    for _, optimizer in trained.values():
        optimizer.zero_grad(set_to_none=True)
    for index in own_micro_batches(minibatch.lengths, config.micro_batch_tokens):
        seen = part_gradient(state, minibatch.rows(index.to(tokens.device)), config, tokens)
        ratio_deviation = torch.maximum(ratio_deviation, seen.pop("ratio_deviation").cpu())
        sums = {name: value + seen[name].cpu() for name, value in sums.items()}  # one order in all processes
    if pretraining is not None:
        sums["ptx_loss"] = pretraining_gradient(state.policy, pretraining, config)
    sums = distributed.sum_each(sums)
    require_finite(**{name: value for name, value in sums.items() if name.endswith("_loss")})
    for model, _ in trained.values():
        distributed.sum_gradients(model)
    for name, (model, _) in trained.items():
        sums[f"{name}_grad_norm"] = clip_gradients(model, config.max_grad_norm)
    for _, optimizer in trained.values():
        optimizer.step()
    return {**sums, "ratio_deviation": distributed.all_max(ratio_deviation.double())}


def pretraining_gradient(policy: GPT, batch: Batch, config: Config) -> Tensor:
    """Add the gradient of coefficient * mean negative log-likelihood of the texts; returns this loss.

    Ouyang et al. 2022, eq. 2: the term E_pretraining[log pi(x)] of PPO-ptx. Temperature 1, as in train_sft.py.
    """
    tokens, total = batch.mask.sum(), torch.zeros(())
    for index in own_micro_batches(batch.lengths, config.micro_batch_tokens):
        part = batch.rows(index.to(tokens.device))
        logprobs = policy.logprobs(part.tokens, part.mask)
        loss = -config.ptx_coefficient * ops.masked_mean(logprobs, part.mask, denominator=tokens)
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def update(
    state: State, experience: Experience, config: Config, *, texts: Sequence[Example] = ()
) -> dict[str, Tensor | float]:
    """Several epochs over the rollout in shuffled minibatches; every row once an epoch. Means over the steps.

    texts  of PPO-ptx; each step draws as many as its minibatch has rows, or all
    """
    rows: list[dict[str, Tensor]] = []
    for epoch in range(config.epochs):
        key = (config.seed, Stream.MINIBATCH, state.iteration, epoch)
        order = torch.tensor(permutation(len(experience), *key))
        parts = order.tensor_split(min(config.minibatches, len(order)))  # an epoch's last rollout may be small
        for number, index in enumerate(parts):
            minibatch = experience.rows(index.to(experience.tokens.device))
            key = (config.seed, Stream.PRETRAINING, state.iteration, epoch, number)
            drawn = draw(texts, len(minibatch), *key, device=minibatch.tokens.device)
            rows.append(train_step(state, minibatch, config, pretraining=drawn))
            if config.stop_kl is not None and rows[-1]["approximate_kl"] > config.stop_kl:
                return _means(rows)
    return _means(rows)


def draw(examples: Sequence[Example], count: int, *key: int, device: torch.device) -> Batch | None:
    """`count` different examples, or all of fewer, chosen by the key alone; None of none."""
    order = permutation(len(examples), *key)[:count]
    return pad([examples[i] for i in order]).to(device) if order else None


def _means(rows: list[dict[str, Tensor]]) -> dict[str, Tensor | float]:
    first = rows[0].pop("ratio_deviation")
    for row in rows[1:]:
        row.pop("ratio_deviation")
    means = {name: torch.stack([row[name].cpu() for row in rows]).mean() for name in rows[0]}
    return {**means, "first_ratio_deviation": first, "optimizer_steps": len(rows)}

"""Speed of a PPO update, in its three parts, beside TRL 1.12's PPOTrainer, the last release that has one.

    TRL_PPO_PATH=... python benchmarks/speed_ppo.py [--size 124M] [--dtype bfloat16] [--peer PYTHON]    # see speed.py

generation  responses that run to their full length, with their log-probabilities
scoring     the rest of `rollout.collect`: reference, reward and value model
training    advantages, then `train_ppo.train_step`: 4 epochs of minibatches of policy and value model
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import ours
import speed
import torch
import worker
import workloads

import train_ppo
from minirlhf import ops, ppo, reward_functions, rollout
from minirlhf.batch import shuffled
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.runtime import Stream, autocast


def models(size: workloads.Size, device: torch.device) -> dict[str, Any]:
    """Policy, reference and value model as arguments of `rollout.collect`, and the reward model."""
    policy = ours.model(size).to(device)
    reward_model = RewardModel.from_gpt(policy, generator=torch.Generator().manual_seed(1)).to(device)
    reward_model.eval().requires_grad_(False)
    value_model = ValueModel.from_reward_model(reward_model)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    return {"policy": policy, "reference": reference, "value_model": value_model, "reward_model": reward_model}


def settings(size: workloads.Size, device: str) -> train_ppo.Config:
    """The stage's configuration for this workload; every response keeps its score."""
    return dataclasses.replace(
        train_ppo.Config(),
        epochs=size.epochs,
        minibatches=size.minibatches,
        beta=0.05,
        micro_batch_tokens=ours.budget(train_ppo.PRESETS, device),
    )


def update(state: train_ppo.State, collected: rollout.Rollout, config: train_ppo.Config) -> None:
    """Rewards, advantages and epochs of minibatches, as `train_ppo.main` has them."""
    mask, logprobs = collected.mask, (collected.old_logprobs, collected.ref_logprobs)
    rewards = ppo.kl_penalised_rewards(collected.scores, *logprobs, mask, beta=config.beta)
    advantages, returns = ppo.gae(rewards, collected.values, mask, gamma=config.gamma, lam=config.lam)
    experience = rollout.Experience(**vars(collected), advantages=ops.whiten(advantages, mask), returns=returns)
    for epoch in range(config.epochs):
        for minibatch in shuffled(experience, config.minibatches, config.seed, Stream.MINIBATCH, epoch):
            train_ppo.train_step(state, minibatch, config, beta=config.beta, max_tokens=config.micro_batch_tokens)


def prepare(given: argparse.Namespace, channel: worker.Channel) -> Callable[[int], dict[str, float]]:
    size = workloads.size_of(given.size, given.device)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    config, four = settings(size, given.device), models(size, device)
    reward = reward_functions.reward_function(four.pop("reward_model"))
    trained = (four["policy"], four["value_model"])
    optimizers = [adamw(model, learning_rate=ours.LEARNING_RATE, eps=1e-5) for model in trained]
    state = train_ppo.State(*trained, *optimizers, None)
    batches = workloads.prompt_batches(size)
    sampled_at: list[float] = []
    sample = rollout.sample

    def timed(*arguments: Any, **named: Any) -> Any:
        samples = sample(*arguments, **named)
        sampled_at.append(channel.now())
        return samples

    rollout.sample = timed
    channel.ready(worker.training_state(trained))

    def step(number: int) -> dict[str, float]:
        prompts = batches[number % len(batches)].tolist()
        start = channel.now()
        with autocast(device, dtype):
            collected = rollout.collect(
                **four,
                reward=reward,
                prompts=prompts,
                keys=[(number, row) for row in range(len(prompts))],
                seed=0,
                eos_id=None,  # no response ends early, as at the peer
                max_new_tokens=size.response_length,
                temperature=1.0,
                missing_eos_score=None,
                rescore=dtype != torch.float32,
                max_tokens=config.micro_batch_tokens,
            )
            scored = channel.now()
            update(state, collected, config)
        between = sampled_at.pop()
        return {
            "generation_s": between - start,
            "scoring_s": scored - between,
            "training_s": channel.now() - scored,
        }

    return step


if __name__ == "__main__":
    speed.main("ppo", __doc__, prepare)

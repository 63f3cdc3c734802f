"""Speed of a reward-model step: `train_reward.train_step` on pairs of random tokens, beside TRL's RewardTrainer.

    python benchmarks/speed_reward.py [--size 124M] [--dtype bfloat16] [--peer PYTHON]      # see speed.py

Prompts and responses have 16 to 64 tokens each (on a GPU 32 to 256), uniform.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import ours
import speed
import torch
import worker
import workloads

import train_reward
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel
from minirlhf.runtime import autocast


def prepare(given: argparse.Namespace, channel: worker.Channel) -> Callable[[int], None]:
    size = workloads.size_of(given.size, given.device)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    model = RewardModel.from_gpt(ours.model(size), generator=torch.Generator().manual_seed(1)).to(device)
    budget = ours.budget(train_reward.PRESETS, given.device)
    config = dataclasses.replace(train_reward.Config(), micro_batch_tokens=budget, max_grad_norm=1.0)
    state = train_reward.State(model, adamw(model, learning_rate=ours.LEARNING_RATE))
    batches = ours.comparisons(size)
    channel.ready(worker.training_state([model]))

    def step(number: int) -> None:
        with autocast(device, dtype):
            batch = batches[number % len(batches)]
            train_reward.train_step(state, batch, config, device, max_tokens=config.micro_batch_tokens)

    return step


if __name__ == "__main__":
    speed.main("reward", __doc__, prepare)

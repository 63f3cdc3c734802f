"""Speed of a DPO step: the reference's log-probabilities and `train_dpo.train_step`, beside TRL's DPOTrainer.

    python benchmarks/speed_dpo.py [--size 124M] [--dtype bfloat16] [--peer PYTHON]      # see speed.py

One epoch: each pair passes the reference once, here before the first step and at TRL within the step, which is its
faster way for one epoch. A step here is `with_reference` on the batch and then the optimizer step; `training_s` is the
optimizer step alone, what every epoch after the first costs.
Prompts and responses have 16 to 64 tokens each (on a GPU 32 to 256), uniform.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable

import ours
import speed
import torch
import worker
import workloads

import train_dpo
from minirlhf.comparisons import with_reference
from minirlhf.optim import adamw
from minirlhf.runtime import autocast


def prepare(given: argparse.Namespace, channel: worker.Channel) -> Callable[[int], dict[str, float]]:
    size = workloads.size_of(given.size, given.device)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    budget = ours.budget(train_dpo.PRESETS, given.device)
    config = dataclasses.replace(train_dpo.Config(), micro_batch_tokens=budget, beta=0.1, max_grad_norm=1.0)
    policy = ours.model(size).to(device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    state = train_dpo.State(policy, adamw(policy, learning_rate=ours.LEARNING_RATE))
    batches = ours.comparisons(size)
    channel.ready(worker.training_state([policy]))

    def step(number: int) -> dict[str, float]:
        start = channel.now()
        with autocast(device, dtype):
            known = with_reference(reference, batches[number % len(batches)], device, max_tokens=budget)
            between = channel.now()
            train_dpo.train_step(state, known, config, device, max_tokens=config.micro_batch_tokens)
        return {"reference_s": between - start, "training_s": channel.now() - between}

    return step


if __name__ == "__main__":
    speed.main("dpo", __doc__, prepare)

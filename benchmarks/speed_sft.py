"""Speed of an SFT step: `train_sft.train_step` on rows of random tokens, beside TRL and a plain transformers loop.

    python benchmarks/speed_sft.py [--size 124M] [--dtype bfloat16] [--peer PYTHON]      # see speed.py

Every token but a row's first is predicted. The step is that of the script: micro-batches, forward, backward, clipping,
AdamW, and its checks of loss and gradient norm.
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

import train_sft
from minirlhf.batch import Example, pad
from minirlhf.optim import adamw
from minirlhf.runtime import autocast


def prepare(given: argparse.Namespace, channel: worker.Channel) -> Callable[[int], None]:
    size = workloads.size_of(given.size, given.device)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    model = ours.model(size).to(device)
    budget = ours.budget(train_sft.PRESETS, given.device)
    config = dataclasses.replace(train_sft.Config(), micro_batch_tokens=budget, max_grad_norm=1.0)
    state = train_sft.State(model, adamw(model, learning_rate=ours.LEARNING_RATE))
    batches = [pad([Example(row[:1], row[1:]) for row in batch.tolist()]) for batch in workloads.sft_batches(size)]
    channel.ready(worker.training_state([model]))

    def step(number: int) -> None:
        batch = batches[number % len(batches)].to(device)
        with autocast(device, dtype):
            train_sft.train_step(state, batch, config, max_tokens=config.micro_batch_tokens)

    return step


if __name__ == "__main__":
    speed.main("sft", __doc__, prepare)

"""Speed of sampling: `generate.generate`, its log-probabilities included, beside transformers' generate without them.

    python benchmarks/speed_generate.py [--size 124M] [--dtype bfloat16] [--peer PYTHON]      # see speed.py

Responses run to their full length, sampled from the whole vocabulary at temperature 1. In bfloat16 ours runs under
autocast as the stages do, and the peer has bfloat16 weights. Nothing is trained, so memory above the floor is what
stands beside the weights: cache, logits, and under autocast a copy of the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import ours
import speed
import torch
import worker
import workloads

from minirlhf.generate import generate
from minirlhf.runtime import autocast


def prepare(given: argparse.Namespace, channel: worker.Channel) -> Callable[[int], None]:
    size = workloads.size_of(given.size, given.device)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    model = ours.model(size).to(device)
    prompts = workloads.generation_prompts(size).tolist()
    channel.ready(0)

    def step(number: int) -> None:
        with autocast(device, dtype):
            samples = generate(model, prompts, max_new_tokens=size.new_tokens, eos_id=None, seed=number)
        assert samples.tokens.shape == (size.rows, size.prompt_length + size.new_tokens)

    return step


if __name__ == "__main__":
    speed.main("generate", __doc__, prepare)

"""Our side of the speed benchmarks: models of a size, its comparisons, and the settings that all stages share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import workloads

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))  # for `real`, which they share
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts, where they are not installed

from minirlhf.batch import Example
from minirlhf.comparisons import Comparison
from minirlhf.model import GPT, GPTConfig

LEARNING_RATE = 1e-5  # the peers' too


def model(size: workloads.Size) -> GPT:
    """A model of random weights."""
    config = GPTConfig(size.vocabulary, size.context, size.layers, size.heads, size.width, eos_token_id=workloads.EOS)
    return GPT(config, seed=0)


def comparisons(size: workloads.Size) -> list[list[Comparison]]:
    """Every batch of pairs as comparisons, as the readers make them."""
    return [
        [Comparison([Example(p.prompt, p.chosen), Example(p.prompt, p.rejected)], [(0, 1)]) for p in batch]
        for batch in workloads.pair_batches(size)
    ]


def budget(presets: Mapping[str, Any], device: str) -> int:
    """The stage's own default of --micro-batch-tokens: the small preset's on a CPU, gpt2's on a GPU."""
    return presets["gpt2" if device == "cuda" else "tiny"].micro_batch_tokens

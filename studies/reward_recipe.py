"""How one reward model of reward_cv.py is made: its settings, its trunk and its training."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import project  # noqa: F401  first: it finds the package
import tiktoken
import torch
from folds import FILES, FOLDS
from torch import Tensor

import train_reward
import train_sft
from minirlhf.batch import Example, batch_indices, over_micro_batches, pad, steps_per_epoch
from minirlhf.comparisons import Comparison
from minirlhf.encode import Record, encode_example
from minirlhf.model import GPT, GPTConfig
from minirlhf.optim import adamw, linear_schedule, set_learning_rate
from minirlhf.reward import RewardModel
from minirlhf.runtime import require

CONTEXT = 1024  # tokens
LONGEST = 960  # tokens of a response; of the three sets' 7,938 one is longer, and loses its end
TEXT_ROW = 192  # tokens of a prompt and a response that pretraining reads at a time
MICRO_BATCH_TOKENS = 512  # small ones stay in the cache of one core: 1.4 times as fast as 2048


@dataclass(frozen=True)
class Recipe:
    """What differs between the kinds of pairs; a flag of the same name overrides it.

    vocabulary     tokens of the vocabulary;  texts  kinds of pairs whose texts it is trained on
    members        reward models whose scores are averaged
    epochs         passes over the training pairs
    learning_rate  its peak; warms up over 10 steps, then falls linearly to 0
    trunk          what the trunk was trained on before, always in the training folds: nothing (`random`), the chosen
                   responses (`sft`), or all tokens of both sides (`texts`)
    """

    vocabulary: int
    texts: tuple[str, ...]
    members: int
    epochs: float
    learning_rate: float
    trunk: Literal["random", "sft", "texts"] = "random"


# People disagree about helpful and harmless: there, more passes learn the labels by heart and hold no better.
RECIPES = {
    "helpful": Recipe(2048, tuple(FILES), members=6, epochs=2.0, learning_rate=5e-4),
    "harmless": Recipe(2048, tuple(FILES), members=6, epochs=2.0, learning_rate=5e-4),
    "polite": Recipe(4096, ("polite",), members=6, epochs=5.0, learning_rate=1e-3, trunk="texts"),
}


@dataclass
class Config:
    """What a fold is trained with; the defaults are those of the committed result."""

    kinds: tuple[str, ...] = tuple(FILES)
    """Kinds of pairs to cross-validate."""
    folds: tuple[int, ...] = tuple(range(FOLDS))
    """Folds to hold out, of 0 to 4; fewer make a quicker trial."""
    vocabulary: int | None = None
    """As in RECIPES."""
    n_layer: int = 4
    """Blocks of the trunk."""
    n_embd: int = 64
    """Channels of the trunk."""
    position_scale: float = 0.1
    """Factor of the initial position embeddings."""
    prompt_tokens: int = 4
    """Last tokens of the prompt that the reward model reads."""
    trunk: Literal["random", "sft", "texts"] | None = None
    """As in RECIPES."""
    trunk_epochs: float = 3.0
    """Passes of that training."""
    trunk_learning_rate: float = 3e-3
    """Its peak learning rate."""
    members: int | None = None
    """As in RECIPES."""
    epochs: float | None = None
    """As in RECIPES."""
    learning_rate: float | None = None
    """As in RECIPES."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices."""
    token_dropout: float = 0.25
    """Share of a response's tokens left out of it, drawn anew each time it is trained on."""
    batch_size: int = 32
    """Pairs an optimizer step."""
    seed: int = 0
    """Seed of the folds and of all training."""
    work: Path = Path("runs/reward-cv")
    """Folder of finished folds; one a set of settings."""
    out: Path = Path("benchmarks/results")
    """Folder of the result."""


def resolved(config: Config, kind: str) -> Config:
    """The configuration with what is left to the kind of pairs filled in."""
    most = CONTEXT - LONGEST
    require(1 <= config.prompt_tokens <= most, f"--prompt-tokens {config.prompt_tokens}: must be 1 to {most}")
    names = [f.name for f in dataclasses.fields(Recipe) if getattr(config, f.name, kind) is None]
    return dataclasses.replace(config, **{name: getattr(RECIPES[kind], name) for name in names})


def settings(config: Config) -> dict[str, object]:
    """The settings that a fold depends on."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("kinds", "folds", "work", "out")}


def comparisons(encoding: tiktoken.Encoding, records: Sequence[Record], prompt_tokens: int) -> list[Comparison]:
    """One comparison a record, with the last tokens of its prompt."""

    def example(prompt: str, response: str) -> Example:
        whole = encode_example(encoding, prompt, response, max_length=sys.maxsize)
        *ids, eos = whole.response_ids
        return Example(whole.prompt_ids[-prompt_tokens:], [*ids[: LONGEST - 1], eos])

    return [
        Comparison([example(r["prompt"], r["chosen"]), example(r["prompt"], r["rejected"])], [(0, 1)]) for r in records
    ]


@torch.no_grad()
def rescale(gpt: GPT, *, position_scale: float) -> None:
    """Initial weights for a narrow trunk.

    GPT-2's deviation of 0.02 is meant for 768 channels. With C of them a block's output has the same share of the
    residual stream where its matrices are larger by sqrt(768 / C).
    """
    for matrix in (p for p in gpt.h.parameters() if p.ndim == 2):
        matrix.mul_(math.sqrt(768 / gpt.config.n_embd))
    gpt.wpe.weight.mul_(position_scale)


def trunk_rows(encoding: tiktoken.Encoding, records: Sequence[Record], config: Config) -> list[Example]:
    """What a trunk is trained on: chosen responses after their prompts, or every token of both sides."""
    if config.trunk == "sft":
        return [c.examples[0] for c in comparisons(encoding, records, config.prompt_tokens)]
    wide = [e for c in comparisons(encoding, records, CONTEXT) for e in c.examples]
    rows = [[*e.prompt_ids, *e.response_ids][-TEXT_ROW:] for e in wide]
    return [Example(row[:1], row[1:]) for row in rows]


def train_trunk(encoding: tiktoken.Encoding, records: Sequence[Record], config: Config, seed: int) -> GPT:
    """A trunk with random weights, or one trained as a language model on the training folds."""
    shape = GPTConfig(encoding.n_vocab, CONTEXT, config.n_layer, 4, config.n_embd, eos_token_id=encoding.eot_token)
    gpt = GPT(shape, seed=seed)
    rescale(gpt, position_scale=config.position_scale)
    if config.trunk == "random":
        return gpt
    rows = trunk_rows(encoding, records, config)
    state = train_sft.State(gpt, adamw(gpt, learning_rate=config.trunk_learning_rate, weight_decay=config.weight_decay))
    steps = round(config.trunk_epochs * steps_per_epoch(len(rows), config.batch_size))
    for step in range(steps):
        set_learning_rate(state.optimizer, config.trunk_learning_rate * linear_schedule(step, steps, warmup_steps=20))
        batch = pad([rows[i] for i in batch_indices(len(rows), config.batch_size, seed=seed, step=step)])
        train_sft.train_step(state, batch, train_sft.Config(), max_tokens=MICRO_BATCH_TOKENS)
    return gpt


def drop_tokens(comparison: Comparison, share: float, generator: random.Random) -> Comparison:
    """The comparison with each token of its responses left out with probability `share`; their EOS stays."""

    def thinned(example: Example) -> Example:
        *ids, eos = example.response_ids
        return dataclasses.replace(example, response_ids=[*(i for i in ids if generator.random() >= share), eos])

    return dataclasses.replace(comparison, examples=[thinned(e) for e in comparison.examples])


def train(gpt: GPT, pairs: Sequence[Comparison], config: Config, seed: int) -> RewardModel:
    """A reward model on a copy of the trunk, trained on the pairs."""
    model = RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(seed))
    optimizer = adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    state, generator = train_reward.State(model, optimizer), random.Random(seed)
    stage = train_reward.Config()
    steps = round(config.epochs * steps_per_epoch(len(pairs), config.batch_size))
    for step in range(steps):
        set_learning_rate(optimizer, config.learning_rate * linear_schedule(step, steps, warmup_steps=10))
        rows = batch_indices(len(pairs), config.batch_size, seed=seed, step=step)
        batch = [drop_tokens(pairs[i], config.token_dropout, generator) for i in rows]
        train_reward.train_step(state, batch, stage, torch.device("cpu"), max_tokens=MICRO_BATCH_TOKENS)
    return model


@torch.no_grad()
def margins(model: RewardModel, pairs: Sequence[Comparison]) -> Tensor:
    """(N,) score of the chosen less score of the rejected response."""
    batch = pad([e for c in pairs for e in c.examples])
    scores = over_micro_batches(lambda part: model(part.tokens, part.lengths), batch, MICRO_BATCH_TOKENS)
    return scores[0::2] - scores[1::2]

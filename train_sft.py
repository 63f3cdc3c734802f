"""Supervised fine-tuning: teach a GPT-2 to answer by showing it demonstrations.

Minimises the mean negative log-likelihood of the response tokens, the closing EOS included:

    L = - sum_i sum_t log pi(y_it | x_i, y_i<t) / sum_i |y_i|

    python train_sft.py                     # embedded world, small CPU model, about 40 seconds on two cores
    python train_sft.py --preset gpt2 --train demonstrations.jsonl
    torchrun --nproc-per-node 2 train_sft.py

Expect the held-out loss to fall from ln V to well below 1 in the embedded world. The writers there are of mixed
quality and the model imitates the mixture, so there is much left to gain for the stages that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor

from minirlhf import data, distributed, tokenizer
from minirlhf.batch import Batch, Example, batch_indices, count_steps, local_micro_batches, over_micro_batches, pad
from minirlhf.config import Count, NotNegative, Positive, Share, Steps, TokenBudget, TrainConfig, run_script
from minirlhf.encode import Record, encode_demonstrations, split_by_prompt
from minirlhf.hf.hub import model_folder
from minirlhf.model import GPT, GPTConfig, read_config
from minirlhf.ops import masked_mean
from minirlhf.optim import adamw, clip_gradients, cosine_schedule, set_learning_rate
from minirlhf.runs.plan import supervised_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import autocast, project_file, require, require_finite, resolve_compute


@dataclass
class Config(TrainConfig):
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    train: str = str(project_file("world", "demonstrations.train.jsonl"))
    """Demonstrations to learn from: a file of any known format, or a hub name."""
    validation: str | None = None
    """Held-out demonstrations; by default the world's for the world's, else `validation_share` of the prompts."""
    validation_share: Share = 0.1
    """Share of the training prompts that is held out where `validation` is not given."""
    split: str = ""
    """Part of `train`: a split of a hub data set, a slice, or both, e.g. test, [:90%], train[:1000]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query response=reply."""
    validation_split: str = ""
    """Part of `validation`, in the same form."""
    model: str | None = None
    """`gpt2`, `gpt2-medium`, …, a folder or a hub name to start from; by default a new model of the sizes below."""
    tokenizer: str | None = None
    """`world`, `gpt2`, `bytes` or a folder with GPT-2 tokenizer files; by default the model's own, else `world`."""
    n_layer: Count = 3
    """Transformer blocks of a new model."""
    n_head: Count = 4
    """Attention heads of a new model."""
    n_embd: Count = 128
    """Channels of a new model."""
    n_positions: Count | None = None
    """Context of a new model in tokens; longer rows lose the start of their prompt. By default 96 where `train` is the
    world's, else 512."""
    epochs: Positive = 4.0
    """Passes over the training records."""
    batch_size: Count = 32
    """Records per optimizer step."""
    learning_rate: NotNegative = 3e-3
    """Peak learning rate of AdamW; warms up linearly, then follows a cosine down to a tenth."""
    warmup_steps: Steps = 20
    """Optimizer steps of linear warm-up."""
    weight_decay: NotNegative = 0.1
    """AdamW's decay of matrices; biases and LayerNorms are not decayed."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""
    validation_every: Count = 100
    """Optimizer steps between two measurements of the held-out loss."""
    micro_batch_tokens: TokenBudget = 1024
    """Padded tokens per forward pass; `auto` halves until it fits. Changes memory and speed, not the gradient."""


PRESETS = {
    "tiny": Config(),
    "gpt2": Config(
        preset="gpt2",
        run=Path("runs/gpt2"),
        model="gpt2",
        n_layer=12,
        n_head=12,
        n_embd=768,
        n_positions=1024,
        epochs=1.0,  # more lowers the entropy that RL explores with; Huang et al. 2024 and Zephyr train one epoch
        batch_size=128,
        learning_rate=6.35e-5,  # Ziegler et al. 2019, released code, for GPT-2 small
        weight_decay=0.0,
        micro_batch_tokens=32_768,
    ),
}


@dataclass
class State:
    """All that changes while the stage runs. The data position is a function of `step`."""

    model: GPT
    optimizer: torch.optim.Optimizer
    step: int = 0
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out


def train_step(state: State, batch: Batch, config: Config, *, max_tokens: int) -> dict[str, Tensor]:
    """One optimizer step on a batch; the loss is the mean over all its response tokens, however it is divided."""
    tokens = batch.mask.sum()  # of the whole batch: what micro-batches and processes add up is its gradient
    parts: list[dict[str, Tensor]] = []
    state.optimizer.zero_grad(set_to_none=True)
    for index in local_micro_batches(batch.lengths, max_tokens):
        part = batch.rows(index)
        logprobs = state.model.logprobs(part.tokens, part.mask)  # (b, t-1), 0 off the mask
        loss = -masked_mean(logprobs, part.mask, denominator=tokens)  # docs/equations.md#sft
        loss.backward()
        parts.append({"loss": loss.detach()})
    metrics = distributed.add_up(parts, ("loss",))
    require_finite(**metrics)
    distributed.sum_gradients(state.model)
    grad_norm = clip_gradients(state.model, config.max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {**metrics, "grad_norm": grad_norm}


def held_out(model: GPT, examples: Sequence[Example], device: torch.device, *, max_tokens: int) -> dict[str, Tensor]:
    """Mean negative log-likelihood over all response tokens of the examples, in nats."""
    batch = pad(examples).to(device)
    logprobs = over_micro_batches(lambda part: model.logprobs(part.tokens, part.mask), batch, max_tokens)  # (B, T-1)
    return {"validation_loss": -masked_mean(logprobs, batch.mask)}


def held_out_source(config: Config) -> str | None:
    """The source of held-out demonstrations; None where they are a share of the training prompts."""
    world = str(project_file("world", "demonstrations.validation.jsonl"))
    return config.validation or (world if str(config.train) == Config.train else None)


def read_records(config: Config) -> tuple[list[Record], list[Record]]:
    """Training and held-out demonstrations."""
    train = data.load(config.train, "demonstrations", split=config.split, columns=config.columns)
    source = held_out_source(config)
    part = "--validation-split: is a part of --validation, which is not given"
    require(bool(source) or not config.validation_split, part)
    if source is None:
        return split_by_prompt(train, share=config.validation_share, seed=config.seed)
    return train, data.load(source, "demonstrations", split=config.validation_split, columns=config.columns)


def new_shape(config: Config, encoding: tiktoken.Encoding) -> GPTConfig:
    """The shape of a new model. The world's rows are short; those of other files need more room."""
    even = config.n_embd % config.n_head == 0
    require(even, f"--n-embd {config.n_embd}: must be a multiple of --n-head {config.n_head}")
    positions = config.n_positions or (96 if str(config.train) == Config.train else 512)
    sizes = (encoding.n_vocab, positions, config.n_layer, config.n_head, config.n_embd)
    return GPTConfig(*sizes, eos_token_id=encoding.eot_token)


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained model."""
    folder = model_folder(config.model) if config.model else None
    files = data.local_files(config.train, held_out_source(config))
    stage = Stage(config, "sft", inputs=files, models=(folder,) if folder else ())
    if stage.finished:
        return stage.output
    device, dtype = resolve_compute(config.device, config.dtype)
    encoding = tokenizer.load(config.tokenizer or folder or "world")
    sides = read_records(config)
    shape = read_config(folder) if folder else new_shape(config, encoding)
    tokenizer.check_fits(encoding, shape.vocab_size, f"--model {folder}")
    train, validation = (encode_demonstrations(encoding, side, max_length=shape.n_positions) for side in sides)
    require(len(train) > 0 and len(validation) > 0, f"{config.train}: too little to learn from and hold out")
    total_steps = count_steps(config.epochs, len(train), config.batch_size)
    if config.dry_run:
        return stage.show(supervised_plan(config, total_steps, shape, train, validation))
    model = (GPT.from_pretrained(folder).full_precision() if folder else GPT(shape, seed=config.seed)).to(device)
    model.gradient_checkpointing = config.gradient_checkpointing
    state = State(model, adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay))

    with stage.begin(state, steps=total_steps, best=("validation_loss", "min")):
        while state.step < total_steps:
            step = state.step
            factor = cosine_schedule(step, total_steps, warmup_steps=config.warmup_steps)
            learning_rate = set_learning_rate(state.optimizer, config.learning_rate * factor)
            rows = batch_indices(len(train), config.batch_size, seed=config.seed, step=step)
            batch = pad([train[i] for i in rows]).to(device)
            with autocast(device, dtype):
                for attempt in stage.attempts():
                    with attempt as max_tokens:
                        metrics = train_step(state, batch, config, max_tokens=max_tokens)
                if state.step % config.validation_every == 0 or state.step == total_steps:
                    metrics |= held_out(model, validation, device, max_tokens=max_tokens)
                stage.finish(step, {**metrics, "learning_rate": learning_rate}, tokens=int(batch.lengths.sum()))
        stage.save(model, encoding, objective="Supervised fine-tuning on demonstrations.")
    return stage.output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

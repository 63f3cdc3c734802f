"""Supervised fine-tuning: teach a GPT-2 to answer by showing it demonstrations.

Minimises the mean negative log-likelihood of the response tokens, the closing EOS included:

    L = - sum_i sum_t log pi(y_it | x_i, y_i<t) / sum_i |y_i|

    python train_sft.py                     # embedded world, small CPU model, about half a minute on two cores
    python train_sft.py --preset gpt2 --train demonstrations.jsonl --validation held_out.jsonl

Expect the held-out loss to fall from ln V to well below 1 in the embedded world. The writers there are of mixed
quality and the model imitates the mixture, so there is much left to gain for the stages that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minirlhf import data, tokenizer
from minirlhf.metrics import RunLog
from minirlhf.model import GPT, GPTConfig
from minirlhf.ops import masked_mean
from minirlhf.optim import adamw, clip_gradients, cosine_schedule, set_learning_rate
from minirlhf.rollout import over_micro_batches
from minirlhf.runtime import autocast, project_file, resolve_device, resolve_dtype, run_script


@dataclass
class Config:
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    run: Path = Path("runs/tiny")
    """Folder of the run; this stage writes `<run>/sft`."""
    train: Path = project_file("world", "demonstrations.train.jsonl")
    """JSONL file of prompt/response records to learn from."""
    validation: Path = project_file("world", "demonstrations.validation.jsonl")
    """JSONL file of held-out prompt/response records."""
    model: str | None = None
    """Folder of a GPT-2 model to start from; by default a new model of the sizes below."""
    tokenizer: str = "world"
    """`world`, `gpt2`, `bytes` or a folder with GPT-2 tokenizer files."""
    n_layer: int = 3
    """Transformer blocks of a new model."""
    n_head: int = 4
    """Attention heads of a new model."""
    n_embd: int = 128
    """Channels of a new model."""
    n_positions: int = 96
    """Context of a new model in tokens; longer rows lose the start of their prompt."""
    epochs: float = 4.0
    """Passes over the training records."""
    batch_size: int = 32
    """Records an optimizer step."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW; warms up linearly, then follows a cosine down to a tenth."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; biases and LayerNorms are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""
    micro_batch_tokens: int = 1024
    """Padded tokens a forward pass; changes memory and speed, not the gradient."""
    validation_every: int = 100
    """Optimizer steps between two measurements of the held-out loss."""
    seed: int = 0
    """Seed of initial weights and data order."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of matrix products; auto is bfloat16 on CUDA, else float32."""


PRESETS = {
    "tiny": Config(),
    "gpt2": Config(
        preset="gpt2",
        run=Path("runs/gpt2"),
        model="gpt2",
        tokenizer="gpt2",
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


def train_step(state: State, batch: data.Batch, *, micro_batch_tokens: int, max_grad_norm: float) -> dict:
    """One optimizer step on a batch; the loss is the mean over all its response tokens, however it is divided."""
    tokens = batch.mask.sum()
    loss = torch.zeros(())
    state.optimizer.zero_grad(set_to_none=True)
    for index in data.micro_batches(batch.lengths, micro_batch_tokens):
        part = batch.rows(index)
        logprobs = state.model.logprobs(part.tokens, part.mask)
        part_loss = -masked_mean(logprobs, part.mask, denominator=tokens)
        part_loss.backward()
        loss = loss + part_loss.detach().cpu()
    grad_norm = clip_gradients(state.model, max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {"loss": loss, "grad_norm": grad_norm}


def held_out_loss(model: GPT, examples: list[data.Example], device: torch.device, *, max_tokens: int) -> float:
    """Mean negative log-likelihood over all response tokens of the examples, in nats."""
    batch = data.pad(examples).to(device)
    logprobs = over_micro_batches(lambda part: model.logprobs(part.tokens, part.mask), batch, max_tokens)
    return -masked_mean(logprobs, batch.mask).item()


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained model."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    encoding = tokenizer.load(config.tokenizer)
    records = {
        name: data.read_records(path, ("prompt", "response"))
        for name, path in (("train", config.train), ("validation", config.validation))
    }
    model = (
        GPT.from_pretrained(config.model)
        if config.model
        else GPT(
            GPTConfig(
                vocab_size=encoding.n_vocab,
                n_positions=config.n_positions,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                eos_token_id=encoding.eot_token,
            ),
            seed=config.seed,
        )
    )
    max_length = model.config.n_positions
    train = data.encode_demonstrations(encoding, records["train"], max_length=max_length)
    validation = data.encode_demonstrations(encoding, records["validation"], max_length=max_length)
    model.to(device)
    state = State(model, adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay))

    total_steps = round(config.epochs * data.steps_per_epoch(len(train), config.batch_size))
    log = RunLog(config.run / "sft", config, inputs=(config.train, config.validation), steps=total_steps)
    while state.step < total_steps:
        step = state.step
        factor = cosine_schedule(step, total_steps, warmup_steps=config.warmup_steps)
        set_learning_rate(state.optimizer, config.learning_rate * factor)
        rows = data.batch_indices(len(train), config.batch_size, seed=config.seed, step=step)
        batch = data.pad([train[i] for i in rows]).to(device)
        with autocast(device, dtype):
            metrics = train_step(
                state, batch, micro_batch_tokens=config.micro_batch_tokens, max_grad_norm=config.max_grad_norm
            )
            if state.step % config.validation_every == 0 or state.step == total_steps:
                metrics["validation_loss"] = held_out_loss(
                    model, validation, device, max_tokens=config.micro_batch_tokens
                )
        log.row(step, {**metrics, "learning_rate": config.learning_rate * factor}, tokens=int(batch.lengths.sum()))

    model.save_pretrained(config.run / "sft" / "model")
    tokenizer.save(encoding, config.run / "sft" / "model")
    log.close()
    return config.run / "sft" / "model"


if __name__ == "__main__":
    run_script(main, PRESETS)

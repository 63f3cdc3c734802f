"""DPO: learn from the comparisons directly, without a reward model and without sampling.

Minimises, over all (better, worse) pairs of each ranking, with log-probabilities summed over a response's tokens,

    L = - mean over pairs of log sigmoid( beta [ log pi/pi_sft (better) - log pi/pi_sft (worse) ] )

    python train_dpo.py                     # after train_sft.py and `python -m minirlhf.feedback`, about 30 seconds
    python train_dpo.py --beta 0.02         # a weak pull to the SFT model: over-optimises

The reference's log-probabilities are computed once, before the first step, and all responses of a ranking go through
one forward pass, each once, however many pairs it is in. Expect the loss to start at ln 2 = 0.693 exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minirlhf import data, distributed, tokenizer
from minirlhf.batch import batch_indices, count_steps
from minirlhf.comparisons import ReferencedComparison, pair_logprobs, pair_micro_batches, token_count, with_reference
from minirlhf.config import Count, FolderName, NotNegative, Positive, Share, Smoothing, Steps, TrainConfig, run_script
from minirlhf.dpo import MEASURED, diagnostics, dpo_loss
from minirlhf.encode import encode_comparisons, require_both_sides, split_by_prompt
from minirlhf.hf.hub import model_or_earlier
from minirlhf.model import GPT, read_config
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.runs.plan import supervised_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import autocast, require_finite, resolve_compute


@dataclass
class Config(TrainConfig):
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    stage: FolderName = "dpo"
    """Name of this stage's folder in the run; another name keeps an earlier result."""
    policy: str | None = None
    """Folder or hub name of the model that policy and reference start from, by default `<run>/sft/model`."""
    comparisons: str | None = None
    """Rankings or pairs: a file of any known format, or a hub name; by default `<run>/feedback/rankings.jsonl`."""
    split: str = ""
    """Part of `comparisons`: a split of a hub data set, a slice, or both, e.g. test, [:90%], train[:1000]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query chosen=better rejected=worse."""
    validation_share: Share = 0.1
    """Share of the prompts that is held out."""
    epochs: Positive = 3.0
    """Passes over the prompts."""
    batch_size: Count = 32
    """Prompts per optimizer step, each with all its pairs."""
    beta: Positive = 1.0
    """How strongly the policy is held to the reference, per nat; smaller moves further."""
    label_smoothing: Smoothing = 0.0
    """Assumed share of flipped labels (conservative DPO), from 0 to 0.5."""
    learning_rate: NotNegative = 1e-4
    """Peak learning rate of AdamW; warms up linearly, then falls linearly to 0."""
    warmup_steps: Steps = 10
    """Optimizer steps of linear warm-up."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""
    validation_every: Count = 50
    """Optimizer steps between two measurements on held-out comparisons."""
    checkpoint_every: Count = 50
    """Optimizer steps between two checkpoints; the newest two and the best are kept."""


PRESETS = {
    "tiny": Config(),
    "gpt2": Config(
        preset="gpt2",
        run=Path("runs/gpt2"),
        epochs=1.0,  # Rafailov et al. 2023, released code, one epoch on Anthropic HH
        batch_size=64,  # Rafailov et al. 2023, appendix B
        beta=0.1,  # Rafailov et al. 2023, appendix B; 0.5 there for TL;DR
        learning_rate=1e-6,  # Rafailov et al. 2023, appendix B
        warmup_steps=150,  # Rafailov et al. 2023, appendix B
        max_grad_norm=10.0,  # Rafailov et al. 2023, released code
        micro_batch_tokens=32_768,
    ),
}


@dataclass
class State:
    """All that changes while the stage runs."""

    policy: GPT
    optimizer: torch.optim.Optimizer
    step: int = 0
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out


def train_step(
    state: State, comparisons: Sequence[ReferencedComparison], config: Config, device: torch.device, *, max_tokens: int
) -> dict[str, Tensor]:
    """One optimizer step; the loss is the mean over all pairs of the batch, however it is divided."""
    count = sum(len(c.pairs) for c in comparisons)  # N of the whole batch, over micro-batches and processes
    parts: list[dict[str, Tensor]] = []
    state.optimizer.zero_grad(set_to_none=True)
    for part, pairs in pair_micro_batches(comparisons, max_tokens):
        # Chosen and rejected come from one forward pass; the reference's two were stored: 4 x (N,)
        logprobs = pair_logprobs(state.policy, part, pairs.to(device))
        # Rafailov et al. 2023, eq. 7: docs/equations.md#dpo-and-its-kin
        loss = dpo_loss(*logprobs, beta=config.beta, label_smoothing=config.label_smoothing, denominator=count)
        loss.backward()
        parts.append({"loss": loss.detach(), **diagnostics(*logprobs, beta=config.beta, denominator=count)})
    sums = distributed.add_up(parts, MEASURED)
    require_finite(loss=sums["loss"])
    distributed.sum_gradients(state.policy)
    grad_norm = clip_gradients(state.policy, config.max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {**sums, "grad_norm": grad_norm}


@torch.no_grad()
def held_out(
    policy: GPT, comparisons: Sequence[ReferencedComparison], config: Config, device: torch.device, *, max_tokens: int
) -> dict[str, Tensor]:
    """The training metrics on held-out comparisons, without label smoothing in the loss."""
    count = sum(len(c.pairs) for c in comparisons)
    parts: list[dict[str, Tensor]] = []
    for part, pairs in pair_micro_batches(comparisons, max_tokens):
        logprobs = pair_logprobs(policy, part, pairs.to(device))
        loss = dpo_loss(*logprobs, beta=config.beta, denominator=count)
        parts.append({"loss": loss, **diagnostics(*logprobs, beta=config.beta, denominator=count)})
    return {f"validation_{name}": value for name, value in distributed.add_up(parts, MEASURED).items()}


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained policy."""
    device, dtype = resolve_compute(config.device, config.dtype)
    folder = model_or_earlier(config.policy, "--policy", config.run / "sft" / "model", data=config.comparisons)
    file = config.comparisons or config.run / "feedback" / "rankings.jsonl"
    stage = Stage(config, config.stage, inputs=data.local_files(file), models=(folder,))
    if stage.finished:
        return stage.output
    shape, encoding = read_config(folder), tokenizer.load(folder)
    tokenizer.check_fits(encoding, shape.vocab_size, folder)
    records = data.load(file, "pairs", split=config.split, columns=config.columns)
    sides = split_by_prompt(records, share=config.validation_share, seed=config.seed)
    train, validation = (encode_comparisons(encoding, side, max_length=shape.n_positions) for side in sides)
    require_both_sides(file, train, validation)
    total_steps = count_steps(config.epochs, len(train), config.batch_size)
    if config.dry_run:
        scored = token_count([*train, *validation])  # once, by the reference
        return stage.show(
            supervised_plan(config, total_steps, shape, train, validation, frozen=(shape,), scored=scored)
        )
    policy = GPT.from_pretrained(folder).full_precision().to(device)
    policy.gradient_checkpointing = config.gradient_checkpointing
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    state = State(policy, adamw(policy, learning_rate=config.learning_rate))

    with stage.begin(state, steps=total_steps, best=("validation_loss", "min")):
        with autocast(device, dtype):
            tokens = stage.micro_batch_tokens
            both = (with_reference(reference, c, device, max_tokens=tokens) for c in (train, validation))
            learned, measured = both
        while state.step < total_steps:
            step = state.step
            factor = linear_schedule(step, total_steps, warmup_steps=config.warmup_steps)
            learning_rate = set_learning_rate(state.optimizer, config.learning_rate * factor)
            batch = [learned[i] for i in batch_indices(len(train), config.batch_size, seed=config.seed, step=step)]
            with autocast(device, dtype):
                for attempt in stage.attempts():
                    with attempt as max_tokens:
                        metrics = train_step(state, batch, config, device, max_tokens=max_tokens)
                if state.step % config.validation_every == 0 or state.step == total_steps:
                    metrics |= held_out(policy, measured, config, device, max_tokens=max_tokens)
                stage.finish(step, {**metrics, "learning_rate": learning_rate}, tokens=token_count(batch))
        stage.save(policy, encoding, objective="Direct preference optimisation on comparisons.")
    return stage.output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

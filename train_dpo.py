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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minirlhf import data, distributed, tokenizer
from minirlhf.batch import batch_indices, count_steps
from minirlhf.bradley_terry import accuracy
from minirlhf.comparisons import Comparison, PairBatch, over_comparisons, pair_micro_batches, token_count
from minirlhf.config import (
    Count,
    FolderName,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Share,
    Smoothing,
    Steps,
    TokenBudget,
    TrackerName,
    run_script,
)
from minirlhf.dpo import dpo_loss, implicit_rewards
from minirlhf.encode import encode_comparisons, require_both_sides, split_by_prompt
from minirlhf.hf.hub import model_or_earlier
from minirlhf.model import GPT, read_config
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.runs.card import write_model_card
from minirlhf.runs.plan import show_plan, supervised_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import autocast, require_finite, resolve_device, resolve_dtype


@dataclass
class Config(Settings):
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    run: Path = Path("runs/tiny")
    """Folder of the run; this stage writes `<run>/dpo`."""
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
    """Prompts an optimizer step, each with all its pairs."""
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
    micro_batch_tokens: TokenBudget = 2048
    """Padded tokens a forward pass; `auto` halves until it fits. Changes memory and speed, not the gradient."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone and compute the rest again backward: less memory, one more forward pass."""
    validation_every: Count = 50
    """Optimizer steps between two measurements on held-out comparisons."""
    track: TrackerName | None = None
    """Show the metrics in `tensorboard` or `wandb` as well; Weights & Biases stays offline unless WANDB_MODE is set."""
    dry_run: bool = False
    """Say what would be done and about what it takes, read no weights and write nothing."""
    resume: bool = False
    """Go on from the newest whole checkpoint; a finished stage is left as it is."""
    checkpoint_every: Count = 50
    """Optimizer steps between two checkpoints; the newest two and the best are kept."""
    seed: Seed = 0
    """Seed of the split and the data order."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of matrix products; auto is bfloat16 on CUDA, else float32."""


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


# What a step measures as sums over pairs, each divided by the pairs of the whole batch.
SUMMED = ("loss", "accuracy", "reward_chosen", "reward_rejected", "margin", "logprob_chosen", "logprob_rejected")


@dataclass
class State:
    """All that changes while the stage runs."""

    policy: GPT
    optimizer: torch.optim.Optimizer
    step: int = 0
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out


@dataclass(frozen=True)
class ReferencedComparison(Comparison):
    """A comparison with the frozen reference's log-probability of each response, summed over its tokens."""

    ref_seq_logprobs: list[float]


def seq_logprobs(model: GPT, batch: PairBatch, *, temperature: float = 1.0) -> Tensor:
    """(R,) log pi(y|x) of R responses: summed over the tokens, never averaged, because length matters in DPO."""
    hidden = model.hidden(batch.tokens, positions=batch.positions, visible=batch.visible).flatten(0, 1)
    targets = batch.tokens.flatten()[batch.targets]
    logprobs = model.head_logprobs(hidden[batch.sources], targets, temperature=temperature)
    return logprobs.new_zeros(len(batch.ends)).index_add(0, batch.owners, logprobs)


def with_reference(
    reference: GPT, comparisons: list[Comparison], device: torch.device, *, max_tokens: int
) -> list[ReferencedComparison]:
    """Compute the reference's log-probabilities, once for the whole stage, and keep them with the comparisons."""
    ref = over_comparisons(lambda batch: seq_logprobs(reference, batch), comparisons, max_tokens, device)
    return [ReferencedComparison(c.examples, c.pairs, r.tolist()) for c, r in zip(comparisons, ref, strict=True)]


def pair_logprobs(
    policy: GPT, comparisons: list[ReferencedComparison], pairs: PairBatch, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four (N,) arguments of `dpo_loss`, chosen and rejected from one forward pass."""
    logprobs = seq_logprobs(policy, pairs, temperature=temperature)
    known = [value for c in comparisons for value in c.ref_seq_logprobs]
    ref = torch.tensor(known, dtype=logprobs.dtype, device=logprobs.device)
    return logprobs[pairs.chosen], logprobs[pairs.rejected], ref[pairs.chosen], ref[pairs.rejected]


def diagnostics(four: tuple[Tensor, Tensor, Tensor, Tensor], *, beta: float, denominator: int) -> dict[str, Tensor]:
    """Means over pairs: implicit rewards, accuracy, and both log-probabilities, since the chosen one may fall too."""
    chosen, rejected = implicit_rewards(*four, beta=beta)
    sums = {
        "accuracy": accuracy(chosen, rejected) * len(chosen),
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "margin": (chosen - rejected).sum(),
        "logprob_chosen": four[0].detach().sum(),
        "logprob_rejected": four[1].detach().sum(),
    }
    return {name: value.cpu() / denominator for name, value in sums.items()}


def train_step(state: State, comparisons: list[ReferencedComparison], config: Config, device: torch.device) -> dict:
    """One optimizer step; the loss is the mean over all pairs of the batch, however it is divided."""
    count = sum(len(c.pairs) for c in comparisons)  # of the whole batch, over micro-batches and processes
    sums = dict.fromkeys(SUMMED, torch.zeros(()))
    state.optimizer.zero_grad(set_to_none=True)
    for part, pairs in pair_micro_batches(comparisons, config.micro_batch_tokens):
        four = pair_logprobs(state.policy, part, pairs.to(device))
        loss = dpo_loss(*four, beta=config.beta, label_smoothing=config.label_smoothing, denominator=count)
        loss.backward()
        seen = {"loss": loss.detach().cpu(), **diagnostics(four, beta=config.beta, denominator=count)}
        sums = {name: sums[name] + value for name, value in seen.items()}
    sums = distributed.sum_each(sums)
    require_finite(loss=sums["loss"])
    distributed.sum_gradients(state.policy)
    grad_norm = clip_gradients(state.policy, config.max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {**sums, "grad_norm": grad_norm}


@torch.no_grad()
def held_out(policy: GPT, comparisons: list[ReferencedComparison], config: Config, device: torch.device) -> dict:
    """The training metrics on held-out comparisons, without label smoothing in the loss."""
    count = sum(len(c.pairs) for c in comparisons)
    sums = dict.fromkeys(SUMMED, torch.zeros(()))
    for part, pairs in pair_micro_batches(comparisons, config.micro_batch_tokens):
        four = pair_logprobs(policy, part, pairs.to(device))
        loss = dpo_loss(*four, beta=config.beta, denominator=count)
        seen = {"loss": loss.cpu(), **diagnostics(four, beta=config.beta, denominator=count)}
        sums = {name: sums[name] + value for name, value in seen.items()}
    return {f"validation_{name}": value for name, value in distributed.sum_each(sums).items()}


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained policy."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = model_or_earlier(config.policy, "--policy", config.run / "sft" / "model", data=config.comparisons)
    file = config.comparisons or config.run / "feedback" / "rankings.jsonl"
    output = config.run / config.stage / "model"
    stage = Stage(
        config.run / config.stage, config, inputs=data.local_files(file), models=(folder,), resume=config.resume
    )
    if stage.finished:
        return output
    records = data.load(file, "pairs", split=config.split, columns=config.columns)
    shape = read_config(folder)
    encoding = tokenizer.load(folder)
    tokenizer.check_fits(encoding, shape.vocab_size, folder)
    sides = split_by_prompt(records, share=config.validation_share, seed=config.seed)
    train, validation = (encode_comparisons(encoding, side, max_length=shape.n_positions) for side in sides)
    require_both_sides(file, train, validation)
    total_steps = count_steps(config.epochs, len(train), config.batch_size)
    if config.dry_run:
        often = {"batch_size": config.batch_size, "validation_every": config.validation_every}
        scored = token_count([*train, *validation])  # once, by the reference
        plan = supervised_plan(total_steps, shape, train, validation, **often, frozen=(shape,), scored=scored)
        show_plan(plan, config, device=device, dtype=dtype)
        return output
    policy = GPT.from_pretrained(folder).to(device)
    policy.gradient_checkpointing = config.gradient_checkpointing
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    state = State(policy, adamw(policy, learning_rate=config.learning_rate))

    with stage.begin(
        state, steps=total_steps, checkpoint_every=config.checkpoint_every, best=("validation_loss", "min")
    ):
        referenced: list[list[ReferencedComparison]] = []
        while not referenced:
            with autocast(device, dtype), stage.attempt() as fitted:
                tokens = fitted.micro_batch_tokens
                referenced = [with_reference(reference, s, device, max_tokens=tokens) for s in (train, validation)]
        train, validation = referenced
        while state.step < total_steps:
            step = state.step
            learning_rate = config.learning_rate * linear_schedule(step, total_steps, warmup_steps=config.warmup_steps)
            set_learning_rate(state.optimizer, learning_rate)
            rows = batch_indices(len(train), config.batch_size, seed=config.seed, step=step)
            batch = [train[i] for i in rows]
            with autocast(device, dtype), stage.attempt() as fitted:
                metrics = train_step(state, batch, fitted, device)
                due = state.step % config.validation_every == 0 or state.step == total_steps
                metrics |= held_out(policy, validation, fitted, device) if due else {}
                stage.finish(step, {**metrics, "learning_rate": learning_rate}, tokens=token_count(batch))
        if distributed.is_writer():
            policy.save_pretrained(output)
            tokenizer.save(encoding, output)
            write_model_card(output, script="train_dpo.py", objective="Direct preference optimisation on comparisons.")
    return output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

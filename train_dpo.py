"""DPO: learn from the comparisons directly, without a reward model and without sampling.

Minimises, over all (better, worse) pairs of each ranking, with log-probabilities summed over a response's tokens,

    L = - mean over pairs of log sigmoid( beta [ log pi/pi_sft (better) - log pi/pi_sft (worse) ] )

    python train_dpo.py                     # after train_sft.py and `python -m minirlhf.feedback`, about 45 seconds
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

from minirlhf import data, tokenizer
from minirlhf.bradley_terry import accuracy
from minirlhf.dpo import dpo_loss, implicit_rewards
from minirlhf.hub import model_folder
from minirlhf.model import GPT
from minirlhf.model_card import write_model_card
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.rollout import over_micro_batches
from minirlhf.runtime import autocast, require, resolve_device, resolve_dtype, run_script
from minirlhf.stage import Stage, require_finite


@dataclass
class Config:
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    run: Path = Path("runs/tiny")
    """Folder of the run; this stage writes `<run>/dpo`."""
    stage: str = "dpo"
    """Name of this stage's folder in the run; another name keeps an earlier result."""
    policy: str | None = None
    """Folder or hub name of the model that policy and reference start from, by default `<run>/sft/model`."""
    comparisons: str | None = None
    """Rankings or pairs: a file of any known format, or a hub name; by default `<run>/feedback/rankings.jsonl`."""
    split: str = ""
    """Part of `comparisons`: a split of a hub data set, a slice, or both, e.g. test, [:90%], train[:1000]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query chosen=better rejected=worse."""
    validation_share: float = 0.1
    """Share of the prompts that is held out."""
    epochs: float = 3.0
    """Passes over the prompts."""
    batch_size: int = 32
    """Prompts an optimizer step, each with all its pairs."""
    beta: float = 1.0
    """How strongly the policy is held to the reference, per nat; smaller moves further."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels (conservative DPO), from 0 to 0.5."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; warms up linearly, then falls linearly to 0."""
    warmup_steps: int = 10
    """Optimizer steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""
    micro_batch_tokens: int = 2048
    """Padded tokens a forward pass; changes memory and speed, not the gradient."""
    validation_every: int = 50
    """Optimizer steps between two measurements on held-out comparisons."""
    resume: bool = False
    """Go on from the newest whole checkpoint; a finished stage is left as it is."""
    checkpoint_every: int = 50
    """Optimizer steps between two checkpoints; the newest two and the best are kept."""
    seed: int = 0
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


@dataclass
class State:
    """All that changes while the stage runs."""

    policy: GPT
    optimizer: torch.optim.Optimizer
    step: int = 0


@dataclass(frozen=True)
class ReferencedComparison(data.Comparison):
    """A comparison with the frozen reference's log-probability of each response, summed over its tokens."""

    ref_seq_logprobs: list[float]


def seq_logprobs(model: GPT, batch: data.Batch) -> Tensor:
    """(B,) log pi(y|x): summed over the response, never averaged, because length matters in DPO."""
    return model.logprobs(batch.tokens, batch.mask).sum(dim=1)


def with_reference(
    reference: GPT, comparisons: list[data.Comparison], device: torch.device, *, max_tokens: int
) -> list[ReferencedComparison]:
    """Compute the reference's log-probabilities, once for the whole stage, and keep them with the comparisons."""
    batch = data.pad([e for c in comparisons for e in c.examples]).to(device)
    ref = iter(over_micro_batches(lambda part: seq_logprobs(reference, part), batch, max_tokens).tolist())
    return [ReferencedComparison(c.examples, c.pairs, [next(ref) for _ in c.examples]) for c in comparisons]


def pair_logprobs(
    policy: GPT, comparisons: list[ReferencedComparison], pairs: data.PairBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four (N,) arguments of `dpo_loss`, chosen and rejected from one forward pass."""
    logprobs = seq_logprobs(policy, pairs.batch)
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
    count = sum(len(c.pairs) for c in comparisons)
    sums: dict[str, Tensor] = {}
    state.optimizer.zero_grad(set_to_none=True)
    for part, pairs in data.pair_micro_batches(comparisons, config.micro_batch_tokens):
        four = pair_logprobs(state.policy, part, pairs.to(device))
        loss = dpo_loss(*four, beta=config.beta, label_smoothing=config.label_smoothing, denominator=count)
        loss.backward()
        seen = {"loss": loss.detach().cpu(), **diagnostics(four, beta=config.beta, denominator=count)}
        sums = {name: sums.get(name, 0.0) + value for name, value in seen.items()}
    require_finite(loss=sums["loss"])
    grad_norm = clip_gradients(state.policy, config.max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {**sums, "grad_norm": grad_norm}


@torch.no_grad()
def held_out(policy: GPT, comparisons: list[ReferencedComparison], config: Config, device: torch.device) -> dict:
    """The training metrics on held-out comparisons, without label smoothing in the loss."""
    count = sum(len(c.pairs) for c in comparisons)
    sums: dict[str, Tensor] = {}
    for part, pairs in data.pair_micro_batches(comparisons, config.micro_batch_tokens):
        four = pair_logprobs(policy, part, pairs.to(device))
        loss = dpo_loss(*four, beta=config.beta, denominator=count)
        seen = {"loss": loss.cpu(), **diagnostics(four, beta=config.beta, denominator=count)}
        sums = {name: sums.get(name, 0.0) + value for name, value in seen.items()}
    return {f"validation_{name}": value for name, value in sums.items()}


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained policy."""
    require(config.beta > 0, f"--beta {config.beta}: must be above 0")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = model_folder(config.policy or config.run / "sft" / "model")
    file = config.comparisons or config.run / "feedback" / "rankings.jsonl"
    output = config.run / config.stage / "model"
    stage = Stage(
        config.run / config.stage, config, inputs=data.local_files(file), models=(folder,), resume=config.resume
    )
    if stage.finished:
        return output
    records = data.load(file, "pairs", split=config.split, columns=config.columns)
    encoding = tokenizer.load(folder)
    policy = GPT.from_pretrained(folder).to(device)
    tokenizer.check_fits(encoding, policy.config.vocab_size, folder)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    sides = data.split_by_prompt(records, share=config.validation_share, seed=config.seed)
    max_length = policy.config.n_positions
    train, validation = (data.encode_comparisons(encoding, side, max_length=max_length) for side in sides)
    require(len(train) > 0 and len(validation) > 0, f"{file}: needs comparisons of at least two prompts")
    state = State(policy, adamw(policy, learning_rate=config.learning_rate))

    total_steps = round(config.epochs * data.steps_per_epoch(len(train), config.batch_size))
    with autocast(device, dtype):
        train, validation = (
            with_reference(reference, side, device, max_tokens=config.micro_batch_tokens)
            for side in (train, validation)
        )
    with stage.begin(
        state, steps=total_steps, checkpoint_every=config.checkpoint_every, best=("validation_loss", "min")
    ):
        while state.step < total_steps:
            step = state.step
            learning_rate = config.learning_rate * linear_schedule(step, total_steps, warmup_steps=config.warmup_steps)
            set_learning_rate(state.optimizer, learning_rate)
            rows = data.batch_indices(len(train), config.batch_size, seed=config.seed, step=step)
            batch = [train[i] for i in rows]
            with autocast(device, dtype):
                metrics = train_step(state, batch, config, device)
                due = state.step % config.validation_every == 0 or state.step == total_steps
                metrics |= held_out(policy, validation, config, device) if due else {}
            stage.finish(step, {**metrics, "learning_rate": learning_rate}, tokens=data.token_count(batch))
        policy.save_pretrained(output)
        tokenizer.save(encoding, output)
        write_model_card(output, script="train_dpo.py", objective="Direct preference optimisation on comparisons.")
    return output


if __name__ == "__main__":
    run_script(main, PRESETS)

"""Reward model: learn from comparisons which of two answers people prefer.

Minimises the Bradley-Terry loss over all (better, worse) pairs of each ranking:

    L = - mean over pairs of log sigmoid(r(x, y_better) - r(x, y_worse))

or what `--objective` and `--ties` choose (`minirlhf/objective.py`): Plackett-Luce on whole rankings, ties that count
half or are modelled.

    python train_reward.py                  # after train_sft.py and `python -m minirlhf.feedback`, about a minute
    python train_reward.py --preset gpt2 --comparisons pairs.jsonl

A scalar head on the SFT model's trunk reads the last token. Afterwards the score is normalised to mean 0 and
deviation 1 over answers sampled from the SFT model, so that a KL coefficient means the same for every reward model.
The tiny preset weighs pairs that differ in few tokens more, at first by the inverse square of their number, towards
the end all alike: between two answers that differ in one word it is plain what the choice was about. Without it this
small model learns manners and no facts (docs/log.md).
Expect a loss from ln 2 = 0.693 down and a held-out accuracy that grows with the margin.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import torch

from minirlhf import data, distributed, tokenizer
from minirlhf.batch import batch_indices, count_steps
from minirlhf.bradley_terry import accuracy, bradley_terry_loss
from minirlhf.comparisons import Comparison, PairBatch, over_comparisons, pair_micro_batches, pair_numbers, token_count
from minirlhf.config import (
    AtLeastTwo,
    Count,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Share,
    Steps,
    TokenBudget,
    TrackerName,
    run_script,
)
from minirlhf.encode import encode_comparisons, encode_prompts, require_both_sides, split_by_prompt
from minirlhf.files import write_json
from minirlhf.hf.hub import model_or_earlier
from minirlhf.model import GPT, read_config
from minirlhf.objective import Form, Objective, Ties
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.reward import RewardModel
from minirlhf.rollout import over_micro_batches, sample
from minirlhf.runs.card import write_model_card
from minirlhf.runs.plan import show_plan, supervised_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import Stream, autocast, project_file, require, require_finite, resolve_device, resolve_dtype


@dataclass
class Config(Settings):
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    run: Path = Path("runs/tiny")
    """Folder of the run; this stage writes `<run>/reward`."""
    model: str | None = None
    """Folder or hub name of the model whose trunk the reward model starts from, by default `<run>/sft/model`."""
    comparisons: str | None = None
    """Rankings or pairs: a file of any known format, or a hub name; by default `<run>/feedback/rankings.jsonl`."""
    split: str = ""
    """Part of `comparisons`: a split of a hub data set, a slice, or both, e.g. test, [:90%], train[:1000]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query chosen=better rejected=worse."""
    validation_share: Share = 0.1
    """Share of the prompts that is held out."""
    reference_prompts: str | None = None
    """Prompts whose sampled answers define mean 0 and deviation 1; by default the world's, or those of
    `comparisons` where these are given."""
    reference_samples: AtLeastTwo = 512
    """Answers sampled to normalise the score; where there are fewer prompts, they are asked more than once."""
    max_new_tokens: Count = 32
    """Length limit of those answers in tokens."""
    epochs: Positive = 4.0
    """Passes over the prompts. Many overfit to the labels; watch the held-out loss."""
    objective: Form = "pairs"
    """What explains a ranking: all its `pairs`, those of the `best-against-rest`, or choosing the best, then the next
    (`plackett-luce`, on strict rankings: of equal ones the first counts alone)."""
    ties: Ties = "drop"
    """`drop` learns nothing from ties, `half` takes one for half a win each way, `davidson` models them."""
    davidson_nu: Positive = 1.0
    """How common ties are, for `--ties davidson` alone: two equal answers tie with probability nu / (2 + nu)."""
    patience: Count | None = None
    """Stop after so many held-out losses without a lower one, and keep the weights of the lowest; by default the
    training goes to its end."""
    validation_every: Count | None = None
    """Optimizer steps between two measurements of the held-out loss; by default once, at the end."""
    contrast: NotNegative = 2.0
    """Pairs that differ in d tokens weigh d^-contrast at first; it falls linearly to 0, where all weigh the same."""
    batch_size: Count = 32
    """Prompts an optimizer step, each with all its responses."""
    learning_rate: NotNegative = 1e-3
    """Peak learning rate of AdamW; warms up linearly, then falls linearly to 0."""
    warmup_steps: Steps = 20
    """Optimizer steps of linear warm-up."""
    weight_decay: NotNegative = 0.01
    """AdamW's decay of matrices."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""
    micro_batch_tokens: TokenBudget = 2048
    """Padded tokens a forward pass; `auto` halves until it fits. Changes memory and speed, not the gradient."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone and compute the rest again backward: less memory, one more forward pass."""
    track: TrackerName | None = None
    """Show the metrics in `tensorboard` or `wandb` as well; Weights & Biases stays offline unless WANDB_MODE is set."""
    dry_run: bool = False
    """Say what would be done and about what it takes, read no weights and write nothing."""
    resume: bool = False
    """Go on from the newest whole checkpoint; a finished stage is left as it is."""
    checkpoint_every: Count = 100
    """Optimizer steps between two checkpoints; the newest two and the best are kept."""
    seed: Seed = 0
    """Seed of the head, the split, the data order and the reference samples."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of matrix products; auto is bfloat16 on CUDA, else float32."""


PRESETS = {
    "tiny": Config(),
    "gpt2": Config(
        preset="gpt2",
        run=Path("runs/gpt2"),
        reference_samples=1024,
        max_new_tokens=64,
        epochs=1.0,  # more overfits to the labels: Ouyang et al. 2022, section 3.5
        contrast=0.0,
        batch_size=64,  # Stiennon et al. 2020, appendix B.1: 64 comparisons a batch, one epoch
        learning_rate=5e-5,  # Ziegler et al. 2019, released code, reward model on GPT-2 small
        weight_decay=0.0,
        micro_batch_tokens=32_768,
    ),
}


PAIRS = Objective()


@dataclass
class State:
    """All that changes while the stage runs."""

    model: RewardModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: RewardModel | None = None  # where training may stop early: the weights with the lowest held-out loss,
    best_loss: float = sys.float_info.max  # that loss; not infinite, which JSON cannot hold,
    misses: int = 0  # and measurements since then
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out


def response_scores(model: RewardModel, batch: PairBatch) -> torch.Tensor:
    """(R,) scores of R responses, each read at its last token."""
    hidden = model.gpt.hidden(batch.tokens, positions=batch.positions, visible=batch.visible)
    return model.head_scores(hidden.flatten(0, 1)[batch.ends])


def train_step(
    state: State,
    comparisons: list[Comparison],
    *,
    device: torch.device,
    micro_batch_tokens: int,
    max_grad_norm: float,
    contrast: float = 0.0,
    objective: Objective = PAIRS,
) -> dict:
    """One optimizer step; the loss is the mean over all pairs, or rankings, of the batch, however it is divided."""
    pairs = sum(len(c.pairs) for c in comparisons)
    size = objective.size(comparisons, contrast)
    loss = correct = torch.zeros(())
    state.optimizer.zero_grad(set_to_none=True)
    for members, part in pair_micro_batches(comparisons, micro_batch_tokens):
        part = part.to(device)
        scores = response_scores(state.model, part)
        part_loss = objective.loss(scores, members, part.pairs, contrast=contrast, denominator=size)
        part_loss.backward()
        loss = loss + part_loss.detach().cpu()
        correct = correct + (accuracy(scores[part.chosen], scores[part.rejected], denominator=pairs)).cpu()
    metrics = distributed.sum_each({"loss": loss, "accuracy": correct})
    require_finite(loss=metrics["loss"])
    distributed.sum_gradients(state.model)
    grad_norm = clip_gradients(state.model, max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {**metrics, "grad_norm": grad_norm}


def held_out(model: RewardModel, comparisons: list[Comparison], device: torch.device, *, max_tokens: int) -> dict:
    """Loss, accuracy and accuracy by margin (in thirds of |score difference|) on held-out comparisons."""
    scores = torch.cat(over_comparisons(lambda b: response_scores(model, b), comparisons, max_tokens, device))
    chosen, rejected = scores[pair_numbers(comparisons)].unbind(dim=1)
    thirds = torch.argsort((chosen - rejected).abs()).tensor_split(3)
    by_margin = {
        f"accuracy_margin_{name}": accuracy(chosen[i], rejected[i])
        for name, i in zip(("small", "medium", "large"), thirds, strict=True)
        if len(i)
    }
    return {
        "validation_loss": bradley_terry_loss(chosen, rejected),
        "validation_accuracy": accuracy(chosen, rejected),
        **by_margin,
    }


def keep_best(state: State, loss: float) -> None:
    """Keep the weights of the lowest held-out loss, and count the measurements since then."""
    if loss < state.best_loss:
        state.best.load_state_dict(state.model.state_dict())
        state.best_loss, state.misses = loss, 0
    else:
        state.misses += 1


def reference_scores(model: RewardModel, policy: GPT, prompts: list[list[int]], config: Config, eos_id: int) -> dict:
    """Mean and deviation of the score over answers that the policy samples to the prompts."""
    keys = [(Stream.REFERENCE_SAMPLES, i) for i in range(len(prompts))]
    samples = sample(policy, prompts, keys=keys, seed=config.seed, eos_id=eos_id, max_new_tokens=config.max_new_tokens)
    scores = over_micro_batches(lambda part: model(part.tokens, part.lengths), samples, config.micro_batch_tokens)
    require_finite(reference_scores=scores)
    return {"mean": scores.mean().item(), "std": scores.std(correction=0).item()}


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained reward model."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = model_or_earlier(config.model, "--model", config.run / "sft" / "model", data=config.comparisons)
    file = config.comparisons or config.run / "feedback" / "rankings.jsonl"
    output = config.run / "reward" / "model"
    world = None if config.comparisons else project_file("world", "prompts.train.jsonl")
    reference_prompts = config.reference_prompts or world
    files = data.local_files(file, reference_prompts)
    stage = Stage(config.run / "reward", config, inputs=files, models=(folder,), resume=config.resume)
    if stage.finished:
        return output
    records = data.load(file, "pairs", split=config.split, columns=config.columns)
    prompt_records = data.load(reference_prompts, "prompts") if reference_prompts else records
    shape = read_config(folder)
    encoding = tokenizer.load(folder)
    tokenizer.check_fits(encoding, shape.vocab_size, folder)
    train_records, validation_records = split_by_prompt(records, share=config.validation_share, seed=config.seed)
    max_length, room = shape.n_positions, shape.n_positions - config.max_new_tokens
    objective = Objective(config.objective, config.ties, config.davidson_nu)
    objective.check(config.contrast)
    require(not config.patience or config.validation_every, "--patience: say with --validation-every how often")
    train = encode_comparisons(encoding, train_records, max_length=max_length, ties=config.ties != "drop")
    train = objective.prepare(train)
    validation = encode_comparisons(encoding, validation_records, max_length=max_length)
    distinct = dict.fromkeys(record["prompt"] for record in prompt_records)
    texts = list(islice(cycle(distinct), config.reference_samples))  # few prompts, or none at all, are asked again
    require(room > 0, f"--max-new-tokens {config.max_new_tokens}: the model's context leaves no room for a prompt")
    require(len(texts) > 1, f"--reference-samples {len(texts)}: at least 2 are needed for the score to vary")
    prompts = encode_prompts(encoding, texts, max_length=room)
    require_both_sides(file, train, validation)
    total_steps = count_steps(config.epochs, len(train), config.batch_size)
    if config.dry_run:
        often = {"batch_size": config.batch_size, "validation_every": config.validation_every or total_steps}
        scored = 4 * sum(len(prompt) + config.max_new_tokens for prompt in prompts)  # sampled and scored, twice
        plan = supervised_plan(total_steps, shape, train, validation, **often, frozen=(shape,), scored=scored)
        show_plan(plan, config, device=device, dtype=dtype)
        return output
    policy = GPT.from_pretrained(folder).to(device).eval().requires_grad_(False)
    model = RewardModel.from_gpt(policy, generator=torch.Generator().manual_seed(config.seed))
    model.gpt.gradient_checkpointing = config.gradient_checkpointing
    state = State(model, adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay))
    state.best = copy.deepcopy(model).requires_grad_(False) if config.patience else None

    with stage.begin(
        state, steps=total_steps, checkpoint_every=config.checkpoint_every, best=("validation_loss", "min")
    ):
        while state.step < total_steps and state.misses < (config.patience or 1):
            step = state.step
            learning_rate = config.learning_rate * linear_schedule(step, total_steps, warmup_steps=config.warmup_steps)
            set_learning_rate(state.optimizer, learning_rate)
            rows = batch_indices(len(train), config.batch_size, seed=config.seed, step=step)
            batch = [train[i] for i in rows]
            with autocast(device, dtype), stage.attempt() as fitted:
                metrics = train_step(
                    state,
                    batch,
                    device=device,
                    micro_batch_tokens=fitted.micro_batch_tokens,
                    max_grad_norm=config.max_grad_norm,
                    contrast=config.contrast * (1 - step / total_steps),
                    objective=objective,
                )
                due = state.step % (config.validation_every or total_steps) == 0 or state.step == total_steps
                metrics |= held_out(model, validation, device, max_tokens=fitted.micro_batch_tokens) if due else {}
                if state.best is not None and due:
                    keep_best(state, metrics["validation_loss"].item())
                stage.finish(step, {**metrics, "learning_rate": learning_rate}, tokens=token_count(batch))
        if state.best is not None:
            model.load_state_dict(state.best.state_dict())

        with autocast(device, dtype):
            before = reference_scores(model, policy, prompts, stage.fitted, encoding.eot_token)
            model.normalise(before["mean"], before["std"])
        with autocast(device, dtype):  # another block, because autocast keeps copies of the weights as they were
            after = reference_scores(model, policy, prompts, stage.fitted, encoding.eot_token)
        if distributed.is_writer():
            write_json(config.run / "reward" / "normalisation.json", {"before": before, "after": after})
            model.save_pretrained(output)
            tokenizer.save(encoding, output)
            write_model_card(output, script="train_reward.py", objective="A reward model trained on comparisons.")
    return output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

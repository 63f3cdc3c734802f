"""Reward model: learn from comparisons which of two answers people prefer.

Minimises the Bradley-Terry loss over all (better, worse) pairs of each ranking:

    L = - mean over pairs of log sigmoid(r(x, y_better) - r(x, y_worse))

or what `--objective` and `--ties` choose: Plackett-Luce on whole rankings, ties that count half or are modelled. All
pairs of a prompt are in one batch element, and the loss is a mean over the whole batch: of pairs by their weights, of
rankings by their number.

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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor

from minirlhf import comparisons, data, distributed, tokenizer
from minirlhf.batch import batch_indices, count_steps, over_micro_batches
from minirlhf.bradley_terry import accuracy, bradley_terry_loss, davidson_loss, plackett_luce_loss
from minirlhf.comparisons import Comparison
from minirlhf.config import AtLeastTwo, Count, NotNegative, Positive, Share, Steps, TrainConfig, run_script
from minirlhf.encode import Record, encode_comparisons, encode_prompts, require_both_sides, split_by_prompt
from minirlhf.files import write_json
from minirlhf.hf.hub import model_or_earlier
from minirlhf.model import GPT, read_config
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.reward import RewardModel, response_scores
from minirlhf.rollout import sample
from minirlhf.runs.plan import supervised_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import Stream, autocast, project_file, require, require_finite, resolve_compute


@dataclass
class Config(TrainConfig):
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
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
    objective: Literal["pairs", "best-against-rest", "plackett-luce"] = "pairs"
    """What explains a ranking: all its `pairs`, those of the `best-against-rest`, or choosing the best, then the next
    (`plackett-luce`, on strict rankings: of equal ones the first counts alone)."""
    ties: Literal["drop", "half", "davidson"] = "drop"
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
    """Prompts per optimizer step, each with all its responses."""
    learning_rate: NotNegative = 1e-3
    """Peak learning rate of AdamW; warms up linearly, then falls linearly to 0."""
    warmup_steps: Steps = 20
    """Optimizer steps of linear warm-up."""
    weight_decay: NotNegative = 0.01
    """AdamW's decay of matrices."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""


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


def train_step(
    state: State,
    batch: Sequence[Comparison],
    config: Config,
    device: torch.device,
    *,
    max_tokens: int,
    contrast: float = 0.0,
) -> dict[str, Tensor]:
    """One optimizer step; the loss is the mean over all pairs, or rankings, of the batch, however it is divided.

    contrast  of this step: a pair that differs in d tokens weighs d^-contrast
    """
    pairs = sum(len(c.pairs) for c in batch)  # N of the whole batch, over micro-batches and processes
    weight = comparisons.pair_weights(batch, contrast).sum().item()
    parts: list[dict[str, Tensor]] = []
    state.optimizer.zero_grad(set_to_none=True)
    for members, part in comparisons.pair_micro_batches(batch, max_tokens):
        part = part.to(device)
        scores = response_scores(state.model, part)  # (R,) of all responses
        chosen, rejected = scores[part.chosen], scores[part.rejected]  # (N,)
        weights = comparisons.pair_weights(members, contrast).to(scores)  # (N,)
        match config.objective, config.ties:  # docs/equations.md#reward-model
            case "plackett-luce", _:
                ranked = comparisons.ranked_scores(scores, members)  # (M, K) each, best first
                loss = torch.stack([plackett_luce_loss(rows, denominator=len(batch)) for rows in ranked]).sum()
            case _, "davidson":  # a tie stands here once each way with weight 1/2, equally likely both ways
                tied, nu = weights < 1, config.davidson_nu
                won = davidson_loss(chosen[~tied], rejected[~tied], tied[~tied], nu=nu, denominator=weight)
                ties = davidson_loss(chosen[tied], rejected[tied], tied[tied], nu=nu, denominator=weight)
                loss = won + 0.5 * ties
            case _:  # Ouyang et al. 2022, eq. 1
                loss = bradley_terry_loss(chosen, rejected, weights=weights, denominator=weight)
        loss.backward()
        parts.append({"loss": loss.detach(), "accuracy": accuracy(chosen, rejected, denominator=pairs)})
    metrics = distributed.add_up(parts, ("loss", "accuracy"))
    require_finite(loss=metrics["loss"])
    distributed.sum_gradients(state.model)
    grad_norm = clip_gradients(state.model, config.max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {**metrics, "grad_norm": grad_norm}


def held_out(
    model: RewardModel, batch: Sequence[Comparison], device: torch.device, *, max_tokens: int
) -> dict[str, Tensor]:
    """Loss, accuracy and accuracy by margin (in thirds of |score difference|) on held-out comparisons."""
    parts = comparisons.over_comparisons(lambda part: response_scores(model, part), batch, max_tokens, device)
    scores = torch.cat(parts)  # (R,)
    chosen, rejected = scores[comparisons.pair_numbers(batch)].unbind(dim=1)  # (N,)
    metrics = {
        "validation_loss": bradley_terry_loss(chosen, rejected),
        "validation_accuracy": accuracy(chosen, rejected),
    }
    thirds = torch.argsort((chosen - rejected).abs()).tensor_split(3)
    for name, third in zip(("small", "medium", "large"), thirds, strict=True):
        if len(third):
            metrics[f"accuracy_margin_{name}"] = accuracy(chosen[third], rejected[third])
    return metrics


def check_settings(config: Config) -> None:
    """Raise UserError where two settings contradict each other."""
    ranked = config.objective == "plackett-luce"
    no_place = f"--ties {config.ties}: Plackett-Luce has no place for ties; use drop"
    require(not ranked or config.ties == "drop", no_place)
    name = "--objective plackett-luce" if ranked else "--ties davidson"
    weighted = not ranked and config.ties != "davidson"
    require(weighted or config.contrast == 0, f"{name}: has no weights of pairs; use it with --contrast 0")
    require(
        not config.patience or config.validation_every is not None, "--patience: say with --validation-every how often"
    )


def keep_best(state: State, loss: float) -> None:
    """Keep the weights of the lowest held-out loss, and count the measurements since then."""
    if state.best is None:
        return
    if loss < state.best_loss:
        state.best.load_state_dict(state.model.state_dict())
        state.best_loss, state.misses = loss, 0
    else:
        state.misses += 1


def reference_prompts(
    config: Config, records: Sequence[Record], encoding: tiktoken.Encoding, *, n_positions: int
) -> list[list[int]]:
    """Ids of the prompts whose sampled answers define mean 0 and standard deviation 1."""
    distinct = dict.fromkeys(record["prompt"] for record in records)
    texts = list(islice(cycle(distinct), config.reference_samples))  # few prompts, or none at all, are asked again
    room = n_positions - config.max_new_tokens
    require(room > 0, f"--max-new-tokens {config.max_new_tokens}: the model's context leaves no room for a prompt")
    require(len(texts) > 1, f"--reference-samples {len(texts)}: at least 2 are needed for the score to vary")
    return encode_prompts(encoding, texts, max_length=room)


def reference_scores(
    model: RewardModel, policy: GPT, prompts: list[list[int]], config: Config, *, eos_id: int, max_tokens: int
) -> dict[str, float]:
    """Mean and standard deviation of the score over answers that the policy samples to the prompts."""
    keys = [(Stream.REFERENCE_SAMPLES, i) for i in range(len(prompts))]
    samples = sample(policy, prompts, keys=keys, seed=config.seed, eos_id=eos_id, max_new_tokens=config.max_new_tokens)
    scores = over_micro_batches(lambda part: model(part.tokens, part.lengths), samples, max_tokens)
    require_finite(reference_scores=scores)  # (B,)
    return {"mean": scores.mean().item(), "std": scores.std(correction=0).item()}


def normalise(
    model: RewardModel, policy: GPT, prompts: list[list[int]], config: Config, *, eos_id: int, max_tokens: int
) -> None:
    """Rescale the score to mean 0 and standard deviation 1 over sampled answers; write both, before and after."""
    device, dtype = resolve_compute(config.device, config.dtype)
    scores = {}
    for when in ("before", "after"):
        with autocast(device, dtype):  # a block each, because autocast keeps copies of the weights as they were
            scores[when] = reference_scores(model, policy, prompts, config, eos_id=eos_id, max_tokens=max_tokens)
        if when == "before":
            model.normalise(scores[when]["mean"], scores[when]["std"])
    if distributed.is_writer():
        write_json(config.run / "reward" / "normalisation.json", scores)


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained reward model."""
    check_settings(config)
    device, dtype = resolve_compute(config.device, config.dtype)
    folder = model_or_earlier(config.model, "--model", config.run / "sft" / "model", data=config.comparisons)
    file = config.comparisons or config.run / "feedback" / "rankings.jsonl"
    source = config.reference_prompts or (None if config.comparisons else project_file("world", "prompts.train.jsonl"))
    stage = Stage(config, "reward", inputs=data.local_files(file, source), models=(folder,))
    if stage.finished:
        return stage.output
    shape, encoding = read_config(folder), tokenizer.load(folder)
    tokenizer.check_fits(encoding, shape.vocab_size, folder)
    records = data.load(file, "pairs", split=config.split, columns=config.columns)
    asked, length = data.load(source, "prompts") if source else records, shape.n_positions
    prompts = reference_prompts(config, asked, encoding, n_positions=length)
    sides = split_by_prompt(records, share=config.validation_share, seed=config.seed)
    train = encode_comparisons(encoding, sides[0], max_length=length, ties=config.ties != "drop")
    train = [comparisons.best_against_rest(c) for c in train] if config.objective == "best-against-rest" else train
    validation = encode_comparisons(encoding, sides[1], max_length=length)
    require_both_sides(file, train, validation)
    total_steps = count_steps(config.epochs, len(train), config.batch_size)
    if config.dry_run:
        scored = 4 * sum(len(prompt) + config.max_new_tokens for prompt in prompts)  # sampled and scored, twice
        return stage.show(
            supervised_plan(config, total_steps, shape, train, validation, frozen=(shape,), scored=scored)
        )
    policy = GPT.from_pretrained(folder).full_precision().to(device).eval().requires_grad_(False)
    model = RewardModel.from_gpt(policy, generator=torch.Generator().manual_seed(config.seed))
    model.gpt.gradient_checkpointing = config.gradient_checkpointing
    state = State(model, adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay))
    state.best = copy.deepcopy(model).requires_grad_(False) if config.patience else None

    with stage.begin(state, steps=total_steps, best=("validation_loss", "min")):
        while state.step < total_steps and state.misses < (config.patience or 1):
            step = state.step
            factor = linear_schedule(step, total_steps, warmup_steps=config.warmup_steps)
            learning_rate = set_learning_rate(state.optimizer, config.learning_rate * factor)
            batch = [train[i] for i in batch_indices(len(train), config.batch_size, seed=config.seed, step=step)]
            contrast = config.contrast * (1 - step / total_steps)
            with autocast(device, dtype):
                for attempt in stage.attempts():
                    with attempt as max_tokens:
                        metrics = train_step(state, batch, config, device, max_tokens=max_tokens, contrast=contrast)
                if state.step % (config.validation_every or total_steps) == 0 or state.step == total_steps:
                    metrics |= held_out(model, validation, device, max_tokens=max_tokens)
                    keep_best(state, metrics["validation_loss"].item())
                stage.finish(step, {**metrics, "learning_rate": learning_rate}, tokens=comparisons.token_count(batch))
        if state.best is not None:
            model.load_state_dict(state.best.state_dict())
        normalise(model, policy, prompts, config, eos_id=encoding.eot_token, max_tokens=stage.micro_batch_tokens)
        stage.save(model, encoding, objective="A reward model trained on comparisons.")
    return stage.output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

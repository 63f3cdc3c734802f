"""Reward model: learn from comparisons which of two answers people prefer.

Minimises the Bradley-Terry loss over all (better, worse) pairs of each ranking:

    L = - mean over pairs of log sigmoid(r(x, y_better) - r(x, y_worse))

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

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minirlhf import data, tokenizer
from minirlhf.bradley_terry import accuracy, bradley_terry_loss
from minirlhf.generate import generate
from minirlhf.hub import model_folder
from minirlhf.metrics import write_json
from minirlhf.model import GPT
from minirlhf.model_card import write_model_card
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.reward import RewardModel
from minirlhf.rollout import over_micro_batches
from minirlhf.runtime import Stream, autocast, project_file, require, resolve_device, resolve_dtype, run_script
from minirlhf.stage import Stage, require_finite


@dataclass
class Config:
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
    validation_share: float = 0.1
    """Share of the prompts that is held out."""
    reference_prompts: str | None = None
    """Prompts whose sampled answers define mean 0 and deviation 1; by default the world's, or those of
    `comparisons` where these are given."""
    reference_samples: int = 512
    """Answers sampled to normalise the score."""
    max_new_tokens: int = 32
    """Length limit of those answers in tokens."""
    epochs: float = 5.0
    """Passes over the prompts. Many overfit to the labels; watch the held-out loss."""
    contrast: float = 2.0
    """Pairs that differ in d tokens weigh d^-contrast at first; it falls linearly to 0, where all weigh the same."""
    batch_size: int = 32
    """Prompts an optimizer step, each with all its responses."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; warms up linearly, then falls linearly to 0."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""
    micro_batch_tokens: int = 2048
    """Padded tokens a forward pass; changes memory and speed, not the gradient."""
    resume: bool = False
    """Go on from the newest whole checkpoint; a finished stage is left as it is."""
    checkpoint_every: int = 100
    """Optimizer steps between two checkpoints; the newest two and the best are kept."""
    seed: int = 0
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


@dataclass
class State:
    """All that changes while the stage runs."""

    model: RewardModel
    optimizer: torch.optim.Optimizer
    step: int = 0


def pair_weights(comparisons: list[data.Comparison], contrast: float) -> torch.Tensor:
    """(N,) weights of all pairs: d^-contrast for a pair whose two responses differ in d tokens; 1 where it is 0."""
    ids = [([e.response_ids for e in c.examples], c.pairs) for c in comparisons]
    weights = [data.differing_tokens(r[i], r[j]) ** -contrast for r, pairs in ids for i, j in pairs]
    return torch.tensor(weights, dtype=torch.float64)


def train_step(
    state: State,
    comparisons: list[data.Comparison],
    *,
    device: torch.device,
    micro_batch_tokens: int,
    max_grad_norm: float,
    contrast: float = 0.0,
) -> dict:
    """One optimizer step; the loss is the weighted mean over all pairs of the batch, however it is divided."""
    pairs = sum(len(c.pairs) for c in comparisons)
    total_weight = pair_weights(comparisons, contrast).sum().item()
    loss = correct = torch.zeros(())
    state.optimizer.zero_grad(set_to_none=True)
    for members, part in data.pair_micro_batches(comparisons, micro_batch_tokens):
        part = part.to(device)
        scores = state.model(part.batch.tokens, part.batch.lengths)
        chosen, rejected = scores[part.chosen], scores[part.rejected]
        weights = pair_weights(members, contrast).to(scores)
        part_loss = bradley_terry_loss(chosen, rejected, weights=weights, denominator=total_weight)
        part_loss.backward()
        loss = loss + part_loss.detach().cpu()
        correct = correct + (accuracy(chosen, rejected) * len(chosen) / pairs).cpu()
    require_finite(loss=loss)
    grad_norm = clip_gradients(state.model, max_grad_norm)
    state.optimizer.step()
    state.step += 1
    return {"loss": loss, "accuracy": correct, "grad_norm": grad_norm}


def held_out(model: RewardModel, comparisons: list[data.Comparison], device: torch.device, *, max_tokens: int) -> dict:
    """Loss, accuracy and accuracy by margin (in thirds of |score difference|) on held-out comparisons."""
    batch = data.pad_comparisons(comparisons).to(device)
    scores = over_micro_batches(lambda part: model(part.tokens, part.lengths), batch.batch, max_tokens)
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
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


def reference_scores(model: RewardModel, policy: GPT, prompts: list[list[int]], config: Config, eos_id: int) -> dict:
    """Mean and deviation of the score over answers that the policy samples to the prompts."""
    keys = [(Stream.REFERENCE_SAMPLES, i) for i in range(len(prompts))]
    samples = generate(
        policy, prompts, max_new_tokens=config.max_new_tokens, eos_id=eos_id, seed=config.seed, keys=keys
    )
    scores = over_micro_batches(lambda part: model(part.tokens, part.lengths), samples, config.micro_batch_tokens)
    require_finite(reference_scores=scores)
    return {"mean": scores.mean().item(), "std": scores.std(correction=0).item()}


def main(config: Config) -> Path:
    """Run the stage; returns the folder of the trained reward model."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = model_folder(config.model or config.run / "sft" / "model")
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
    encoding = tokenizer.load(folder)
    policy = GPT.from_pretrained(folder).to(device).eval().requires_grad_(False)
    tokenizer.check_fits(encoding, policy.config.vocab_size, folder)
    model = RewardModel.from_gpt(policy, generator=torch.Generator().manual_seed(config.seed))
    train_records, validation_records = data.split_by_prompt(records, share=config.validation_share, seed=config.seed)
    max_length = policy.config.n_positions
    train = data.encode_comparisons(encoding, train_records, max_length=max_length)
    validation = data.encode_comparisons(encoding, validation_records, max_length=max_length)
    texts = list(dict.fromkeys(record["prompt"] for record in prompt_records))[: config.reference_samples]
    prompts = data.encode_prompts(encoding, texts, max_length=max_length - config.max_new_tokens)
    require(len(train) > 0 and len(validation) > 0, f"{file}: needs comparisons of at least two prompts")
    state = State(model, adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay))

    total_steps = round(config.epochs * data.steps_per_epoch(len(train), config.batch_size))
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
                metrics = train_step(
                    state,
                    batch,
                    device=device,
                    micro_batch_tokens=config.micro_batch_tokens,
                    max_grad_norm=config.max_grad_norm,
                    contrast=config.contrast * (1 - step / total_steps),
                )
                last = state.step == total_steps
                metrics |= held_out(model, validation, device, max_tokens=config.micro_batch_tokens) if last else {}
            stage.finish(step, {**metrics, "learning_rate": learning_rate}, tokens=data.token_count(batch))

        with autocast(device, dtype):
            before = reference_scores(model, policy, prompts, config, encoding.eot_token)
            model.normalise(before["mean"], before["std"])
        with autocast(device, dtype):  # another block, because autocast keeps copies of the weights as they were
            after = reference_scores(model, policy, prompts, config, encoding.eot_token)
        write_json(config.run / "reward" / "normalisation.json", {"before": before, "after": after})
        model.save_pretrained(output)
        tokenizer.save(encoding, output)
        write_model_card(output, script="train_reward.py", objective="A reward model trained on comparisons.")
    return output


if __name__ == "__main__":
    run_script(main, PRESETS)

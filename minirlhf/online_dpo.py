"""Online DPO: the policy answers each prompt twice, a reward labels the two answers, and DPO learns from the pair.

Minimises, over pairs that the policy pi' of this iteration has sampled and r has ordered, r(better) > r(worse),

    L = - mean over pairs of log sigmoid( beta [ log pi/pi_sft (better) - log pi/pi_sft (worse) ] )

    python -m minirlhf.online_dpo                       # after train_reward.py, about a minute on one core
    python -m minirlhf.online_dpo --loss ipo --beta 2   # any of the three losses that Guo et al. compare

Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", arXiv 2402.04792. train_dpo.py learns from
answers of the SFT model throughout; here they are always the policy's own, as in PPO, and there is no value model.
At pi = pi_sft the gradient is that of -beta sum over x of [P(win) - P(loss)] against a frozen copy: a policy gradient
of the rate at which the policy's answers beat its own. Only the order of two scores counts, not their distance.

Two identical answers and two equal scores say nothing, and the pair is left out. An answer without EOS gets
`missing_eos_score` in place of its score, as in PPO, and is compared like any other: two unfinished ones are a tie,
and one of them wins only over an answer that scores less than that.
Left out: a labeller that errs. Scores decide, so a margin has no natural end but the one that beta gives it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minirlhf import distributed, dpo, reward_functions
from minirlhf.batch import Example, batch_indices, permutation, require_batch
from minirlhf.comparisons import ReferencedComparison, pair_logprobs, pair_micro_batches
from minirlhf.config import Count, Finite, FolderName, NotNegative, Positive, SamplingConfig, TrainConfig, run_script
from minirlhf.model import GPT
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.rollout import Rollout, collect, rollout_keys, rollout_metrics
from minirlhf.runs.plan import sampled_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import Stream, autocast, require_finite, resolve_compute


@dataclass
class Config(SamplingConfig, TrainConfig):
    preset: Literal["tiny"] = "tiny"
    """Set of defaults."""
    stage: FolderName = "online-dpo"
    """Name of this stage's folder in the run; another name keeps an earlier result."""
    iterations: Count = 64
    """Rollouts; the learning rate falls linearly to 0 over them."""
    rollout_size: Count = 64
    """Prompts per rollout, each with two answers."""
    epochs: Count = 2
    """Passes over the pairs of a rollout."""
    minibatches: Count = 4
    """Optimizer steps per epoch."""
    loss: Literal["dpo", "ipo", "hinge"] = "dpo"
    """Of the pairs; beta means something else in each, see minirlhf/dpo.py."""
    beta: Positive = 0.3
    """How strongly the policy is held to the reference, per nat; smaller moves further."""
    missing_eos_score: Finite | None = -1.0
    """Score of an answer that did not finish, in place of the reward's; `None` keeps the reward's."""
    learning_rate: NotNegative = 1e-4
    """Initial learning rate of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled so that their joint L2 norm is at most this."""
    checkpoint_every: Count = 10
    """Iterations between two checkpoints; the newest two are kept."""


PRESETS = {"tiny": Config()}


@dataclass
class State:
    """All that changes while the stage runs. Prompt order and random streams are functions of `iteration`."""

    policy: GPT
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out


def label(rollout: Rollout) -> tuple[list[ReferencedComparison], dict[str, int]]:
    """The pairs of a rollout with two answers to each prompt, the one with the higher score first, and their numbers.

    Which answers belong together is said by `rollout.groups`. Counted: `pairs`, and what was left out, pairs of
    `identical` answers and `ties` of different ones. Raises ValueError where a prompt has not two answers.
    """
    answers = rollout.response_ids()
    prompts = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), strict=True)
    examples = [Example(row[:n], ids) for (row, n), ids in zip(prompts, answers, strict=True)]
    ref = rollout.ref_logprobs.sum(dim=1).tolist()
    scores, groups = rollout.scores.tolist(), rollout.groups.tolist()
    pairs: list[ReferencedComparison] = []
    counts = {"pairs": 0, "ties": 0, "identical": 0}
    for group in dict.fromkeys(groups):
        rows = [row for row, other in enumerate(groups) if other == group]
        if len(rows) != 2:
            raise ValueError(f"label: a prompt has {len(rows)} answers; sample two")
        first, second = rows
        same = answers[first] == answers[second]
        kind = "identical" if same else "ties" if scores[first] == scores[second] else "pairs"
        counts[kind] += 1
        if kind == "pairs":
            order = (0, 1) if scores[first] > scores[second] else (1, 0)
            both = [examples[first], examples[second]]
            pairs.append(ReferencedComparison(both, [order], ref_seq_logprobs=[ref[first], ref[second]]))
    return pairs, counts


def train_step(
    state: State, comparisons: list[ReferencedComparison], config: Config, device: torch.device, *, max_tokens: int
) -> dict[str, Tensor]:
    """One optimizer step; the loss is the mean over all pairs, however they are divided."""
    count, beta = len(comparisons), config.beta  # one pair each; of the whole minibatch
    parts: list[dict[str, Tensor]] = []
    state.optimizer.zero_grad(set_to_none=True)
    for part, pairs in pair_micro_batches(comparisons, max_tokens):
        logprobs = pair_logprobs(state.policy, part, pairs.to(device), temperature=config.temperature)  # 4 x (N,)
        match config.loss:  # docs/equations.md#dpo-and-its-kin
            case "ipo":
                loss = dpo.ipo_loss(*logprobs, beta=beta, denominator=count)
            case "hinge":
                loss = dpo.hinge_loss(*logprobs, beta=beta, denominator=count)
            case _:
                loss = dpo.dpo_loss(*logprobs, beta=beta, denominator=count)
        loss.backward()
        parts.append({"loss": loss.detach(), **dpo.diagnostics(*logprobs, beta=beta, denominator=count)})
    sums = distributed.add_up(parts, dpo.MEASURED)
    require_finite(loss=sums["loss"])
    distributed.sum_gradients(state.policy)
    grad_norm = clip_gradients(state.policy, config.max_grad_norm)
    state.optimizer.step()
    return {**sums, "grad_norm": grad_norm}


def update(
    state: State, comparisons: list[ReferencedComparison], config: Config, device: torch.device, stage: Stage
) -> dict[str, Tensor | int]:
    """Epochs of shuffled minibatches over the pairs; means over the steps, of which there are none without a pair."""
    rows = []
    for epoch in range(config.epochs):
        order = permutation(len(comparisons), config.seed, Stream.MINIBATCH, state.iteration, epoch)
        for index in torch.tensor(order).tensor_split(config.minibatches):
            if len(index):  # few pairs may be left
                batch = [comparisons[i] for i in index.tolist()]
                for attempt in stage.attempts():
                    with attempt as max_tokens:
                        rows.append(train_step(state, batch, config, device, max_tokens=max_tokens))
    means = {name: torch.stack([row[name].cpu() for row in rows]).mean() for name in (rows[0] if rows else ())}
    return {**means, "optimizer_steps": len(rows)}


def main(config: Config, *, observe: Callable[[State], None] | None = None) -> Path:
    """Run the stage; returns the folder of the trained policy. `observe` looks at the state after each iteration."""
    device, dtype = resolve_compute(config.device, config.dtype)
    sources = reward_functions.find_sources(config)
    stage = Stage(config, config.stage, inputs=sources.files, models=sources.models)
    if stage.finished:
        return stage.output
    env = reward_functions.read_environment(config, sources)
    require_batch("--rollout-size", config.rollout_size, len(env.prompts))
    if config.dry_run:
        responses, shapes = 2 * config.rollout_size, list(env.shapes.values())
        return stage.show(sampled_plan(config, shapes, env.prompts, responses=responses, group_size=2))
    policy = GPT.from_pretrained(sources.policy).full_precision().to(device)
    policy.gradient_checkpointing = config.gradient_checkpointing
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    members = reward_functions.load_reward_models(sources, device)
    reward = reward_functions.reward_of(config, members, sources.functions, env.encoding)
    state = State(policy, adamw(policy, learning_rate=config.learning_rate))

    with stage.begin(state, steps=config.iterations):
        while state.iteration < config.iterations:
            iteration = state.iteration
            factor = linear_schedule(iteration, config.iterations)
            learning_rate = set_learning_rate(state.optimizer, config.learning_rate * factor)
            chosen = batch_indices(len(env.prompts), config.rollout_size, seed=config.seed, step=iteration)
            with autocast(device, dtype):
                rollout = collect(
                    policy,
                    reference,
                    None,
                    reward,
                    [env.prompts[i] for i in chosen for _ in range(2)],
                    keys=rollout_keys(iteration, chosen, 2),
                    seed=config.seed,
                    eos_id=env.encoding.eot_token,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    missing_eos_score=config.missing_eos_score,
                    rescore=dtype != torch.float32,
                    max_tokens=stage.micro_batch_tokens,
                    groups=[i for i in chosen for _ in range(2)],
                )
                require_finite(scores=rollout.scores)
                pairs, counts = label(rollout)
                learned = update(state, pairs, config, device, stage)
                metrics = {**rollout_metrics(rollout), **counts, **learned}
                stage.hold()  # where no pair was left, no optimizer step has done so
                state.iteration += 1
                stage.finish(iteration, {**metrics, "learning_rate": learning_rate}, tokens=int(rollout.lengths.sum()))
            if observe:
                observe(state)
        stage.save(policy, env.encoding, objective="Online DPO: its own answers, labelled.")
    return stage.output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

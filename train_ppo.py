"""PPO: raise the reward model's score while staying near the SFT model.

Maximises, by clipped policy gradients with advantages from GAE,

    E_pi[ r(x, y) ] - beta KL(pi || pi_sft)

    python train_ppo.py                     # after train_reward.py, about a minute and a half on two cores
    python train_ppo.py --beta 0.02 --learning-rate 5e-4      # over-optimises: the score rises, the answers get worse

Each iteration samples a rollout, turns scores and per-token KL into rewards, estimates advantages once, and takes a few
epochs of shuffled minibatches. Expect the score to rise by one to two deviations at a KL of a few nats.
Left out: an entropy bonus and a shared trunk for policy and value; neither is needed at these sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minirlhf import data, ops, ppo, processes, tokenizer
from minirlhf.ensemble import Aggregate, RewardEnsemble
from minirlhf.hub import model_folder, model_or_earlier
from minirlhf.model import GPT, read_config
from minirlhf.model_card import write_model_card
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import Rollout, collect
from minirlhf.runtime import Stream, autocast, project_file, require, resolve_device, resolve_dtype, run_script
from minirlhf.settings import Count, Finite, FolderName, Fraction, NotNegative, Positive, Seed, Settings, TokenBudget
from minirlhf.stage import Stage, require_finite


@dataclass
class Config(Settings):
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    run: Path = Path("runs/tiny")
    """Folder of the run; this stage writes `<run>/ppo`."""
    stage: FolderName = "ppo"
    """Name of this stage's folder in the run; another name keeps an earlier result."""
    policy: str | None = None
    """Folder or hub name of the model that policy and reference start from, by default `<run>/sft/model`."""
    reward_model: str | None = None
    """Folder or hub name of the reward model, from which the value model starts; by default `<run>/reward/model`."""
    ensemble: tuple[str, ...] = ()
    """Folders or hub names of further reward models, with the same tokenizer: the score is that of all together."""
    aggregate: Aggregate = "mean"
    """What makes one score of an ensemble's: their mean, the worst, or the mean less `variance_penalty` variances."""
    variance_penalty: NotNegative = 1.0
    """See `aggregate`."""
    prompts: str = str(project_file("world", "prompts.train.jsonl"))
    """Prompts: a file of any known format (of pairs or demonstrations, their prompts), or a hub name."""
    split: str = ""
    """Part of `prompts`: a split of a hub data set, a slice, or both, e.g. test, [:90%], train[:1000]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query."""
    iterations: Count = 50
    """Rollouts; the learning rate falls linearly to 0 over them."""
    rollout_size: Count = 128
    """Prompts a rollout, one response each."""
    epochs: Count = 4
    """Passes over each rollout."""
    minibatches: Count = 4
    """Optimizer steps an epoch."""
    max_new_tokens: Count = 32
    """Length limit of a response in tokens."""
    temperature: Positive = 1.0
    """Of sampling and of every log-probability: policy, reference and training."""
    beta: NotNegative = 0.1
    """Coefficient of the KL penalty, in units of the reward a nat. Initial value where `kl_target` is set."""
    kl_target: Positive | None = None
    """KL to the reference in nats a response that an adaptive beta steers to; by default beta stays fixed."""
    kl_horizon: Positive = 10_000
    """Responses over which the adaptive beta moves."""
    gamma: Fraction = 1.0
    """Discount; 1, because a response is short and its score is for the whole."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    clip: Positive = 0.2
    """Clip range of the probability ratio."""
    value_clip: Positive = 0.2
    """Clip range of the value around its value at the rollout, in units of the reward."""
    missing_eos_score: Finite | None = -1.0
    """Score of a response that did not finish, in place of the reward model's; `None` keeps the reward model's."""
    whiten_rewards: bool = False
    """Scale the rewards of a rollout to deviation 1, keeping their mean."""
    stop_kl: Positive | None = None
    """End an iteration's epochs early once the approximate KL to the old policy exceeds this, in nats a token."""
    learning_rate: NotNegative = 2e-4
    """Initial learning rate of the policy's AdamW."""
    value_learning_rate: NotNegative = 5e-4
    """Initial learning rate of the value model's AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients of each model are scaled so that their joint L2 norm is at most this."""
    micro_batch_tokens: TokenBudget = 2048
    """Padded tokens a forward pass; `auto` halves until it fits. Changes memory and speed, not the gradient."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone and compute the rest again backward: less memory, one more forward pass."""
    resume: bool = False
    """Go on from the newest whole checkpoint; a finished stage is left as it is."""
    checkpoint_every: Count = 10
    """Iterations between two checkpoints; the newest two and the best are kept."""
    seed: Seed = 0
    """Seed of prompt order, sampling and minibatches."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of matrix products; auto is bfloat16 on CUDA, else float32."""


PRESETS = {
    "tiny": Config(),
    "gpt2": Config(
        preset="gpt2",
        run=Path("runs/gpt2"),
        iterations=400,
        rollout_size=512,  # Ziegler et al. 2019 and Huang et al. 2024: 512 episodes a rollout
        max_new_tokens=64,
        beta=0.05,  # Huang et al. 2024 (arXiv 2403.17031), for TL;DR; 0.15 adaptive in Ziegler et al. 2019
        learning_rate=1e-5,  # Ziegler et al. 2019, released code, for GPT-2 small
        value_learning_rate=1e-5,
        micro_batch_tokens=32_768,
    ),
}


# What an optimizer step measures as sums over tokens, each divided by the tokens of the whole minibatch.
SUMMED = (
    *("policy_loss", "value_loss", "entropy", "approximate_kl", "clip_fraction", "ratio"),
    *("value_clip_fraction", "value_error"),
)


@dataclass
class Experience(Rollout):
    """A rollout with what the update learns from it, (B, T-1) each: whitened advantages, and returns."""

    advantages: Tensor
    returns: Tensor


@dataclass
class State:
    """All that changes while the stage runs. Prompt order and random streams are functions of `iteration`."""

    policy: GPT
    value_model: ValueModel
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer
    kl_controller: ppo.AdaptiveKL | None
    iteration: int = 0
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out


def learn_from(rollout: Rollout, *, beta: float, gamma: float, lam: float, whiten_rewards: bool) -> Experience:
    """Rewards with the KL penalty, then GAE; advantages are whitened over the whole rollout, after the returns."""
    mask = rollout.mask
    rewards = ppo.kl_penalised_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask, beta=beta)
    if whiten_rewards:
        rewards = ops.rescale(rewards, mask)
    advantages, returns = ppo.gae(rewards, rollout.values, mask, gamma=gamma, lam=lam)
    advantages = ops.whiten(advantages, mask)
    require_finite(scores=rollout.scores, rewards=rewards, advantages=advantages, returns=returns)
    return Experience(**vars(rollout), advantages=advantages, returns=returns)


def train_step(state: State, minibatch: Experience, config: Config) -> dict[str, Tensor]:
    """One optimizer step of policy and value model; losses are means over all tokens of the minibatch."""
    tokens = minibatch.mask.sum()  # over micro-batches and processes
    sums = dict.fromkeys(SUMMED, torch.zeros(()))
    ratio_deviation = torch.zeros(())
    state.policy_optimizer.zero_grad(set_to_none=True)
    state.value_optimizer.zero_grad(set_to_none=True)
    for index in data.own_micro_batches(minibatch.lengths, config.micro_batch_tokens):
        part = minibatch.rows(index.to(tokens.device))
        mask = part.mask
        logprobs, entropy = state.policy.logprobs_and_entropy(part.tokens, mask, temperature=config.temperature)
        values = state.value_model(part.tokens, mask)
        old = (part.old_logprobs, part.advantages, mask)
        targets = (part.values, part.returns, mask)
        losses = {
            "policy_loss": ppo.policy_loss(logprobs, *old, clip=config.clip, denominator=tokens),
            "value_loss": ppo.value_loss(values, *targets, clip=config.value_clip, denominator=tokens),
        }
        sum(losses.values()).backward()  # policy and value model share no parameter
        seen = {
            **{name: loss.detach() for name, loss in losses.items()},
            "entropy": ops.masked_mean(entropy, mask, denominator=tokens),
            **ppo.policy_diagnostics(logprobs, *old, clip=config.clip, denominator=tokens),
            **ppo.value_diagnostics(values, *targets, clip=config.value_clip, denominator=tokens),
        }
        ratio_deviation = torch.maximum(ratio_deviation, seen.pop("ratio_deviation").cpu())
        sums = {name: sums[name] + value.cpu() for name, value in seen.items()}
    sums = processes.sum_each(sums)
    require_finite(policy_loss=sums["policy_loss"], value_loss=sums["value_loss"])
    processes.sum_gradients(state.policy)
    processes.sum_gradients(state.value_model)
    sums["policy_grad_norm"] = clip_gradients(state.policy, config.max_grad_norm)
    sums["value_grad_norm"] = clip_gradients(state.value_model, config.max_grad_norm)
    state.policy_optimizer.step()
    state.value_optimizer.step()
    return {**sums, "ratio_deviation": processes.all_max(ratio_deviation.double())}


def update(state: State, experience: Experience, config: Config) -> dict[str, Tensor | float]:
    """Several epochs over the rollout in shuffled minibatches; every row once an epoch. Means over the steps."""
    rows: list[dict[str, Tensor]] = []
    for epoch in range(config.epochs):
        key = (config.seed, Stream.MINIBATCH, state.iteration, epoch)
        order = torch.tensor(data.permutation(len(experience), *key))
        for index in order.tensor_split(min(config.minibatches, len(order))):  # an epoch's last rollout may be small
            rows.append(train_step(state, experience.rows(index.to(experience.tokens.device)), config))
            if config.stop_kl is not None and rows[-1]["approximate_kl"] > config.stop_kl:
                return _means(rows)
    return _means(rows)


def _means(rows: list[dict[str, Tensor]]) -> dict[str, Tensor | float]:
    first = rows[0].pop("ratio_deviation")
    for row in rows[1:]:
        row.pop("ratio_deviation")
    means = {name: torch.stack([row[name].cpu() for row in rows]).mean() for name in rows[0]}
    return {**means, "first_ratio_deviation": first, "optimizer_steps": len(rows)}


def end_iteration(state: State, *, kl: float, responses: int) -> None:
    """Steer an adaptive beta by the rollout's KL (nats a response); the next iteration has the next random streams."""
    if state.kl_controller:
        state.kl_controller.update(kl, responses)
    state.iteration += 1


def rollout_metrics(rollout: Rollout, experience: Experience) -> dict[str, Tensor]:
    """What the policy did before this iteration's update."""
    mask = rollout.mask
    return {
        "score": rollout.scores.mean(),
        "kl": ppo.sequence_kl(rollout.old_logprobs, rollout.ref_logprobs, mask),
        "response_length": mask.sum(dim=1).float().mean(),
        "eos_rate": rollout.finished.float().mean(),
        "explained_variance": ppo.explained_variance(rollout.values, experience.returns, mask),
        "sampling_gap": rollout.sampling_gap.max(),
    }


def reward_function(model: RewardModel | RewardEnsemble) -> Callable[[data.Batch], Tensor]:
    """The reward model as a function of a batch: it scores the sampled ids as they are."""
    return lambda batch: model(batch.tokens, batch.lengths)


def main(config: Config, *, observe: Callable[[State], None] | None = None) -> Path:
    """Run the stage; returns the folder of the trained policy. `observe` looks at the state after each iteration."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = model_or_earlier(config.policy, "--policy", config.run / "sft" / "model")
    reward_folder = model_or_earlier(config.reward_model, "--reward-model", config.run / "reward" / "model")
    output = config.run / config.stage / "model"
    reward_folders = (reward_folder, *map(model_folder, config.ensemble))
    models = (folder, *reward_folders)
    stage = Stage(
        config.run / config.stage, config, inputs=data.local_files(config.prompts), models=models, resume=config.resume
    )
    if stage.finished:
        return output
    prompt_records = data.load(config.prompts, "prompts", split=config.split, columns=config.columns)
    shapes = {source: read_config(source) for source in models}
    encoding = tokenizer.load(folder)
    for source, shape in shapes.items():
        tokenizer.check_fits(encoding, shape.vocab_size, source)
    room = min(shape.n_positions for shape in shapes.values()) - config.max_new_tokens
    require(room > 0, f"--max-new-tokens {config.max_new_tokens}: the model's context leaves no room for a prompt")
    prompts = data.encode_prompts(encoding, [r["prompt"] for r in prompt_records], max_length=room)
    data.require_batch("--rollout-size", config.rollout_size, len(prompts))
    require(
        config.minibatches <= config.rollout_size,
        f"--minibatches {config.minibatches}: more than the {config.rollout_size} rows of a rollout",
    )
    policy = GPT.from_pretrained(folder).to(device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    members = [RewardModel.from_pretrained(f).to(device).eval().requires_grad_(False) for f in reward_folders]
    ensemble = RewardEnsemble(members, aggregate=config.aggregate, penalty=config.variance_penalty)
    reward_model = ensemble if config.ensemble else members[0]
    value_model = ValueModel.from_reward_model(members[0])
    for trained in (policy, value_model.gpt):
        trained.gradient_checkpointing = config.gradient_checkpointing
    adam = {"eps": 1e-5}  # Ziegler et al. 2019; the default 1e-8 takes far larger first steps
    state = State(
        policy,
        value_model,
        adamw(policy, learning_rate=config.learning_rate, **adam),
        adamw(value_model, learning_rate=config.value_learning_rate, **adam),
        ppo.AdaptiveKL(config.beta, config.kl_target, config.kl_horizon) if config.kl_target else None,
    )

    with stage.begin(
        state, steps=config.iterations, checkpoint_every=config.checkpoint_every, best=("objective", "max")
    ):
        while state.iteration < config.iterations:
            iteration = state.iteration
            beta = state.kl_controller.beta if state.kl_controller else config.beta
            factor = linear_schedule(iteration, config.iterations)
            set_learning_rate(state.policy_optimizer, config.learning_rate * factor)
            set_learning_rate(state.value_optimizer, config.value_learning_rate * factor)
            chosen = data.batch_indices(len(prompts), config.rollout_size, seed=config.seed, step=iteration)
            with autocast(device, dtype), stage.attempt() as fitted:
                rollout = collect(
                    policy,
                    reference,
                    value_model,
                    reward_function(reward_model),
                    [prompts[i] for i in chosen],
                    keys=[(Stream.ROLLOUT, iteration, i) for i in chosen],
                    seed=config.seed,
                    eos_id=encoding.eot_token,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    missing_eos_score=config.missing_eos_score,
                    rescore=dtype != torch.float32,
                    max_tokens=fitted.micro_batch_tokens,
                )
                experience = learn_from(
                    rollout, beta=beta, gamma=config.gamma, lam=config.lam, whiten_rewards=config.whiten_rewards
                )
                metrics = {**rollout_metrics(rollout, experience), "beta": beta, **update(state, experience, fitted)}
                metrics["objective"] = metrics["score"] - beta * metrics["kl"]  # what PPO maximises
                end_iteration(state, kl=float(metrics["kl"]), responses=len(rollout))
                stage.finish(iteration, metrics, tokens=int(rollout.lengths.sum()))
            if observe and state.iteration > iteration:
                observe(state)
        if processes.is_writer():
            policy.save_pretrained(output)
            tokenizer.save(encoding, output)
            write_model_card(output, script="train_ppo.py", objective="PPO against a reward model.")
    return output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

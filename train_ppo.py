"""PPO: raise the reward model's score while staying near the SFT model.

Maximises, by clipped policy gradients with advantages from GAE,

    E_pi[ r(x, y) ] - beta KL(pi || pi_sft)

    python train_ppo.py                     # after train_reward.py, about a minute and a half on two cores
    python train_ppo.py --beta 0.02 --learning-rate 5e-4      # over-optimises: the score rises, the answers get worse

    python train_ppo.py --advantages rloo --group-size 4      # no value model: a prompt's responses are compared

Each iteration of `main` samples a rollout, turns scores and per-token KL into rewards, estimates advantages once, and
takes a few epochs of shuffled minibatches, each an optimizer step: `train_step`. Expect the score to rise by about one
standard deviation at a KL of a few nats. Only `--advantages gae` has a value model; the others are in minirlhf/grpo.py.
With one epoch of one minibatch the ratio is 1, and the update is a plain policy gradient.
Left out: an entropy bonus and a shared trunk for policy and value; neither is needed at these sizes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor, nn

from minirlhf import data, distributed, grpo, ops, ppo, reward_functions
from minirlhf.batch import Example, batch_indices, local_micro_batches, require_batch, shuffled
from minirlhf.config import (
    Count,
    Finite,
    FolderName,
    Fraction,
    NotNegative,
    Positive,
    SamplingConfig,
    Steps,
    TrainConfig,
    run_script,
)
from minirlhf.model import GPT
from minirlhf.optim import adamw, clip_gradients, linear_schedule, set_learning_rate
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.reward_functions import Environment, Reward
from minirlhf.rollout import Experience, Rollout, collect, draw_texts, ptx_gradient, rollout_keys, rollout_metrics
from minirlhf.runs.plan import sampled_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import Stream, autocast, require, require_finite, resolve_compute


@dataclass
class Config(SamplingConfig, TrainConfig):
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Set of defaults: `tiny` for a laptop CPU, `gpt2` for 124M parameters on one GPU."""
    stage: FolderName = "ppo"
    """Name of this stage's folder in the run; another name keeps an earlier result."""
    iterations: Count = 32
    """Rollouts."""
    rollout_size: Count = 128
    """Responses per rollout, `group_size` to each prompt."""
    advantages: Literal["gae", "rloo", "grpo", "grpo-no-std", "reinforce"] = "gae"
    """How advantages are estimated: by a value model (gae), against the other responses to the prompt (rloo, grpo, and
    grpo without the division by their deviation), or against a running mean of the rewards (reinforce)."""
    group_size: Count = 1
    """Responses to each prompt of a rollout; at least 2 where they are compared with each other."""
    baseline_decay: Fraction = 0.9
    """Share of itself that reinforce's running mean keeps at each rollout."""
    epochs: Count = 4
    """Passes over each rollout."""
    minibatches: Count = 4
    """Optimizer steps per epoch."""
    beta: NotNegative = 0.1
    """Coefficient of the KL penalty, in units of the reward per nat. Initial value where `kl_target` is set."""
    kl_target: Positive | None = None
    """KL to the reference in nats per response that an adaptive beta steers to; by default beta stays fixed."""
    kl_horizon: Positive = 10_000
    """Responses over which the adaptive beta moves."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty goes: into each token's reward, or into the loss, where it sees that token alone."""
    kl_estimator: Literal["k2", "k3"] = "k2"
    """Of the KL in the loss: k2 has the gradient of KL(pi || ref), k3 (GRPO's) that of KL(ref || pi)."""
    ptx_coefficient: NotNegative = 0.0
    """PPO-ptx: weight of the negative log-likelihood per token of `ptx_data`, added to the policy's loss."""
    ptx_data: str | None = None
    """Demonstrations or texts of PPO-ptx, as `--train` of train_sft.py; each step takes as many as of its minibatch."""
    gamma: Fraction = 1.0
    """Discount; 1, because a response is short and its score is for the whole."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    whiten_advantages: bool = True
    """Scale the advantages of gae to mean 0 and deviation 1 over the rollout."""
    clip: Positive | None = 0.2
    """Clip range of the probability ratio; `None` clips nothing."""
    value_clip: Positive | None = 0.2
    """Clip range of the value around its value at the rollout, in units of the reward; `None` clips nothing."""
    value_init: Literal["reward-model", "policy"] = "reward-model"
    """What the value model's trunk starts from; without a reward model, from the policy. Its head starts at 0."""
    missing_eos_score: Finite | None = -1.0
    """Score of a response that did not finish, in place of the reward model's; `None` keeps the reward model's."""
    whiten_rewards: bool = False
    """Scale the rewards of a rollout to deviation 1, keeping their mean."""
    stop_kl: Positive | None = None
    """End an iteration's epochs early once the approximate KL to the old policy exceeds this, in nats per token."""
    learning_rate: NotNegative = 2e-4
    """Initial learning rate of the policy's AdamW."""
    value_learning_rate: NotNegative = 5e-4
    """Initial learning rate of the value model's AdamW."""
    schedule: Literal["linear", "constant"] = "linear"
    """Both learning rates fall linearly to 0 over the iterations, or stay as they are."""
    warmup_iterations: Steps = 0
    """Iterations over which both rise from 0 first: AdamW's first steps are as large as its last, but less certain."""
    adam_eps: Positive = 1e-5
    """AdamW's epsilon (Ziegler et al. 2019); with the usual 1e-8 small gradients make larger first steps."""
    max_grad_norm: Positive = 1.0
    """Gradients of each model are scaled so that their joint L2 norm is at most this."""
    trace_every: Steps = 0
    """Iterations between two measurements by the embedded world's judge, for the report; 0 is none."""
    checkpoint_every: Count = 10
    """Iterations between two checkpoints; the newest two and the best are kept."""


PRESETS = {
    "tiny": Config(),
    "gpt2": Config(
        preset="gpt2",
        run=Path("runs/gpt2"),
        iterations=400,
        rollout_size=512,  # Ziegler et al. 2019 and Huang et al. 2024: 512 episodes per rollout
        max_new_tokens=64,
        beta=0.05,  # Huang et al. 2024 (arXiv 2403.17031), for TL;DR; 0.15 adaptive in Ziegler et al. 2019
        learning_rate=1e-5,  # Ziegler et al. 2019, released code, for GPT-2 small
        value_learning_rate=1e-5,
        micro_batch_tokens=32_768,
    ),
}


@dataclass
class State:
    """All that changes while the stage runs. Prompt order and random streams are functions of `iteration`."""

    policy: GPT
    value_model: ValueModel | None  # None where the advantages need no values
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer | None
    kl_controller: ppo.AdaptiveKL | None
    iteration: int = 0
    fitted_tokens: int = 0  # what `--micro-batch-tokens auto` has found; 0 before memory ran out
    baseline: grpo.RunningBaseline | None = None  # reinforce's

    @property
    def trained(self) -> list[tuple[str, nn.Module, torch.optim.Optimizer]]:
        """The models in training, by name, each with its optimizer."""
        policy = ("policy", self.policy, self.policy_optimizer)
        if self.value_model is None or self.value_optimizer is None:
            return [policy]
        return [policy, ("value", self.value_model, self.value_optimizer)]


def train_step(
    state: State,
    minibatch: Experience,
    config: Config,
    *,
    beta: float,
    max_tokens: int,
    texts: Sequence[Example] = (),
) -> dict[str, Tensor]:
    """One optimizer step of policy and value model; the losses are means over all tokens of the minibatch.

    beta   of the KL penalty, where that is in the loss
    texts  of PPO-ptx
    """
    tokens = minibatch.mask.sum()  # of the whole minibatch, over micro-batches and processes
    clip, value_clip = (math.inf if c is None else c for c in (config.clip, config.value_clip))
    parts: list[dict[str, Tensor]] = []
    for _, _, optimizer in state.trained:
        optimizer.zero_grad(set_to_none=True)
    for rows in local_micro_batches(minibatch.lengths, max_tokens):
        part = minibatch.rows(rows)
        inputs, old = (part.tokens, part.mask), (part.old_logprobs, part.advantages, part.mask)

        # The policy's clipped loss. Schulman et al. 2017, eq. 7; docs/equations.md#ppo
        logprobs, entropy = state.policy.logprobs_and_entropy(*inputs, temperature=config.temperature)  # (b, t-1) each
        policy_loss = ppo.policy_loss(logprobs, *old, clip=clip, denominator=tokens)
        values = {
            "policy_loss": policy_loss.detach(),
            "entropy": ops.masked_mean(entropy, part.mask, denominator=tokens),
        }
        values |= ppo.policy_diagnostics(logprobs, *old, clip=clip, denominator=tokens)
        if config.kl_in == "loss":
            pair, kind = (logprobs, part.ref_logprobs, part.mask), config.kl_estimator
            kl_loss = beta * grpo.kl_loss(*pair, estimator=kind, denominator=tokens)
            policy_loss, values["kl_loss"] = policy_loss + kl_loss, kl_loss.detach()
        policy_loss.backward()

        # The value model's, apart: one model's activations are in memory at a time. docs/equations.md#ppo
        if state.value_model is not None:
            predicted, targets = state.value_model(*inputs), (part.values, part.returns, part.mask)  # (b, t-1) each
            value_loss = ppo.value_loss(predicted, *targets, clip=value_clip, denominator=tokens)
            values |= ppo.value_diagnostics(predicted, *targets, clip=value_clip, denominator=tokens)
            values["value_loss"] = value_loss.detach()
            value_loss.backward()
        parts.append(values)
    if texts:
        parts.append(ptx_gradient(state.policy, texts, coefficient=config.ptx_coefficient, max_tokens=max_tokens))
    sums = distributed.add_up(parts, measured(state, config, ptx=len(texts) > 0), maxima=("ratio_deviation",))
    require_finite(**{name: value for name, value in sums.items() if name.endswith("_loss")})
    for _, model, _ in state.trained:
        distributed.sum_gradients(model)
    norms = {f"{name}_grad_norm": clip_gradients(model, config.max_grad_norm) for name, model, _ in state.trained}
    for _, _, optimizer in state.trained:
        optimizer.step()
    return {**sums, **norms}


def sample_rollout(
    state: State, reference: GPT, reward: Reward, env: Environment, config: Config, stage: Stage, *, rescore: bool
) -> Rollout:
    """A response, or a group of them, to each prompt of this iteration, with all that is known before the update."""
    k, size = config.group_size, config.rollout_size // config.group_size
    chosen = batch_indices(len(env.prompts), size, seed=config.seed, step=state.iteration)
    return collect(
        state.policy,
        reference,
        state.value_model,
        reward,
        [env.prompts[i] for i in chosen for _ in range(k)],
        keys=rollout_keys(state.iteration, chosen, k),
        seed=config.seed,
        eos_id=env.encoding.eot_token,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        missing_eos_score=config.missing_eos_score,
        rescore=rescore,
        max_tokens=stage.micro_batch_tokens,
        groups=[i for i in chosen for _ in range(k)],
    )


def response_advantages(state: State, rewards: Tensor, rollout: Rollout, config: Config) -> Tensor:
    """(B, T-1) advantages without a value model: each response has one, of its summed rewards, at all of its tokens."""
    rewards, groups = rewards.sum(dim=1), rollout.groups  # (B,)
    match config.advantages:  # docs/equations.md#ppo-without-a-value-model
        case "rloo":
            advantages = grpo.rloo(rewards, groups)
        case "grpo":
            advantages = grpo.grpo(rewards, groups)
        case "grpo-no-std":
            advantages = grpo.grpo_no_std(rewards, groups)
        case _:
            advantages = grpo.reinforce(rewards, baseline=state.baseline.value if state.baseline else 0.0)
    return grpo.per_token(advantages, rollout.mask)


def measured(state: State, config: Config, *, ptx: bool) -> list[str]:
    """Names of a step's values that are sums over tokens, each divided by the tokens of the whole minibatch."""
    names = ["policy_loss", "entropy", "approximate_kl", "clip_fraction", "ratio"]
    names += ["kl_loss"] if config.kl_in == "loss" else []
    names += ["ptx_loss"] if ptx else []
    return names + (["value_loss", "value_clip_fraction", "value_error"] if state.value_model else [])


def end_iteration(
    state: State, experience: Experience, steps: list[dict[str, Tensor]], config: Config, *, beta: float
) -> dict[str, Tensor | float]:
    """Steer an adaptive beta and a running baseline, count the iteration; returns what to log of it.

    The next iteration has the next random streams.
    """
    deviations = [step.pop("ratio_deviation") for step in steps]
    means = {name: torch.stack([step[name].cpu() for step in steps]).mean() for name in steps[0]}
    metrics: dict[str, Tensor | float] = {**rollout_metrics(experience), "beta": beta, **means}
    metrics |= {"first_ratio_deviation": deviations[0], "optimizer_steps": len(steps)}
    if state.value_model is not None:
        metrics["explained_variance"] = ppo.explained_variance(experience.values, experience.returns, experience.mask)
    metrics["objective"] = metrics["score"] - beta * metrics["kl"]  # what PPO maximises
    if state.kl_controller:
        state.kl_controller.update(float(metrics["kl"]), len(experience))
    if state.baseline:
        state.baseline.update(float(metrics["objective" if config.kl_in == "reward" else "score"]))
    state.iteration += 1
    return metrics


def check_settings(config: Config) -> None:
    """Raise UserError where two settings do not fit each other."""
    name, k = config.advantages, config.group_size
    compared = f"--group-size {k}: --advantages {name} compares a prompt's responses with each other; give at least 2"
    require(name in ("gae", "reinforce") or k >= 2, compared)
    require(config.rollout_size % k == 0, f"--group-size {k}: must divide --rollout-size {config.rollout_size}")
    many = f"--minibatches {config.minibatches}: more than the {config.rollout_size} rows of a rollout"
    require(config.minibatches <= config.rollout_size, many)
    whole = f"is for rewards per token, and --advantages {name} has one per response; leave it out, or use gae"
    require(name == "gae" or config.gamma == 1, f"--gamma {config.gamma}: {whole}")
    require(name == "gae" or not config.whiten_rewards, f"--whiten-rewards: {whole}")
    plain = f"--no-whiten-advantages: --advantages {name} does not whiten them in any case; leave it out"
    require(name == "gae" or config.whiten_advantages, plain)
    both = "--ptx-data and --ptx-coefficient: belong together; give both, the coefficient above 0, or none"
    require((config.ptx_data is not None) == (config.ptx_coefficient > 0), both)


def initial_state(config: Config, policy: GPT, members: Sequence[RewardModel]) -> State:
    """Policy, optimizers and controllers before the first iteration; a value model for `gae` alone.

    It starts from the first of the reward models, or from the policy where there is none or `value_init` says so.
    """
    value_model = None
    if config.advantages == "gae":
        scored = members and config.value_init == "reward-model"
        origin = members[0] if scored else RewardModel.from_gpt(policy, generator=torch.Generator())
        value_model = ValueModel.from_reward_model(origin)
        value_model.gpt.gradient_checkpointing = config.gradient_checkpointing
    policy.gradient_checkpointing = config.gradient_checkpointing
    rates, eps = (config.learning_rate, config.value_learning_rate), config.adam_eps
    return State(
        policy,
        value_model,
        adamw(policy, learning_rate=rates[0], eps=eps),
        adamw(value_model, learning_rate=rates[1], eps=eps) if value_model else None,
        ppo.AdaptiveKL(config.beta, config.kl_target, config.kl_horizon) if config.kl_target else None,
        baseline=grpo.RunningBaseline(config.baseline_decay) if config.advantages == "reinforce" else None,
    )


def set_learning_rates(state: State, config: Config) -> None:
    """Both learning rates of this iteration: a warm-up, then linearly to 0 or as they are."""
    warmup = config.warmup_iterations
    factor = linear_schedule(state.iteration, config.iterations, warmup_steps=warmup)
    factor = factor if config.schedule == "linear" or state.iteration < warmup else 1.0
    set_learning_rate(state.policy_optimizer, config.learning_rate * factor)
    if state.value_optimizer:
        set_learning_rate(state.value_optimizer, config.value_learning_rate * factor)


Observer = Callable[[State, GPT, Reward, tiktoken.Encoding], object]


def observers(config: Config, observe: Observer | None) -> Observer:
    """All that look at the run as one: `observe`, and the trace, loaded by name because PPO itself needs no judge."""
    every: list[Observer] = []
    if config.trace_every:
        every.append(reward_functions.load("minirlhf.evaluate.trace:Trace", flag="--trace-every")(config))
    every += [observe] if observe else []
    return lambda *state: [look(*state) for look in every]


def main(config: Config, *, observe: Observer | None = None) -> Path:
    """Run the stage; returns the folder of the trained policy.

    observe  called with state, reference, reward and encoding before the first iteration and after each
    """
    check_settings(config)
    device, dtype = resolve_compute(config.device, config.dtype)
    sources = reward_functions.find_sources(config)
    files = [*sources.files, *data.local_files(config.ptx_data)]
    stage = Stage(config, config.stage, inputs=files, models=sources.models)
    if stage.finished:
        return stage.output
    env, k = reward_functions.read_environment(config, sources), config.group_size
    grouped = "" if k == 1 else f" in groups of {k}, prompts"
    require_batch(f"--rollout-size{grouped}", config.rollout_size // k, len(env.prompts))
    context, rescore = env.shapes[sources.policy].n_positions, dtype != torch.float32
    texts = reward_functions.pretraining_texts(config.ptx_data, env.encoding, max_length=context)
    if config.dry_run:
        shapes, responses, valued = list(env.shapes.values()), config.rollout_size, config.advantages == "gae"
        plan = sampled_plan(config, shapes, env.prompts, responses=responses, group_size=k, valued=valued)
        return stage.show(plan)
    policy = GPT.from_pretrained(sources.policy).full_precision().to(device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    members = reward_functions.load_reward_models(sources, device)
    reward = reward_functions.reward_of(config, members, sources.functions, env.encoding)
    state = initial_state(config, policy, members)
    look = observers(config, observe)

    with stage.begin(state, steps=config.iterations, best=("objective", "max")):
        look(state, reference, reward, env.encoding)
        while state.iteration < config.iterations:
            iteration, beta = state.iteration, state.kl_controller.beta if state.kl_controller else config.beta
            set_learning_rates(state, config)
            with autocast(device, dtype):
                rollout = sample_rollout(state, reference, reward, env, config, stage, rescore=rescore)
                mask = rollout.mask  # (B, T-1), true on the response, its EOS included

                # Rewards: the KL penalty at each token, the score at the last. Ziegler et al. 2019, eq. 2
                old, penalty = (rollout.old_logprobs, rollout.ref_logprobs), beta if config.kl_in == "reward" else 0.0
                rewards = ppo.kl_penalised_rewards(rollout.scores, *old, mask, beta=penalty)  # (B, T-1)

                # Advantages: once, before the first update. Schulman et al. 2016, eq. 16; docs/equations.md#ppo
                if config.advantages == "gae":
                    rewards = ops.rescale(rewards, mask) if config.whiten_rewards else rewards
                    advantages, returns = ppo.gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
                    advantages = ops.whiten(advantages, mask) if config.whiten_advantages else advantages
                else:
                    advantages = response_advantages(state, rewards, rollout, config)
                    returns = torch.zeros_like(rewards)
                require_finite(scores=rollout.scores, rewards=rewards, advantages=advantages, returns=returns)
                experience = Experience(**vars(rollout), advantages=advantages, returns=returns)

                # Epochs of minibatches, each an optimizer step.
                steps: list[dict[str, Tensor]] = []
                for epoch in range(config.epochs):
                    key = (config.seed, Stream.MINIBATCH, iteration, epoch)
                    for number, minibatch in enumerate(shuffled(experience, config.minibatches, *key)):
                        if steps and config.stop_kl is not None and steps[-1]["approximate_kl"] > config.stop_kl:
                            break  # in the epochs that remain too
                        of_texts = (config.seed, Stream.PRETRAINING, iteration, epoch, number)
                        drawn = draw_texts(texts, len(minibatch), *of_texts)
                        for attempt in stage.attempts():
                            with attempt as tokens:
                                step = train_step(state, minibatch, config, beta=beta, max_tokens=tokens, texts=drawn)
                        steps.append(step)
                metrics = end_iteration(state, experience, steps, config, beta=beta)
                stage.finish(iteration, metrics, tokens=int(rollout.lengths.sum()))
            look(state, reference, reward, env.encoding)
        stage.save(policy, env.encoding, objective="PPO against a reward model.")
    return stage.output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

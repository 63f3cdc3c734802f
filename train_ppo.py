"""PPO: raise the reward model's score while staying near the SFT model.

Maximises, by clipped policy gradients with advantages from GAE,

    E_pi[ r(x, y) ] - beta KL(pi || pi_sft)

    python train_ppo.py                     # after train_reward.py, about a minute and a half on two cores
    python train_ppo.py --beta 0.02 --learning-rate 5e-4      # over-optimises: the score rises, the answers get worse

    python train_ppo.py --advantages rloo --group-size 4      # no value model: a prompt's responses are compared

Each iteration samples a rollout, turns scores and per-token KL into rewards, estimates advantages once, and takes a few
epochs of shuffled minibatches. Here is the loop; minirlhf/environment.py has prompts and scores, minirlhf/experience.py
rewards and advantages, minirlhf/ppo_update.py the update. Expect the score to rise by one to two deviations at a KL of
a few nats.
Only `--advantages gae` has a value model; the others are in minirlhf/advantages.py. With one epoch of one minibatch the
ratio is 1, and the update is a plain policy gradient.
Left out: an entropy bonus and a shared trunk for policy and value; neither is needed at these sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch

from minirlhf import data, distributed, ppo, reward_functions, tokenizer
from minirlhf.batch import Example, batch_indices, require_batch
from minirlhf.config import (
    Count,
    Finite,
    FolderName,
    Fraction,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Steps,
    TokenBudget,
    TrackerName,
    run_script,
)
from minirlhf.encode import encode_demonstrations
from minirlhf.evaluate.trace import Trace
from minirlhf.experience import GROUPED, Experience, learn_from, learn_without_values, rollout_metrics
from minirlhf.grpo import RunningBaseline
from minirlhf.model import GPT
from minirlhf.optim import adamw, linear_schedule, set_learning_rate
from minirlhf.ppo_update import State, beta_now, update
from minirlhf.reward import Aggregate, RewardModel, ValueModel
from minirlhf.reward_functions import Reward
from minirlhf.rollout import Rollout, collect, rollout_keys
from minirlhf.runs.card import write_model_card
from minirlhf.runs.plan import sampled_plan, show_plan
from minirlhf.runs.stage import Stage
from minirlhf.runtime import autocast, project_file, require, resolve_device, resolve_dtype


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
    reward: tuple[str, ...] = ()
    """Functions package.module:function, (prompts, responses) -> scores, that are added up; see minirlhf/rewards.py.
    With one, a reward model is used, and its score added, only where `reward_model` or `ensemble` names it."""
    prompts: str = str(project_file("world", "prompts.train.jsonl"))
    """Prompts: a file of any known format (of pairs or demonstrations, their prompts), or a hub name."""
    split: str = ""
    """Part of `prompts`: a split of a hub data set, a slice, or both, e.g. test, [:90%], train[:1000]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query."""
    iterations: Count = 32
    """Rollouts."""
    rollout_size: Count = 128
    """Responses a rollout: `group_size` to each prompt."""
    advantages: Literal["gae", "rloo", "grpo", "grpo-no-std", "reinforce"] = "gae"
    """How advantages are estimated: by a value model (gae), against the other responses to the prompt (rloo, grpo, and
    grpo without the division by their deviation), or against a running mean of the rewards (reinforce)."""
    group_size: Count = 1
    """Responses to each prompt of a rollout; at least 2 where they are compared with each other."""
    baseline_decay: Fraction = 0.9
    """What reinforce's running mean keeps of earlier rollouts, a rollout."""
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
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty goes: into each token's reward, or into the loss, where it sees that token alone."""
    kl_estimator: Literal["k2", "k3"] = "k2"
    """Of the KL in the loss: k2 has the gradient of KL(pi || ref), k3 (GRPO's) that of KL(ref || pi)."""
    ptx_coefficient: NotNegative = 0.0
    """PPO-ptx: weight of the negative log-likelihood of `ptx_data` a token, added to the policy's loss."""
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
    """End an iteration's epochs early once the approximate KL to the old policy exceeds this, in nats a token."""
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
    micro_batch_tokens: TokenBudget = 2048
    """Padded tokens a forward pass; `auto` halves until it fits. Changes memory and speed, not the gradient."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone and compute the rest again backward: less memory, one more forward pass."""
    trace_every: Steps = 0
    """Iterations between two measurements by the embedded world's judge, for the report; 0 is none."""
    track: TrackerName | None = None
    """Show the metrics in `tensorboard` or `wandb` as well; Weights & Biases stays offline unless WANDB_MODE is set."""
    dry_run: bool = False
    """Say what would be done and about what it takes, read no weights and write nothing."""
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


def rate_factor(iteration: int, config: Config) -> float:
    """What the learning rates are multiplied by in an iteration."""
    warmup = config.warmup_iterations
    factor = linear_schedule(iteration, config.iterations, warmup_steps=warmup)
    return factor if config.schedule == "linear" or iteration < warmup else 1.0


def check_settings(config: Config) -> None:
    """Raise UserError where two settings do not fit each other."""
    name, k = config.advantages, config.group_size
    compared = f"--group-size {k}: --advantages {name} compares a prompt's responses with each other; give at least 2"
    require(name not in GROUPED or k >= 2, compared)
    require(config.rollout_size % k == 0, f"--group-size {k}: must divide --rollout-size {config.rollout_size}")
    require(
        config.minibatches <= config.rollout_size,
        f"--minibatches {config.minibatches}: more than the {config.rollout_size} rows of a rollout",
    )
    whole = f"is for rewards a token, and --advantages {name} has one a response; leave it out, or use gae"
    require(name == "gae" or config.gamma == 1, f"--gamma {config.gamma}: {whole}")
    require(name == "gae" or not config.whiten_rewards, f"--whiten-rewards: {whole}")
    plain = f"--no-whiten-advantages: --advantages {name} does not whiten them in any case; leave it out"
    require(name == "gae" or config.whiten_advantages, plain)
    both = "--ptx-data and --ptx-coefficient: belong together; give both, the coefficient above 0, or none"
    require((config.ptx_data is not None) == (config.ptx_coefficient > 0), both)


def end_iteration(state: State, *, kl: float, responses: int, reward: float) -> None:
    """Steer an adaptive beta by the rollout's KL (nats a response), and a running baseline by its mean reward.

    The next iteration has the next random streams.
    """
    if state.kl_controller:
        state.kl_controller.update(kl, responses)
    if state.baseline:
        state.baseline.update(reward)
    state.iteration += 1


def estimate(state: State, rollout: Rollout, config: Config) -> Experience:
    """The advantages by `--advantages`; a KL penalty that is in the loss is not in the rewards as well."""
    beta = beta_now(state, config) if config.kl_in == "reward" else 0.0
    if config.advantages == "gae":
        whiten = {"whiten_rewards": config.whiten_rewards, "whiten_advantages": config.whiten_advantages}
        return learn_from(rollout, beta=beta, gamma=config.gamma, lam=config.lam, **whiten)
    return learn_without_values(rollout, advantages=config.advantages, beta=beta, baseline=state.baseline)


def pretraining_texts(config: Config, encoding: tiktoken.Encoding, *, max_length: int) -> list[Example]:
    """The texts of PPO-ptx, none without."""
    if config.ptx_data is None:
        return []
    records = data.load(config.ptx_data, "demonstrations")
    texts = encode_demonstrations(encoding, records, max_length=max_length)
    require(len(texts) > 0, f"--ptx-data {config.ptx_data}: nothing in it fits {max_length} tokens")
    return texts


def initial_state(config: Config, policy: GPT, members: Sequence[RewardModel]) -> State:
    """Policy, optimizers and controllers before the first iteration; a value model for `gae` alone.

    It starts from the first of the reward models, or from the policy where there is none or `value_init` says so.
    """
    value_model = None
    if config.advantages == "gae":
        scored = members and config.value_init == "reward-model"
        origin = members[0] if scored else RewardModel.from_gpt(policy, generator=torch.Generator())
        value_model = ValueModel.from_reward_model(origin)
    for trained in (policy, *([value_model.gpt] if value_model else [])):
        trained.gradient_checkpointing = config.gradient_checkpointing
    adam = {"eps": config.adam_eps}
    return State(
        policy,
        value_model,
        adamw(policy, learning_rate=config.learning_rate, **adam),
        adamw(value_model, learning_rate=config.value_learning_rate, **adam) if value_model else None,
        ppo.AdaptiveKL(config.beta, config.kl_target, config.kl_horizon) if config.kl_target else None,
        baseline=RunningBaseline(config.baseline_decay) if config.advantages == "reinforce" else None,
    )


def judged(config: Config, reference: GPT, reward: Reward, encoding: tiktoken.Encoding) -> Trace:
    """What measures the policy by the world's judge while it trains."""
    return Trace(
        config.run / config.stage,
        every=config.trace_every,
        iterations=config.iterations,
        reference=reference,
        reward=reward,
        encoding=encoding,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        max_tokens=2048,
    )


def main(config: Config, *, observe: Callable[[State], None] | None = None) -> Path:
    """Run the stage; returns the folder of the trained policy. `observe` looks at the state after each iteration."""
    check_settings(config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    sources = reward_functions.find_sources(config)
    output = config.run / config.stage / "model"
    files = [*sources.files, *(data.local_files(config.ptx_data) if config.ptx_data else [])]
    stage = Stage(config.run / config.stage, config, inputs=files, models=sources.models, resume=config.resume)
    if stage.finished:
        return output
    env = reward_functions.read_environment(config, sources)
    per_rollout = config.rollout_size // config.group_size  # prompts
    grouped = "" if config.group_size == 1 else f" in groups of {config.group_size}, prompts"
    require_batch(f"--rollout-size{grouped}", per_rollout, len(env.prompts))
    texts = pretraining_texts(config, env.encoding, max_length=env.shapes[sources.policy].n_positions)
    if config.dry_run:
        groups = {"responses": config.rollout_size, "group_size": config.group_size}
        valued = config.advantages == "gae"
        plan = sampled_plan(config, list(env.shapes.values()), env.prompts, valued=valued, **groups)
        show_plan(plan, config, device=device, dtype=dtype)
        return output
    policy = GPT.from_pretrained(sources.policy).to(device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    members = reward_functions.load_reward_models(sources, device)
    reward = reward_functions.reward_of(config, members, sources.functions, env.encoding)
    state = initial_state(config, policy, members)
    trace = judged(config, reference, reward, env.encoding) if config.trace_every else None

    with stage.begin(
        state, steps=config.iterations, checkpoint_every=config.checkpoint_every, best=("objective", "max")
    ):
        if trace:
            trace.observe(policy, state.iteration)
        while state.iteration < config.iterations:
            iteration = state.iteration
            beta = beta_now(state, config)
            factor = rate_factor(iteration, config)
            set_learning_rate(state.policy_optimizer, config.learning_rate * factor)
            if state.value_optimizer:
                set_learning_rate(state.value_optimizer, config.value_learning_rate * factor)
            chosen = batch_indices(len(env.prompts), per_rollout, seed=config.seed, step=iteration)
            rows = [(prompt, candidate) for prompt in chosen for candidate in range(config.group_size)]
            with autocast(device, dtype), stage.attempt() as fitted:
                rollout = collect(
                    policy,
                    reference,
                    state.value_model,
                    reward,
                    [env.prompts[prompt] for prompt, _ in rows],
                    keys=rollout_keys(iteration, rows, config.group_size),
                    seed=config.seed,
                    eos_id=env.encoding.eot_token,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    missing_eos_score=config.missing_eos_score,
                    rescore=dtype != torch.float32,
                    max_tokens=fitted.micro_batch_tokens,
                    groups=[prompt for prompt, _ in rows],
                )
                experience = estimate(state, rollout, config)
                seen = rollout_metrics(rollout, experience, valued=state.value_model is not None)
                metrics = {**seen, "beta": beta, **update(state, experience, fitted, texts=texts)}
                metrics["objective"] = metrics["score"] - beta * metrics["kl"]  # what PPO maximises
                rewarded = metrics["objective" if config.kl_in == "reward" else "score"]
                end_iteration(state, kl=float(metrics["kl"]), responses=len(rollout), reward=float(rewarded))
                stage.finish(iteration, metrics, tokens=int(rollout.lengths.sum()))
            if trace and state.iteration > iteration:
                trace.observe(policy, state.iteration)
            if observe and state.iteration > iteration:
                observe(state)
        if distributed.is_writer():
            policy.save_pretrained(output)
            tokenizer.save(env.encoding, output)
            write_model_card(output, script="train_ppo.py", objective="PPO against a reward model.")
    return output


if __name__ == "__main__":
    run_script(main, PRESETS, several=True)

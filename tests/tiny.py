"""Every stage at a size that takes a fraction of a second, and a finished run that tests read and never write to.

The model has one layer and few channels, so what it samples is half nonsense. That is of use: some answers end with
EOS and some do not, and some words are written in other pieces than the tokenizer would choose.
All settings that matter are given here, so that no test depends on a stage's defaults.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import online_dpo, ops, ppo, tokenizer, world
from minirlhf.batch import Batch, shuffled
from minirlhf.feedback import __main__ as feedback
from minirlhf.files import write_records
from minirlhf.model import GPT
from minirlhf.rollout import Experience, Rollout
from minirlhf.runtime import Stream

ENCODING = tokenizer.load("world")
EOS = ENCODING.eot_token
SEED = 3
LONGEST = 8  # tokens of a sampled answer
PROMPTS = list(world.questions())[:220:11]


def write_inputs(run: Path) -> None:
    """Demonstrations, held-out demonstrations and prompts, in the run's own folder."""
    answers = [world.ideal(p) if i % 2 else " Yes." for i, p in enumerate(PROMPTS)]  # short ones, to learn EOS from
    demonstrations = [{"prompt": p, "response": a} for p, a in zip(PROMPTS, answers, strict=True)]
    write_records(run / "train.jsonl", demonstrations)
    write_records(run / "validation.jsonl", demonstrations[::3])
    write_records(run / "prompts.jsonl", [{"prompt": p} for p in PROMPTS[:10]])


def sft_config(run: Path) -> train_sft.Config:
    return train_sft.Config(
        run=run,
        train=run / "train.jsonl",
        validation=run / "validation.jsonl",
        n_layer=1,
        n_head=2,
        n_embd=16,
        n_positions=96,
        epochs=14.6,  # 3 steps an epoch: 43.8, which is 44
        batch_size=8,
        learning_rate=3e-2,
        warmup_steps=3,
        weight_decay=0.1,
        micro_batch_tokens=128,
        validation_every=20,
        seed=SEED,
        device="cpu",
    )


def feedback_config(run: Path) -> feedback.Config:
    return feedback.Config(
        run=run,
        prompts=run / "train.jsonl",
        max_prompts=18,
        candidates=3,
        max_new_tokens=LONGEST,
        labeller_temperature=0.01,
        length_bias=0.1,
        seed=SEED,
        device="cpu",
    )


def reward_config(run: Path) -> train_reward.Config:
    return train_reward.Config(
        run=run,
        validation_share=0.25,
        reference_prompts=run / "prompts.jsonl",
        reference_samples=8,
        max_new_tokens=LONGEST,
        epochs=2.0,
        contrast=1.5,
        batch_size=5,
        learning_rate=1e-2,
        warmup_steps=2,
        weight_decay=0.02,
        micro_batch_tokens=128,
        seed=SEED,
        device="cpu",
    )


def ppo_config(run: Path) -> train_ppo.Config:
    return train_ppo.Config(
        run=run,
        prompts=run / "prompts.jsonl",
        iterations=3,  # 10 prompts, 6 a rollout: the third rollout begins the second epoch
        rollout_size=6,
        epochs=2,
        minibatches=2,
        max_new_tokens=LONGEST,
        temperature=0.8,
        beta=0.2,
        gamma=0.99,
        lam=0.9,
        missing_eos_score=-1.5,
        learning_rate=1e-2,
        value_learning_rate=2e-2,
        micro_batch_tokens=64,
        seed=SEED,
        device="cpu",
    )


def dpo_config(run: Path) -> train_dpo.Config:
    return train_dpo.Config(
        run=run,
        validation_share=0.25,
        epochs=2.0,
        batch_size=5,
        beta=0.3,
        learning_rate=1e-2,
        warmup_steps=2,
        micro_batch_tokens=128,
        validation_every=4,
        seed=SEED,
        device="cpu",
    )


ONLINE_DPO = {
    "iterations": 3,
    "rollout_size": 10,
    "epochs": 2,
    "minibatches": 2,
    "max_new_tokens": LONGEST,
    "temperature": 0.8,
    "beta": 0.3,
    "missing_eos_score": -1.5,
    "learning_rate": 3e-3,
    "micro_batch_tokens": 64,
    "checkpoint_every": 1,
    "seed": SEED,
}


def online_dpo_config(run: Path) -> online_dpo.Config:
    return online_dpo.Config(run=run, prompts=str(run / "train.jsonl"), device="cpu", **ONLINE_DPO)


STAGES: dict[str, tuple[Callable, Callable[[Path], Any]]] = {
    "sft": (train_sft.main, sft_config),
    "feedback": (feedback.main, feedback_config),
    "reward": (train_reward.main, reward_config),
    "ppo": (train_ppo.main, ppo_config),
    "dpo": (train_dpo.main, dpo_config),
}


def run_stage(name: str, run: Path, **changes: Any) -> Any:
    """One stage with the small configuration and some settings changed."""
    main, config = STAGES[name]
    return main(replace(config(run), **changes))


@functools.cache
def finished_run() -> Path:
    """The folder of a run in which every stage was run once. Read only; `copy_of` gives one to write to."""
    run = Path(tempfile.mkdtemp(prefix="minirlhf-test-"))
    atexit.register(shutil.rmtree, run, ignore_errors=True)
    write_inputs(run)
    for name in STAGES:
        run_stage(name, run)
    return run


def copy_of(run: Path, folder: Path, *stages: str) -> Path:
    """A new run with the inputs and the results of some stages of `run`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in run.glob("*.jsonl"):
        shutil.copy(file, folder / file.name)
    for stage in stages:
        shutil.copytree(run / stage, folder / stage)
    return folder


# ------------------------------------------------------------------------------------------------ looking into a stage
@dataclass
class Call:
    """One call of a function: its arguments by name, what it returned, and a note taken before it ran."""

    arguments: dict[str, Any]
    result: Any
    before: Any


def spy(
    patch: pytest.MonkeyPatch, module: ModuleType, name: str, before: Callable[[dict[str, Any]], Any] | None = None
) -> list[Call]:
    """Let `module.name` do its work and keep its calls, in order; `before` notes what the call will change."""
    function = getattr(module, name)
    calls: list[Call] = []

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        note = before(arguments) if before else None
        result = function(*args, **kwargs)
        calls.append(Call(arguments, result, note))
        return result

    patch.setattr(module, name, watched)
    return calls


def learn_from(rollout: Rollout, *, beta: float, gamma: float, lam: float, whiten_rewards: bool = False) -> Experience:
    """Rewards with the KL penalty and whitened advantages by GAE, as train_ppo.py makes them."""
    logprobs, mask = (rollout.old_logprobs, rollout.ref_logprobs), rollout.mask
    rewards = ppo.kl_penalised_rewards(rollout.scores, *logprobs, mask, beta=beta)
    rewards = ops.rescale(rewards, mask) if whiten_rewards else rewards
    advantages, returns = ppo.gae(rewards, rollout.values, mask, gamma=gamma, lam=lam)
    return Experience(**vars(rollout), advantages=ops.whiten(advantages, mask), returns=returns)


def update(
    state: train_ppo.State, experience: Experience, config: train_ppo.Config, *, max_tokens: int = 2048
) -> dict[str, Any]:
    """Epochs of minibatches over one rollout, as train_ppo.py takes them; returns what is logged."""
    key, steps = (config.seed, Stream.MINIBATCH, state.iteration), []
    for epoch in range(config.epochs):
        for part in shuffled(experience, config.minibatches, *key, epoch):
            steps.append(train_ppo.train_step(state, part, config, beta=config.beta, max_tokens=max_tokens))
    return train_ppo.end_iteration(state, experience, steps, config, beta=config.beta)


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def response_logprobs(model: GPT, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probability of each response token, the row alone: by the softmax's definition, in float64."""
    tokens = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model(tokens)[0].double() / temperature
    rows = logits[len(prompt) - 1 : -1]
    return torch.stack([row[token] - row.logsumexp(0) for row, token in zip(rows, response, strict=True)])


def prompt_and_response(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt ids and response ids."""
    prompts = [row[:n] for row, n in zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), strict=True)]
    return list(zip(prompts, batch.response_ids(), strict=True))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

"""What a policy is asked, and what its answers are worth: prompts, and the sum of reward models and functions.

PPO, online DPO and rejection sampling sample answers, and say with the same flags to what and for what. In the words of
reinforcement learning this is the environment: a prompt is the state, a whole answer the action, and the episode ends
with its reward. `find` and `read` take names, configurations and prompts, and no weights: a mistake ends the run before
work is lost, and `--dry-run` needs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tiktoken
import torch
from torch import Tensor

from minirlhf import data, rewards, tokenizer
from minirlhf.ensemble import Aggregate, RewardEnsemble
from minirlhf.hub import model_folder, model_or_earlier
from minirlhf.model import GPTConfig, read_config
from minirlhf.reward import RewardModel
from minirlhf.runtime import require

Reward = Callable[[data.Batch], Tensor]


class Asks(Protocol):
    """The settings of a stage that samples."""

    run: Path
    policy: str | None
    reward_model: str | None
    ensemble: tuple[str, ...]
    aggregate: Aggregate
    variance_penalty: float
    reward: tuple[str, ...]
    prompts: str
    split: str
    columns: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Sources:
    """Where models, prompts and functions come from: what a stage's result depends on beside its settings.

    reward_models  the one that `--reward-model` names or the run has, then those of `--ensemble`
    functions      by the names that `--reward` gives them
    """

    policy: Path | str
    reward_models: tuple[Path | str, ...]
    functions: Mapping[str, rewards.RewardFunction]
    prompts: str

    @property
    def models(self) -> tuple[Path | str, ...]:
        return (self.policy, *self.reward_models)

    @property
    def files(self) -> list[Path]:
        return [*data.local_files(self.prompts), *rewards.source_files(self.functions)]


@dataclass(frozen=True)
class Environment:
    """The prompts, with what encodes them.

    shapes   of all models, the policy's first
    texts    the prompts as they were read, one for each of `prompts`
    prompts  their ids, cut where the shortest context would leave no room for an answer
    """

    encoding: tiktoken.Encoding
    shapes: Mapping[Path | str, GPTConfig]
    texts: list[str]
    prompts: list[list[int]]


def find(config: Asks) -> Sources:
    """The sources that the settings name; raises UserError where there is no such thing."""
    policy = model_or_earlier(config.policy, "--policy", config.run / "sft" / "model")
    functions = {spec: rewards.load(spec) for spec in config.reward}
    return Sources(policy, reward_model_folders(config), functions, config.prompts)


def reward_model_folders(config: Asks) -> tuple[Path | str, ...]:
    """The reward models to score with, the run's own first; none where functions alone give the score."""
    others = tuple(map(model_folder, config.ensemble))
    if config.reward and config.reward_model is None:
        return others
    return (model_or_earlier(config.reward_model, "--reward-model", config.run / "reward" / "model"), *others)


def read(config: Asks, sources: Sources) -> Environment:
    """Encoding and prompts; raises UserError where models do not fit each other, or prompts not them."""
    texts = [r["prompt"] for r in data.load(config.prompts, "prompts", split=config.split, columns=config.columns)]
    shapes = {source: read_config(source) for source in sources.models}
    encoding = tokenizer.load(sources.policy)
    for source, shape in shapes.items():
        tokenizer.check_fits(encoding, shape.vocab_size, source)
    room = min(shape.n_positions for shape in shapes.values()) - config.max_new_tokens
    require(room > 0, f"--max-new-tokens {config.max_new_tokens}: the model's context leaves no room for a prompt")
    return Environment(encoding, shapes, texts, data.encode_prompts(encoding, texts, max_length=room))


def load_reward_models(sources: Sources, device: torch.device) -> list[RewardModel]:
    """The reward models, frozen, in the order of `sources.reward_models`."""
    folders = sources.reward_models
    return [RewardModel.from_pretrained(folder).to(device).eval().requires_grad_(False) for folder in folders]


def reward_function(model: RewardModel | RewardEnsemble) -> Reward:
    """The reward model as a function of a batch: it scores the sampled ids as they are."""
    return lambda batch: model(batch.tokens, batch.lengths)


def reward_of(
    config: Asks,
    members: Sequence[RewardModel],
    functions: Mapping[str, rewards.RewardFunction],
    encoding: tiktoken.Encoding,
) -> Reward:
    """What an answer is worth: the score of the reward models, where there are any, and of all functions, added up."""
    parts = [rewards.FunctionReward(spec, function, encoding) for spec, function in functions.items()]
    if members:
        ensemble = RewardEnsemble(members, aggregate=config.aggregate, penalty=config.variance_penalty)
        parts.insert(0, reward_function(ensemble if config.ensemble else members[0]))
    return rewards.total(parts)

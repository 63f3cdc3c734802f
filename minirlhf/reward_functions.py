"""The worth of a response: any function of texts, reward models, or their sum; and where prompts and rewards come from.

    python train_ppo.py --reward minirlhf.reward_functions:arithmetic --prompts problems.jsonl --advantages rloo ...

`--reward package.module:function` names a function of texts; naming it runs its module. Several are added up, and added
to the score of a reward model where one is named as well. A function sees a part of a rollout at a time, in any order:
the score of a response may depend on nothing but its prompt and itself.

PPO, online DPO and rejection sampling sample responses, and say with the same flags to what and for what. In the words
of reinforcement learning this is the environment: a prompt is the state, a whole response the action, and the episode
ends with its reward. `find_sources` and `read_environment` take names, configurations and prompts, and no weights: a
mistake ends the run before work is lost, and `--dry-run` needs no more.

The worked example is a final answer that can be checked, `minirlhf.reward_functions:arithmetic` or a file of worked
solutions: see evaluate/final_answers.py.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from minirlhf import data, tokenizer
from minirlhf.batch import Batch, Example
from minirlhf.config import SamplingConfig
from minirlhf.encode import encode_demonstrations, encode_prompts
from minirlhf.hf.hub import model_folder, model_or_earlier
from minirlhf.model import GPTConfig, read_config
from minirlhf.reward import RewardEnsemble, RewardModel
from minirlhf.runtime import UserError, require

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
Reward = Callable[[Batch], Tensor]  # (B,) scores

FORM = "must be package.module:function, e.g. minirlhf.reward_functions:arithmetic"


# ------------------------------------------------------------------------------------------------- functions by name
def load(spec: str, *, flag: str = "--reward") -> Callable[..., Any]:
    """The function that `package.module:function` names; raises UserError, which names the flag, where there is none.

    A module of the folder that the command is run in is found too, after those that are installed.
    """
    module_name, _, name = spec.partition(":")
    require(re.fullmatch(r"\w+(\.\w+)*:\w+", spec) is not None, f"{flag} {spec}: {FORM}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{flag} {spec}: cannot import {module_name}: {error}") from error
    require(hasattr(module, name), f"{flag} {spec}: nothing called {name} in {module.__file__}")
    function = getattr(module, name)
    require(callable(function), f"{flag} {spec}: {name} is a {type(function).__name__}, and cannot be called")
    return function


def function_reward(spec: str, function: RewardFunction, encoding: tiktoken.Encoding) -> Reward:
    """A function of texts as a function of a batch: it sees prompts and responses without EOS."""

    def reward(batch: Batch) -> Tensor:
        scores = scores_of(function, *texts(encoding, batch), where=f"--reward {spec}")
        return torch.tensor(scores, dtype=torch.float32, device=batch.tokens.device)

    return reward


def scores_of(function: RewardFunction, prompts: list[str], responses: list[str], *, where: str) -> list[float]:
    """The function's scores, checked: one finite number per response, else a UserError that begins with `where`."""
    given = function(prompts, responses)
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: must return one number per response, not {given!r:.60}") from error
    require(len(scores) == len(responses), f"{where}: gave {len(scores)} scores for {len(responses)} responses")
    for score, response in zip(scores, responses, strict=True):
        require(math.isfinite(score), f"{where}: gave {score} to {response!r:.60}; a score must be a finite number")
    return scores


def texts(encoding: tiktoken.Encoding, batch: Batch) -> tuple[list[str], list[str]]:
    """Prompts and responses of a batch as texts, without EOS."""
    starts = zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), strict=True)
    prompts = [tokenizer.response_text(encoding, row[:length]) for row, length in starts]
    return prompts, [tokenizer.response_text(encoding, ids) for ids in batch.response_ids()]


# ------------------------------------------------------------------------------------------------------- environment
@dataclass(frozen=True)
class Sources:
    """Sources of models, prompts and functions: a stage's result depends on them beside its settings.

    reward_models  the one that `--reward-model` names or the run has, then those of `--ensemble`
    functions      by the names that `--reward` gives them
    files          with the prompts, and the modules of the functions
    """

    policy: Path
    reward_models: tuple[Path, ...]
    functions: Mapping[str, RewardFunction]
    files: tuple[Path, ...]

    @property
    def models(self) -> tuple[Path, ...]:
        return (self.policy, *self.reward_models)


@dataclass(frozen=True)
class Environment:
    """The prompts, with what encodes them.

    shapes   of all models, the policy's first
    texts    the prompts as they were read, one for each of `prompts`
    prompts  their ids, cut where the shortest context would leave no room for an answer
    """

    encoding: tiktoken.Encoding
    shapes: Mapping[Path, GPTConfig]
    texts: list[str]
    prompts: list[list[int]]


def find_sources(config: SamplingConfig) -> Sources:
    """The sources that the settings name; raises UserError where there is no such thing."""
    policy = model_or_earlier(config.policy, "--policy", config.run / "sft" / "model")
    functions = {spec: load(spec) for spec in config.reward}
    by_functions = config.reward and config.reward_model is None  # the run's own reward model is not asked
    trained = (config.reward_model, "--reward-model", config.run / "reward" / "model")
    first = () if by_functions else (model_or_earlier(*trained),)
    modules = (sys.modules[spec.partition(":")[0]].__file__ for spec in functions)
    files = data.local_files(config.prompts, *modules)
    return Sources(policy, (*first, *map(model_folder, config.ensemble)), functions, files)


def read_environment(config: SamplingConfig, sources: Sources) -> Environment:
    """Encoding and prompts; raises UserError where models do not fit each other, or prompts not them."""
    texts = [r["prompt"] for r in data.load(config.prompts, "prompts", split=config.split, columns=config.columns)]
    shapes = {source: read_config(source) for source in sources.models}
    encoding = tokenizer.load(sources.policy)
    for source, shape in shapes.items():
        tokenizer.check_fits(encoding, shape.vocab_size, source)
        same = not tokenizer.in_folder(source) or tokenizer.same_ids(tokenizer.load(source), encoding)
        require(same, f"{source}: has other token ids than {sources.policy}; give models with one tokenizer")
    room = min(shape.n_positions for shape in shapes.values()) - config.max_new_tokens
    require(room > 0, f"--max-new-tokens {config.max_new_tokens}: the model's context leaves no room for a prompt")
    return Environment(encoding, shapes, texts, encode_prompts(encoding, texts, max_length=room))


def pretraining_texts(source: str | None, encoding: tiktoken.Encoding, *, max_length: int) -> list[Example]:
    """The texts of PPO-ptx in a file or of a hub name; raises UserError where nothing fits `max_length` tokens."""
    if source is None:
        return []
    texts = encode_demonstrations(encoding, data.load(source, "demonstrations"), max_length=max_length)
    require(len(texts) > 0, f"--ptx-data {source}: nothing in it fits {max_length} tokens")
    return texts


def load_reward_models(sources: Sources, device: torch.device) -> list[RewardModel]:
    """The reward models, frozen, in the order of `sources.reward_models`."""
    folders = sources.reward_models
    return [RewardModel.from_pretrained(folder).to(device).eval().requires_grad_(False) for folder in folders]


def reward_function(model: RewardModel | RewardEnsemble) -> Reward:
    """The reward model as a function of a batch: it scores the sampled ids as they are."""
    return lambda batch: model(batch.tokens, batch.lengths)


def reward_of(
    config: SamplingConfig,
    members: Sequence[RewardModel],
    functions: Mapping[str, RewardFunction],
    encoding: tiktoken.Encoding,
) -> Reward:
    """The reward: the score of the reward models, where there are any, and of all functions, added up."""
    parts = [function_reward(spec, function, encoding) for spec, function in functions.items()]
    if members:
        ensemble = RewardEnsemble(members, aggregate=config.aggregate, penalty=config.variance_penalty)
        parts.insert(0, reward_function(ensemble if config.ensemble else members[0]))
    return lambda batch: functools.reduce(torch.add, (part(batch) for part in parts))  # one alone is itself


def __getattr__(name: str) -> Any:
    """The worked example by this module's name too: `minirlhf.reward_functions:arithmetic`, `AnswerKey`."""
    if name in ("AnswerKey", "arithmetic", "final_answer", "work_out"):
        return getattr(importlib.import_module("minirlhf.evaluate.final_answers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

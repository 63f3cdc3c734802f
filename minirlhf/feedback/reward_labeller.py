"""Label candidates by a reward model: the answer with the higher score is better.

python -m minirlhf.feedback label --by reward-model --model runs/tiny/reward/model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken

from minirlhf import tokenizer
from minirlhf.batch import Example, pad
from minirlhf.config import Count
from minirlhf.encode import Record, encode_comparison
from minirlhf.feedback import machine
from minirlhf.feedback.machine import Opinion, label_by_machine
from minirlhf.feedback.tasks import Mode, Task
from minirlhf.hf.hub import model_folder
from minirlhf.reward import RewardModel
from minirlhf.rollout import over_micro_batches
from minirlhf.runtime import resolve_device

TASKS = 64  # scored at a time


@dataclass
class Config(machine.Config):
    labeller: str = "reward-model"
    """Name in the labels."""
    mode: Mode = "pairs"
    """`pairs` of answers, or `rankings` of all answers to a prompt."""
    model: str | None = None
    """Folder or hub name of the reward model, by default `<run>/reward/model`."""
    micro_batch_tokens: Count = 8192
    """Padded tokens a forward pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


PRESETS = {"reward-model": Config()}


def main(config: Config) -> Path:
    """Label the candidates; returns the file."""
    folder = model_folder(config.model or config.run / "reward" / "model")
    model = RewardModel.from_pretrained(folder).to(resolve_device(config.device)).eval().requires_grad_(False)
    encoding = tokenizer.load(folder)
    tokenizer.check_fits(encoding, model.gpt.config.vocab_size, folder)

    def ask(tasks: Sequence[Task]) -> Iterator[Opinion]:
        for start in range(0, len(tasks), TASKS):
            part = tasks[start : start + TASKS]
            yield from opinions(model, encoding, part, micro_batch_tokens=config.micro_batch_tokens)

    return label_by_machine(config, config.mode, ask)


def opinions(
    model: RewardModel, encoding: tiktoken.Encoding, tasks: Sequence[Task], *, micro_batch_tokens: int
) -> Iterator[Opinion]:
    """Ranks by score, equal scores tie; nothing about tasks with an answer that does not fit the model.

    Sampled ids are scored as they were sampled where the candidates have them.
    """
    rows = [_rows(encoding, task, model.gpt.config.n_positions) for task in tasks]
    every = [row for answers in rows for row in answers]
    if every:
        batch = pad(every).to(model.score.weight.device)
        scores = over_micro_batches(lambda part: model(part.tokens, part.lengths), batch, micro_batch_tokens).tolist()
    start = 0
    for answers in rows:
        mine = tuple(scores[start : start + len(answers)]) if answers else ()
        start += len(answers)
        levels = sorted(set(mine), reverse=True)
        yield Opinion(tuple(levels.index(score) for score in mine), scores=mine) if mine else Opinion(None)


def _rows(encoding: tiktoken.Encoding, task: Task, max_length: int) -> list[Example]:
    """The responses as the reward model reads them; none where one of them does not fit."""
    known = task.candidates.response_ids
    record: Record = {"prompt": task.candidates.prompt, "responses": task.candidates.responses}
    record |= {"ranks": range(len(task.shown))} | ({} if known is None else {"response_ids": known})
    comparison = encode_comparison(encoding, record, max_length=max_length)
    if comparison is None or len(comparison.examples) != len(task.shown):
        return []
    return comparison.examples

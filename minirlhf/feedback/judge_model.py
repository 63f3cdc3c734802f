"""Label pairs by a language model as judge (RLAIF): a GPT-2 folder that says which of two answers is better.

    python -m minirlhf.feedback pairs --form verdicts --held-out-share 0.1      # labels to worked comparisons
    python train_sft.py --run runs/tiny/judge --model runs/tiny/sft/model \\
        --train runs/tiny/labels/comparisons.jsonl --validation runs/tiny/labels/held-out.jsonl
    python -m minirlhf.feedback label --by judge-model

It reads prompt and answers as in `comparison_text` and goes on with " A" or " B". Whoever has a liking for a place
answers differently in the other order, so every pair is asked in both orders and the two are averaged; more than two
answers are ranked by their mean probability of beating another one:

    q(a, b) = P(" A") / (P(" A") + P(" B"))     with a shown as A and b as B
    P(a is better than b) = (q(a, b) + 1 - q(b, a)) / 2

Log-probabilities of the verdict: Bai et al. 2022, "Constitutional AI", section 4.1. Both orders averaged: Lee et al.
2023, "RLAIF", section 2.1. Left out: reasoning before the verdict, which needs a far larger model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tiktoken
import torch

from minirlhf import tokenizer
from minirlhf.batch import Example, pad
from minirlhf.config import Count, Smoothing
from minirlhf.data.formats import message_prompt
from minirlhf.encode import Record, encode_prompt, pairs_from_ranks
from minirlhf.feedback import machine
from minirlhf.feedback.machine import Opinion, label_by_machine, opinion_of
from minirlhf.feedback.tasks import Mode, Task
from minirlhf.hf.hub import model_folder
from minirlhf.model import GPT
from minirlhf.rollout import over_micro_batches
from minirlhf.runtime import require, resolve_device

T = TypeVar("T")
VERDICTS = (" A", " B")
TASKS = 64  # asked at a time


@dataclass
class Config(machine.Config):
    labeller: str = "judge-model"
    """Name in the labels."""
    mode: Mode = "pairs"
    """`pairs` of answers, or `rankings` of all answers to a prompt, from all their pairs."""
    model: str | None = None
    """Folder or hub name of the GPT-2 that judges, by default `<run>/judge/sft/model`."""
    instruction: str = ""
    """Text before every comparison: what a model is told that was not trained to judge."""
    tie_margin: Smoothing = 0.0
    """A tie where the probability that one is better is this close to 1/2."""
    micro_batch_tokens: Count = 8192
    """Padded tokens a forward pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


PRESETS = {"judge-model": Config()}


def main(config: Config) -> Path:
    """Label the candidates; returns the file."""
    folder = model_folder(config.model or config.run / "judge" / "sft" / "model")
    model = GPT.from_pretrained(folder).to(resolve_device(config.device)).eval().requires_grad_(False)
    encoding = tokenizer.load(folder)
    tokenizer.check_fits(encoding, model.config.vocab_size, folder)
    cut = 0

    def ask(tasks: Sequence[Task]) -> Iterator[Opinion]:
        nonlocal cut
        for start in range(0, len(tasks), TASKS):
            part = tasks[start : start + TASKS]
            texts = [[message_prompt(q) for q in questions(task, config.instruction)] for task in part]
            rows = [verdict_rows(model, encoding, text) for own in texts for text in own]
            cut += sum(first.cut > 0 for first, _ in rows)
            shares = iter(first_preferred(model, rows, micro_batch_tokens=config.micro_batch_tokens))
            for task, own in zip(part, texts, strict=True):
                orders = pairwise([next(shares) for _ in own])
                yield opinion_of(orders, task.shown, tie_margin=config.tie_margin)

    output = label_by_machine(config, config.mode, ask)
    if cut:
        print(f"{cut} comparisons lost their start to fit the judge's {model.config.n_positions} tokens")
    return output


def question(prompt: str, first: str, second: str, *, instruction: str = "") -> str:
    """What a judge is asked."""
    return f"{instruction}{prompt}\n\n[A]{first}\n\n[B]{second}\n\nBetter: ["


def comparison_text(prompt: str, first: str, second: str, *, instruction: str = "") -> str:
    """The question as a message in a dialogue; the verdict, one of VERDICTS, is the answer to it."""
    return message_prompt(question(prompt, first, second, instruction=instruction))


def questions(task: Task, instruction: str) -> list[str]:
    """What a judge is asked about a task: every pair of answers as they are shown, and with the two exchanged."""
    return [
        question(task.candidates.prompt, one, other, instruction=instruction)
        for first, second in itertools.combinations(task.answers, 2)
        for one, other in ((first, second), (second, first))
    ]


def pairwise(values: Sequence[T]) -> list[tuple[T, T]]:
    """Neighbours as pairs: values[0] with values[1], values[2] with values[3], and so on."""
    return list(zip(values[::2], values[1::2], strict=True))


def worked_comparisons(record: Record) -> list[Record]:
    """Demonstrations of verdicts for `train_sft.py`: every pair of a ranking in both orders; ties teach nothing."""
    texts = record["responses"]
    return [
        {"prompt": comparison_text(record["prompt"], texts[a], texts[b]), "response": verdict}
        for better, worse in pairs_from_ranks(record["ranks"])
        for a, b, verdict in ((better, worse, VERDICTS[0]), (worse, better, VERDICTS[1]))
    ]


def first_preferred(model: GPT, rows: Sequence[tuple[Example, Example]], *, micro_batch_tokens: int) -> list[float]:
    """q of each comparison, from its rows with the one and the other verdict: P(" A") among the two."""
    batch = pad([row for both in rows for row in both]).to(model.wte.weight.device)
    logprobs = over_micro_batches(
        lambda part: model.logprobs(part.tokens, part.mask).sum(dim=1), batch, micro_batch_tokens
    )
    return torch.softmax(logprobs.view(-1, 2).cpu().double(), dim=1)[:, 0].tolist()


def verdict_rows(model: GPT, encoding: tiktoken.Encoding, text: str) -> tuple[Example, Example]:
    """The text with each verdict. No EOS follows: how a model ends is not its verdict."""
    room = model.config.n_positions
    ids = [tokenizer.encode(encoding, verdict) for verdict in VERDICTS]
    require(max(map(len, ids)) < room, f"the judge's context of {room} tokens is too short for a verdict")
    # Both lose the same tokens where they do not fit: else they would answer different questions.
    prompt_ids = encode_prompt(encoding, text)
    kept = prompt_ids[-(room - max(map(len, ids))) :]
    first, second = (Example(kept, verdict, cut=len(prompt_ids) - len(kept)) for verdict in ids)
    return first, second

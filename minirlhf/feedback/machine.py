"""Label candidates by machine: the simulated people, a reward model, or a language model as judge.

    python -m minirlhf.feedback label --by simulated --noise 0.1
    python -m minirlhf.feedback label --by reward-model --model runs/tiny/reward/model
    python -m minirlhf.feedback label --by judge-model --model runs/tiny/judge/sft/model
    python -m minirlhf.feedback label --by endpoint --url http://127.0.0.1:8000/v1 --model NAME

All of them answer the questions that people with the same --seed are asked, and write the same file of labels, by
default `<run>/labels/<labeller>.jsonl`: `stats --labels labels.jsonl reward-model.jsonl` tells how they agree.
The models and how they are asked stand in `minirlhf/evaluate/judges.py`, which evaluation asks too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minirlhf.batch import Example, pad
from minirlhf.config import Count, Finite, Fraction, NotNegative, Smoothing
from minirlhf.encode import encode_comparison
from minirlhf.evaluate.judges import JudgeModel, ModelFolder, RewardScorer
from minirlhf.feedback.agreement import order_bias, order_sentence
from minirlhf.feedback.labels import Label, new_file
from minirlhf.feedback.tasks import Mode, Task, TaskConfig, make_tasks
from minirlhf.files import write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runtime import UserError, resolve_device
from minirlhf.world import TEMPERATURE, Labeller

TASKS = 64  # scored at a time


@dataclass
class MachineConfig(TaskConfig):
    output: Path | None = None
    """File of labels, by default `<run>/labels/<labeller>.jsonl`; an existing one is never overwritten."""
    labeller: str = "machine"
    """Name in the labels."""
    max_items: Count = 100_000
    """Label at most this many."""
    mode: Mode = "pairs"
    """`pairs` of answers, or `rankings` of all answers to a prompt, by a judge of two from K (K-1) questions."""


def tasks_and_file(config: MachineConfig) -> tuple[list[Task], Path]:
    """The questions that people are asked, without repeats, which would be the same; and the file for the labels."""
    tasks = make_tasks(config, config.labeller, mode=config.mode)[: config.max_items]
    return tasks, new_file(config.output or config.run / "labels" / f"{config.labeller}.jsonl")


def write_labels(output: Path, labels: Sequence[Label]) -> Path:
    """Write the labels of a machine and what they are worth; returns their file."""
    write_records(output, [label.record() for label in labels])
    skipped = sum(label.verdict == "skip" for label in labels)
    print(f"{output}: {len(labels)} labels" + (f", {skipped} of them skips: no verdict" if skipped else ""))
    for labeller, bias in order_bias(labels).items():
        print(order_sentence(labeller, bias))
    return output


# ------------------------------------------------------------------------------------------------- the simulated people
@dataclass
class Simulated(MachineConfig):
    labeller: str = "simulated"
    """Name in the labels."""
    temperature: NotNegative = TEMPERATURE
    """In units of the judge's score: 0 always prefers the better answer."""
    noise: Fraction = 0.0
    """Probability that a label is reversed."""
    length_bias: Finite = 0.0
    """What a word more adds to an answer's score in the labeller's eyes."""


def simulated(config: Simulated) -> Path:
    """Label candidates by the simulated people of the embedded world, with noise and length bias as you set them.

    python -m minirlhf.feedback label --by simulated --noise 0.1 --length-bias 0.02
    """
    people = Labeller(config.temperature, config.noise, config.length_bias, config.seed)
    tasks, output = tasks_and_file(config)
    try:
        ranks = [people.rank(t.candidates.prompt, t.candidates.responses, key=t.key[0]) for t in tasks]
    except ValueError as error:
        raise UserError(f"--by simulated: {error}") from error
    labels = [task.label(config.labeller, each) for task, each in zip(tasks, ranks, strict=True)]
    return write_labels(output, labels)


# -------------------------------------------------------------------------------------------------------- reward models
@dataclass
class ByReward(MachineConfig):
    labeller: str = "reward-model"
    """Name in the labels."""
    model: str | None = None
    """Folder or hub name of the reward model, by default `<run>/reward/model`."""
    micro_batch_tokens: Count = 8192
    """Padded tokens per forward pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


def reward_model(config: ByReward) -> Path:
    """Label candidates by a reward model: the answer with the higher score is better.

    python -m minirlhf.feedback label --by reward-model --model runs/tiny/reward/model
    """
    source = config.model or str(config.run / "reward" / "model")
    folder = ModelFolder.find(source, RewardModel, flag="--model")
    scorer = RewardScorer(folder, resolve_device(config.device), config.micro_batch_tokens)
    tasks, output = tasks_and_file(config)
    labels = []
    for start in range(0, len(tasks), TASKS):
        part = tasks[start : start + TASKS]
        rows = [_answers(folder, task) for task in part]
        every = [row for answers in rows for row in answers]
        scores = iter(scorer.scores(pad(every)).tolist() if every else [])
        for task, answers in zip(part, rows, strict=True):
            labels.append(by_scores(config.labeller, task, [next(scores) for _ in answers]))
    return write_labels(output, labels)


def _answers(folder: ModelFolder, task: Task) -> list[Example]:
    """The responses as the reward model reads them, sampled ids as they were sampled; none where one does not fit."""
    record = {**task.candidates.record(), "ranks": range(len(task.shown))}
    comparison = encode_comparison(folder.encoding, record, max_length=folder.positions)
    return comparison.examples if comparison and len(comparison.examples) == len(task.shown) else []


def by_scores(labeller: str, task: Task, scores: Sequence[float]) -> Label:
    """The label that ranks by score; equal scores tie, and no scores are a skip."""
    levels = sorted(set(scores), reverse=True)
    ranks = [levels.index(score) for score in scores]
    return replace(task.label(labeller, ranks or None), scores=tuple(scores) or None)


# ----------------------------------------------------------------------------------------------- judges of two answers
@dataclass
class PairsConfig(MachineConfig):
    tie_margin: Smoothing = 0.0
    """A tie where the probability that one is better is this close to 1/2."""


@dataclass
class ByJudge(PairsConfig):
    labeller: str = "judge-model"
    """Name in the labels."""
    model: str | None = None
    """Folder or hub name of the GPT-2 that judges, by default `<run>/judge/sft/model`."""
    instruction: str = ""
    """Text before every comparison: what a model is told that was not trained to judge."""
    micro_batch_tokens: Count = 8192
    """Padded tokens per forward pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


def judge_model(config: ByJudge) -> Path:
    """Label pairs by a language model as judge (RLAIF): a GPT-2 folder that says which of two answers is better.

        python -m minirlhf.feedback pairs --form verdicts --held-out-share 0.1      # labels to worked comparisons
        python train_sft.py --run runs/tiny/judge --model runs/tiny/sft/model \\
            --train runs/tiny/labels/comparisons.jsonl --validation runs/tiny/labels/held-out.jsonl
        python -m minirlhf.feedback label --by judge-model

    It reads prompt and answers as in `comparison_text` and goes on with " A" or " B". Whoever has a liking for a place
    answers differently in the other order, so every pair is asked in both orders and the two are averaged; more than
    two answers are ranked by their mean probability of beating another one:

        q(a, b) = P(" A") / (P(" A") + P(" B"))     with a shown as A and b as B
        P(a is better than b) = (q(a, b) + 1 - q(b, a)) / 2

    Log-probabilities of the verdict: Bai et al. 2022, "Constitutional AI", section 4.1. Both orders averaged: Lee et
    al. 2023, "RLAIF", section 2.1. Left out: reasoning before the verdict, which needs a far larger model.
    """
    source = config.model or str(config.run / "judge" / "sft" / "model")
    folder = ModelFolder.find(source, GPT, flag="--model")
    judge = JudgeModel(folder, config.instruction, resolve_device(config.device), config.micro_batch_tokens)
    tasks, output = tasks_and_file(config)
    return write_labels(output, list(by_pairs(config, tasks, judge.preferred(questions_of(tasks)))))


def questions_of(tasks: Sequence[Task]) -> list[tuple[str, str, str]]:
    """(prompt, the answer read first, the other) of every pair of a task's answers, as shown and then exchanged."""
    return [
        (task.candidates.prompt, one, other)
        for task in tasks
        for both in itertools.combinations(task.answers, 2)
        for one, other in (both, both[::-1])
    ]


def by_pairs(config: PairsConfig, tasks: Sequence[Task], shares: Iterable[float | None]) -> Iterator[Label]:
    """The labels of a judge.

    shares  for each of `questions_of`, the probability that the answer read first is better; None without a verdict
    """
    rest = iter(shares)
    for task in tasks:
        given = list(itertools.islice(rest, len(task.shown) * (len(task.shown) - 1)))
        spoken = [share for share in given if share is not None]
        orders = list(zip(spoken[::2], spoken[1::2], strict=False))
        yield by_orders(config, task, orders) if spoken == given else task.label(config.labeller, None)


def by_orders(config: PairsConfig, task: Task, orders: Sequence[tuple[float, float]]) -> Label:
    """The label of a judge that compared every pair of K responses in both orders.

    orders  for each pair (first, second) of places on display: q(first, second) and q(second, first) of `judge_model`
    The rank is by the sum of the probabilities of beating each of the others, Borda's count; a probability within
    `tie_margin` of 1/2 is taken for 1/2. Equal sums tie.
    """
    count = len(task.shown)
    beats = [0.0] * count
    for (i, j), (q, back) in zip(itertools.combinations(task.shown, 2), orders, strict=True):
        first_is_better = (q + 1 - back) / 2
        if abs(first_is_better - 0.5) <= config.tie_margin:
            first_is_better = 0.5
        beats[i] += first_is_better
        beats[j] += 1 - first_is_better
    scores = [round(points, 9) / (count - 1) for points in beats]  # sums may differ by rounding
    label = by_scores(config.labeller, task, scores)
    return replace(label, scores=None, orders=orders[0]) if count == 2 else label

"""Label candidates by machine: the simulated people, a reward model, or a language model as judge.

    python -m minirlhf.feedback label --by simulated --noise 0.1
    python -m minirlhf.feedback label --by reward-model --model runs/tiny/reward/model
    python -m minirlhf.feedback label --by judge-model --model runs/tiny/judge/sft/model
    python -m minirlhf.feedback label --by endpoint --url http://127.0.0.1:8000/v1 --model NAME

All of them answer the questions that people with the same --seed are asked, and write the same file of labels, by
default `<run>/labels/<labeller>.jsonl`: `stats --labels labels.jsonl reward-model.jsonl` tells how they agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minirlhf.config import Count, Seed, Settings
from minirlhf.feedback.agreement import order_bias
from minirlhf.feedback.candidates import read_candidates
from minirlhf.feedback.labels import Label
from minirlhf.feedback.tasks import Mode, Task, make_tasks
from minirlhf.files import write_records
from minirlhf.runtime import require


@dataclass
class Config(Settings):
    run: Path = Path("runs/tiny")
    """Folder of the run; reads and writes `<run>/labels`."""
    candidates: Path | None = None
    """What to label: candidates, or rankings; by default `<run>/labels/candidates.jsonl`."""
    output: Path | None = None
    """File of labels, by default `<run>/labels/<labeller>.jsonl`; an existing one is never overwritten."""
    labeller: str = "machine"
    """Name in the labels."""
    pairs_per_prompt: Count = 1
    """Pairs asked about each prompt, where pairs are asked about."""
    max_items: Count = 100_000
    """Label at most this many."""
    seed: Seed = 0
    """Seed of the choice and order of tasks and answers."""


@dataclass(frozen=True)
class Opinion:
    """What a machine says about one task: `ranks` in the order of the responses, or None where it says nothing.

    scores  of the responses;  orders  q in the order of display and in the reverse one (see `judge_model`)
    """

    ranks: tuple[int, ...] | None
    scores: tuple[float, ...] | None = None
    orders: tuple[float, float] | None = None


Ask = Callable[[Sequence[Task]], Iterable[Opinion]]


def label_by_machine(config: Config, mode: Mode, ask: Ask) -> Path:
    """Ask about all tasks and write the labels; returns their file."""
    require(bool(config.labeller.strip()), "--labeller: give a name")
    source = config.candidates or config.run / "labels" / "candidates.jsonl"
    output = config.output or config.run / "labels" / f"{config.labeller}.jsonl"
    require(source.is_file(), f"{source}: no such file; make it with `python -m minirlhf.feedback collect`")
    require(not output.exists(), f"{output}: exists already; give another --output, or move it away")
    tasks = make_tasks(
        read_candidates(source),
        mode=mode,
        pairs_per_prompt=config.pairs_per_prompt,
        repeat_share=0.0,  # it would say the same again
        labeller=config.labeller,
        seed=config.seed,
    )[: config.max_items]
    labels = [_label(task, opinion, config.labeller) for task, opinion in zip(tasks, ask(tasks), strict=True)]
    write_records(output, [label.record() for label in labels])
    skipped = sum(label.verdict == "skip" for label in labels)
    print(f"{output}: {len(labels)} labels" + (f", {skipped} of them skips: no verdict" if skipped else ""))
    for bias in order_bias(labels).values():
        print(bias)
    return output


def opinion_of(orders: Sequence[tuple[float, float]], shown: Sequence[int], *, tie_margin: float) -> Opinion:
    """The opinion of a judge that compared every pair of K responses in both orders.

    orders  for each pair (first, second) of places on display: q(first, second) and q(second, first) of `judge_model`
    The rank is by the sum of the probabilities of beating each of the others, Borda's count; a probability within
    `tie_margin` of 1/2 is taken for 1/2. Equal sums tie.
    """
    beats = [0.0] * len(shown)
    for (i, j), (q, back) in zip(itertools.combinations(range(len(shown)), 2), orders, strict=True):
        first_is_better = (q + 1 - back) / 2
        if abs(first_is_better - 0.5) <= tie_margin:
            first_is_better = 0.5
        beats[i] += first_is_better
        beats[j] += 1 - first_is_better
    points = [round(beats[shown.index(response)], 9) for response in range(len(shown))]  # sums may differ by rounding
    levels = sorted(set(points), reverse=True)
    ranks = tuple(levels.index(value) for value in points)
    if len(shown) == 2:
        return Opinion(ranks, orders=orders[0])
    return Opinion(ranks, scores=tuple(value / (len(shown) - 1) for value in points))


def _label(task: Task, opinion: Opinion, labeller: str) -> Label:
    count = len(task.shown)
    ranks = (0,) * count if opinion.ranks is None else opinion.ranks
    if opinion.ranks is None:
        verdict = "skip"
    elif len(set(ranks)) == 1:
        verdict = "tie"
    else:
        verdict = ("right", "left")[ranks[task.shown[0]] == 0] if count == 2 else "ranked"
    return Label(
        task.candidates.prompt,
        task.candidates.responses,
        ranks,
        verdict,
        labeller=labeller,
        shown=task.shown,
        scores=opinion.scores,
        orders=opinion.orders,
        sources=task.candidates.sources,
        response_ids=task.candidates.response_ids,
    )

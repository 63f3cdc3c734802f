"""Tasks: what a labeller is asked, in which order, and what is shown first. All of it follows from the seed.

Every n-th task asks an earlier item again with the responses in reverse order: agreement with one's own earlier label
then counts a habit of choosing the left one as the disagreement it is.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minirlhf.batch import permutation
from minirlhf.config import Count, Seed, Settings
from minirlhf.data.formats import ASSISTANT, HUMAN
from minirlhf.feedback.labels import Candidates, Label, read_candidates, verdict_of
from minirlhf.runtime import Stream, require

Mode = Literal["pairs", "rankings"]
APART = 5  # an item is asked again after at least so many others, where there are as many


@dataclass
class TaskConfig(Settings):
    """Settings of every command that asks about candidates."""

    run: Path = Path("runs/tiny")
    """Folder of the run; reads and writes `<run>/labels`."""
    candidates: Path | None = None
    """What to label: candidates, or the simulated labeller's rankings; by default `<run>/labels/candidates.jsonl`."""
    pairs_per_prompt: Count = 1
    """Pairs asked about each prompt, where pairs are. More prompts teach more than more pairs of one."""
    seed: Seed = 0
    """Seed of the choice and order of tasks and answers."""


@dataclass(frozen=True)
class Task:
    """Candidates to compare; shown[0] is the position of the response on the left, or first."""

    candidates: Candidates
    shown: tuple[int, ...]
    repeat: bool = False

    @functools.cached_property
    def key(self) -> tuple[str, bool]:
        """Tells tasks apart: the item, and whether it is asked again."""
        return self.candidates.item, self.repeat

    @property
    def question(self) -> str:
        """The message in a dialogue of one turn; any other prompt as it is, without white space around it."""
        prompt = self.candidates.prompt
        message = prompt.removeprefix(HUMAN).removesuffix(ASSISTANT)
        one_turn = prompt == f"{HUMAN}{message}{ASSISTANT}" and HUMAN not in message and ASSISTANT not in message
        return message.strip() if one_turn else prompt.strip()

    @property
    def answers(self) -> list[str]:
        """The responses in the order of display."""
        return [self.candidates.responses[i] for i in self.shown]

    def label(self, labeller: str, ranks: Sequence[int] | None, *, verdict: str = "") -> Label:
        """The label of this task: `ranks` of the responses, or None for a skip.

        verdict  of ranks that are all equal, where it is not a tie; of others it follows from the ranks
        """
        ranks, verdict = ((0,) * len(self.shown), "skip") if ranks is None else (tuple(ranks), verdict)
        return Label(
            **vars(self.candidates),
            ranks=ranks,
            verdict=verdict or verdict_of(ranks, self.shown),
            labeller=labeller,
            shown=self.shown,
            repeat=self.repeat,
        )


def make_tasks(config: TaskConfig, labeller: str, *, mode: Mode = "pairs", repeat_share: float = 0.0) -> list[Task]:
    """All tasks of a labeller, in order; raises UserError where there are no candidates.

    mode              "pairs": `pairs_per_prompt` pairs of each prompt's responses; "rankings": all of them at once
    repeat_share      repeats per first label: 0.1 asks one item again after every ten
    labeller          labellers see the same items in orders of their own
    """
    require(bool(labeller.strip()), "--labeller: give a name")
    source = config.candidates or config.run / "labels" / "candidates.jsonl"
    require(source.is_file(), f"{source}: no such file; make it with `python -m minirlhf.feedback collect`")
    items = read_candidates(source)
    if mode == "pairs":
        items = _pairs(items, config.pairs_per_prompt, config.seed)
    key = (config.seed, Stream.LABELLER, zlib.crc32(labeller.encode()))
    items = list({item.item: item for item in items}.values())
    order = permutation(len(items), *key, 0)
    fresh = [Task(items[i], tuple(permutation(len(items[i].responses), *key, 1, i))) for i in order]
    repeats = [int(number * repeat_share + 1e-9) for number in range(len(fresh) + 1)]  # 30 times a tenth is 3
    tasks: list[Task] = []
    for number, task in enumerate(fresh):
        tasks.append(task)
        if repeats[number + 1] > repeats[number]:
            repeated = {task.key[0] for task in tasks if task.repeat}
            earlier = fresh[: max(0, number + 1 - APART)] or fresh[:number]
            able = [task for task in earlier if task.key[0] not in repeated]
            again = [able[i] for i in permutation(len(able), *key, 2, number)[:1]]
            tasks += [Task(task.candidates, task.shown[::-1], repeat=True) for task in again]
    return tasks


def _pairs(candidates: Sequence[Candidates], count: int, seed: int) -> list[Candidates]:
    """`count` pairs of each prompt's responses, or all where there are fewer; the same for every labeller."""
    pairs = []
    for number, c in enumerate(candidates):
        every = list(itertools.combinations(range(len(c.responses)), 2))
        for n in permutation(len(every), seed, Stream.LABELLER, number)[:count]:
            columns = {
                name: tuple(values[i] for i in every[n]) for name, values in c.record().items() if name != "prompt"
            }
            pairs.append(Candidates(c.prompt, **columns))
    return pairs

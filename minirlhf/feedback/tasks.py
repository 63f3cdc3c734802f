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
from typing import Literal

from minirlhf.batch import permutation
from minirlhf.data.formats import ASSISTANT, HUMAN
from minirlhf.feedback.candidates import Candidates
from minirlhf.feedback.labels import item_id
from minirlhf.runtime import Stream

Mode = Literal["pairs", "rankings"]
APART = 5  # an item is asked again after at least so many others, where there are as many


@dataclass(frozen=True)
class Task:
    """Candidates to compare; shown[0] is the position of the response on the left, or first."""

    candidates: Candidates
    shown: tuple[int, ...]
    repeat: bool = False

    @functools.cached_property
    def key(self) -> tuple[str, bool]:
        """Tells tasks apart: the item, and whether it is asked again."""
        return item_id(self.candidates.prompt, self.candidates.responses), self.repeat

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


def make_tasks(
    candidates: Sequence[Candidates],
    *,
    mode: Mode,
    pairs_per_prompt: int,
    repeat_share: float,
    labeller: str,
    seed: int,
) -> list[Task]:
    """All tasks of a labeller, in order.

    mode              "pairs": `pairs_per_prompt` pairs of each prompt's responses; "rankings": all of them at once
    repeat_share      repeats per first label: 0.1 asks one item again after every ten
    labeller          labellers see the same items in orders of their own
    """
    key = (seed, Stream.LABELLER, zlib.crc32(labeller.encode()))
    items = list(candidates) if mode == "rankings" else _pairs(candidates, pairs_per_prompt, seed)
    unique = {item_id(item.prompt, item.responses): item for item in items}
    items = list(unique.values())
    order = permutation(len(items), *key, 0)

    def due(fresh_tasks: int) -> int:
        return int(fresh_tasks * repeat_share + 1e-9)  # 30 times a tenth is 3, whatever the last digit says

    tasks: list[Task] = []
    fresh: list[Task] = []
    for number, i in enumerate(order):
        shown = tuple(permutation(len(items[i].responses), *key, 1, i))
        fresh.append(Task(items[i], shown))
        tasks.append(fresh[-1])
        if due(number + 1) > due(number):
            again = _to_repeat(fresh, tasks, (*key, 2, number))
            tasks += [Task(task.candidates, task.shown[::-1], repeat=True) for task in again]
    return tasks


def _pairs(candidates: Sequence[Candidates], count: int, seed: int) -> list[Candidates]:
    """`count` pairs of each prompt's responses, or all where there are fewer; the same for every labeller."""
    pairs = []
    for number, c in enumerate(candidates):
        every = list(itertools.combinations(range(len(c.responses)), 2))
        for n in permutation(len(every), seed, Stream.LABELLER, number)[:count]:
            i, j = every[n]
            ids = None if c.response_ids is None else (c.response_ids[i], c.response_ids[j])
            sources = None if c.sources is None else (c.sources[i], c.sources[j])
            pairs.append(Candidates(c.prompt, (c.responses[i], c.responses[j]), ids, sources))
    return pairs


def _to_repeat(fresh: list[Task], tasks: list[Task], key: tuple[int, ...]) -> list[Task]:
    """One task that was not asked again yet, and not among the last few; none where all were."""
    asked_again = {task.key[0] for task in tasks if task.repeat}
    recent = fresh[-APART:] if len(fresh) > APART else fresh[-1:]
    able = [task for task in fresh if task.key[0] not in asked_again and task not in recent]
    return [able[i] for i in permutation(len(able), *key)[:1]]

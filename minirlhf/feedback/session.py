"""A labelling session: which task is next, what a key does, and what is saved. Terminal and web page both drive it.

Keys for two responses: 1 or left arrow, 2 or right arrow, t tie, b both bad, s skip, u undo. For more: their numbers
from best to worst, = before a number to tie it with the one before, Enter to leave the rest equal and last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minirlhf.feedback.label_file import LabelFile
from minirlhf.feedback.tasks import Task
from minirlhf.runtime import require

MOST = 9  # responses that have a digit of their own
VERDICT_KEYS = {"t": "tie", "b": "bad", "s": "skip"}
SIDES = {"1": 0, "2": 1, "left": 0, "right": 1}


class Session:
    """One labeller at work.

    tasks     all tasks; those that this labeller has labelled in `file` are done
    message   what the last key did, in words
    note      goes into the label of the current task
    version   tells every state from every other
    """

    def __init__(
        self, tasks: Sequence[Task], file: LabelFile, *, labeller: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        longest = max((len(task.shown) for task in tasks), default=0)
        require(longest <= MOST, f"{longest} responses to a prompt: at most {MOST} can be ranked by hand")
        self.tasks, self.file, self.labeller, self.clock = list(tasks), file, labeller, clock
        self.message, self.version = "", 0
        self._began, self._saved = clock(), 0
        mine = [label for label in file.labels if label.labeller == labeller]
        self._done = {(label.item, label.repeat) for label in mine}
        self._done |= {(label.item, True) for label in mine if label.verdict == "skip"}  # what is skipped has no repeat
        self._start()

    # -------------------------------------------------------------------------------------------------------- the task
    def _start(self, task: Task | None = None) -> None:
        """Show a task, by default the first that is not done."""
        self.current = task or next((task for task in self.tasks if task.key not in self._done), None)
        self.picked: list[list[int]] = []  # levels of displayed positions, best first
        self._tie_next = False
        self.note = ""
        self._shown_at = self.clock()

    @property
    def progress(self) -> dict[str, Any]:
        """Tasks done, all tasks, labels a minute since this session began, minutes left at that rate."""
        open_tasks = sum(task.key not in self._done for task in self.tasks)
        minutes = (self.clock() - self._began) / 60
        rate = self._saved / minutes if self._saved > 0 and minutes > 0 else 0.0
        left = open_tasks / rate if rate else None
        return {"done": len(self.tasks) - open_tasks, "total": len(self.tasks), "rate": rate, "minutes_left": left}

    # ------------------------------------------------------------------------------------------------------------ keys
    def press(self, key: str) -> None:
        """Act on one key; `message` says what it did. A label is on the disk when this returns."""
        self.version += 1
        self.message = f"the key {key!r} does nothing here"  # unless it does
        task = self.current
        if key == "u":
            self._undo()
        elif task is None:
            self.message = "all done; u undoes the last label"
        elif key in VERDICT_KEYS:
            self._save(task, [list(range(len(task.shown)))], VERDICT_KEYS[key])
        elif len(task.shown) == 2 and key in SIDES:
            self._save(task, [[SIDES[key]], [1 - SIDES[key]]])
        elif len(task.shown) > 2 and (key.isdecimal() or (key in ("=", "enter") and self.picked)):
            self._pick(task, key)

    def _pick(self, task: Task, key: str) -> None:
        """The next in a ranking."""
        taken = [i for level in self.picked for i in level]
        left = [i for i in range(len(task.shown)) if i not in taken]
        if key == "=":
            self._tie_next = True
            self.message = "the next one ties with the one before"
        elif key == "enter":
            self._save(task, [*self.picked, left])
        elif int(key) - 1 in left:
            if not self._tie_next:
                self.picked.append([])
            self.picked[-1].append(int(key) - 1)
            self._tie_next = False
            places = " > ".join(" = ".join(str(i + 1) for i in level) for level in self.picked)
            self.message = f"best first: {places}"
            if len(left) == 1:
                self._save(task, self.picked)
        elif int(key) - 1 in taken:
            self.message = f"{key} has its place already; u takes the last one back"

    def _save(self, task: Task, levels: list[list[int]], verdict: str = "") -> None:
        """Label the task by levels of displayed positions, best first."""
        rank = {task.shown[position]: number for number, level in enumerate(levels) for position in level}
        ranks = [rank[i] for i in range(len(task.shown))]
        seconds = round(self.clock() - self._shown_at, 1)
        label = replace(task.label(self.labeller, ranks, verdict=verdict), note=self.note, seconds=seconds)
        self.file.append(label)
        self._saved += 1
        self._done.add(task.key)
        if label.verdict == "skip":
            self._done.add((label.item, True))
        self.message = f"saved: {'both bad' if verdict == 'bad' and len(ranks) == 2 else label.verdict}"
        self._start()

    def _undo(self) -> None:
        """Take back the last pick of a ranking, else the last label, and show its task again."""
        if self.picked:
            self.picked[-1].pop()
            self.picked = [level for level in self.picked if level]
            self._tie_next = False
            self.message = "took the last one back"
            return
        last = self.file.labels[-1] if self.file.labels else None
        task = next((task for task in self.tasks if last and task.key == (last.item, last.repeat)), None)
        if last is None or last.labeller != self.labeller or task is None:
            self.message = "nothing to undo"
            return
        self.file.pop()
        self._saved -= 1
        self._done.discard(task.key)
        if last.verdict == "skip":
            self._done.discard((last.item, True))
        self._start(task)
        self.note = last.note
        self.message = f"undone: {last.verdict}"

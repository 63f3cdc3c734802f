"""A label: what one person said about the responses to one prompt; and the file that keeps labels, one a line.

A line is a ranking record as training reads it (`prompt`, `responses`, `ranks`: 0 is best, equal ranks are ties) with

    labeller        who
    verdict         left, right (of two), ranked, tie, bad (both or all of them), skip (says nothing)
    shown           positions of the responses in the order of display: shown[0] was on the left, or first
    repeat          asked a second time, to measure how often labellers agree with themselves
    item            names prompt and responses, in whatever order they come
    scores          by which a reward model ranked, in the order of the responses
    orders          a judge's probability that the one it read first is better, as displayed and in reverse order
    note, seconds, sources, response_ids        where there are any

so `train_reward.py --comparisons labels.jsonl` works as it is; a tie, bad or skip has equal ranks and trains nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.data.formats import BadRow, describe, text_of
from minirlhf.feedback import lines

VERDICTS = ("left", "right", "ranked", "tie", "bad", "skip")


@dataclass(frozen=True)
class Label:
    """One line of a file of labels; the fields are explained at the head of this module."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    verdict: str
    labeller: str
    shown: tuple[int, ...] | None = None
    repeat: bool = False
    note: str = ""
    seconds: float | None = None
    sources: tuple[str, ...] | None = None
    response_ids: tuple[list[int], ...] | None = None
    scores: tuple[float, ...] | None = None
    orders: tuple[float, float] | None = None

    @property
    def item(self) -> str:
        """Names what was compared."""
        return item_id(self.prompt, self.responses)

    def record(self) -> dict[str, Any]:
        """The label as a line of its file; what is not known is left out."""
        known = {name: value for name, value in vars(self).items() if value is not None and value != ""}
        return {"item": self.item, **known}


def item_id(prompt: str, responses: Sequence[str]) -> str:
    """Twelve hexadecimal digits that name a prompt with some responses, whatever their order."""
    text = json.dumps([prompt, *sorted(responses)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_labels(path: Path) -> list[Label]:
    """The labels of a file; raises UserError with file:line and reason for the first that is not one.

    Rankings and pairs of other origin are labels too (the simulated labeller's, or `prompt`, `chosen`, `rejected`):
    what they do not tell stays unknown. The verdict follows from the ranks, the labeller is "unknown" where unnamed.
    """
    return lines.read_lines(path, parse_label)


def parse_label(row: lines.Row) -> Label:
    """One label; raises BadRow where it contradicts itself or is not one."""
    if "chosen" in row and "responses" not in row:
        row = {**row, "responses": [row["chosen"], text_of(row, "rejected")], "ranks": [0, 1]}
    prompt, responses = text_of(row, "prompt"), lines.responses_of(row)
    count = len(responses)
    ranks = lines.whole_numbers(row, "ranks", count=count)
    if sorted(set(ranks)) != list(range(len(set(ranks)))):
        raise BadRow(f"'ranks' {list(ranks)} leave a rank out; count 0 for the best, then 1, and so on")
    verdict = text_of(row, "verdict") if "verdict" in row else ("tie" if len(set(ranks)) == 1 else "ranked")
    shown = lines.whole_numbers(row, "shown", count=count) if "shown" in row else None
    if shown is not None and sorted(shown) != list(range(count)):
        raise BadRow(f"'shown' {list(shown)} must name each of the {count} positions once, from 0")
    _check_verdict(verdict, ranks, shown)
    label = Label(
        prompt,
        responses,
        ranks,
        verdict,
        labeller=_not_blank(row, "labeller", "unknown"),
        shown=shown,
        repeat=_flag(row, "repeat"),
        note=text_of(row, "note") if "note" in row else "",
        seconds=lines.number_of(row, "seconds"),
        sources=lines.texts_of(row, "sources", count=count) if "sources" in row else None,
        response_ids=lines.response_ids_of(row, count),
        scores=lines.numbers_of(row, "scores", count=count) if "scores" in row else None,
        orders=lines.two_shares_of(row, "orders") if "orders" in row else None,
    )
    if row.get("item", label.item) != label.item:
        raise BadRow(f"'item' is {row['item']!r}, but this prompt and these responses are {label.item!r}")
    return label


def ranks_of(verdict: str, shown: Sequence[int]) -> tuple[int, ...]:
    """The ranks that a verdict on two responses means, and of a verdict that prefers none of any number."""
    if verdict in ("left", "right"):
        best = shown[0] if verdict == "left" else shown[1]
        return tuple(int(i != best) for i in range(2))
    return (0,) * len(shown)


def _check_verdict(verdict: str, ranks: tuple[int, ...], shown: tuple[int, ...] | None) -> None:
    if verdict not in VERDICTS:
        raise BadRow(f"the verdict is {verdict!r}; it must be one of {', '.join(VERDICTS)}")
    if verdict in ("left", "right") and (len(ranks) != 2 or shown is None):
        raise BadRow(f"the verdict {verdict!r} needs two responses and 'shown', the order they were shown in")
    if verdict == "ranked":
        agrees = len(set(ranks)) > 1
    else:
        agrees = ranks == ranks_of(verdict, shown or range(len(ranks)))
    if not agrees:
        raise BadRow(f"the verdict {verdict!r} and the ranks {list(ranks)} contradict each other")


def _not_blank(row: lines.Row, name: str, default: str) -> str:
    text = text_of(row, name) if name in row else default
    if not text.strip():
        raise BadRow(f"the field {name!r} is blank")
    return text


def _flag(row: lines.Row, name: str) -> bool:
    value = row.get(name, False)
    if not isinstance(value, bool):
        raise BadRow(f"the field {name!r} is {describe(value)}, not true or false")
    return value

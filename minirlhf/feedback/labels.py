"""Candidates and labels: the two records of feedback, one a line of their files, and their one parser.

Candidates are the answers to one prompt that can be compared: `prompt`, `responses` (at least two, no two alike), and
where there are any `response_ids` (the tokens as they were sampled) and `sources`. A label adds what one person or
machine says about them. It is a ranking record as training reads it (`ranks`: 0 is best, equal ranks are ties) with

    labeller        who
    verdict         left, right (of two), ranked, tie, bad (both or all of them), skip (says nothing)
    shown           positions of the responses in the order of display: shown[0] was on the left, or first
    repeat          asked a second time, to measure how often labellers agree with themselves
    item            names prompt and responses, in whatever order they come
    scores          by which a reward model ranked, in the order of the responses
    orders          a judge's probability that the one it read first is better, as displayed and in reverse order
    note, seconds   where there are any

so `train_reward.py --comparisons labels.jsonl` works as it is; a tie, bad or skip has equal ranks and trains nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar

from minirlhf.data.formats import BadRow, answers_of, describe, is_number, list_of, text_of, texts_of, value_of
from minirlhf.data.readers import read_source
from minirlhf.runtime import UserError, require

R = TypeVar("R")
Row = dict[str, Any]
SIDES = ("left", "right")
VERDICTS = (*SIDES, "ranked", "tie", "bad", "skip")


@dataclass(frozen=True)
class Candidates:
    """Responses to one prompt that can be compared; ids and sources where they are known."""

    prompt: str
    responses: tuple[str, ...]
    _: KW_ONLY
    response_ids: tuple[list[int], ...] | None = None
    sources: tuple[str, ...] | None = None

    @property
    def item(self) -> str:
        """Twelve hexadecimal digits that name the prompt with these responses, whatever their order."""
        text = json.dumps([self.prompt, *sorted(self.responses)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def record(self) -> dict[str, Any]:
        """The fields that are known."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Label(Candidates):
    """One line of a file of labels; the fields are explained at the head of this module."""

    ranks: tuple[int, ...]
    verdict: str
    labeller: str
    shown: tuple[int, ...] | None = None
    repeat: bool = False
    note: str = ""
    seconds: float | None = None
    scores: tuple[float, ...] | None = None
    orders: tuple[float, float] | None = None

    def record(self) -> dict[str, Any]:
        """The label as a line of its file; what is not known is left out."""
        return {"item": self.item, **{name: value for name, value in super().record().items() if value != ""}}


def ranks_of(verdict: str, shown: Sequence[int]) -> tuple[int, ...]:
    """The ranks that a verdict on two responses means, and of a verdict that prefers none of any number."""
    if verdict in SIDES:
        best = shown[verdict == "right"]
        return tuple(int(i != best) for i in range(2))
    return (0,) * len(shown)


def verdict_of(ranks: Sequence[int], shown: Sequence[int]) -> str:
    """The verdict that ranks mean, where they prefer any: a side of two, else ranked; a tie where all are equal."""
    if len(set(ranks)) == 1:
        return "tie"
    return "ranked" if len(ranks) > 2 else SIDES[ranks[shown[0]]]


# -------------------------------------------------------------------------------------------------------------- reading
def new_file(path: Path) -> Path:
    """The path of a file to be written; raises UserError where one stands there, since labels are dear."""
    require(not path.exists(), f"{path}: exists already; give another --output, or move it away")
    return path


def read_lines(path: Path, parse: Callable[[Row], list[R]]) -> tuple[list[R], Counter[str]]:
    """All that `parse` makes of the objects in a JSON Lines file or JSON array, and why it left some out (LeftOut).

    Raises UserError with file, line and reason of the first object that is not JSON or that `parse` refuses (BadRow).
    """
    content = read_source(Path(path), "", ())
    values = content.parse(parse)
    if content.bad:
        raise UserError(f"{content.bad[0]} (bad lines: {len(content.bad)}; nothing was read)")
    require(len(content.rows) > 0, f"{path}: holds no records")
    return values, content.left_out


def read_candidates(path: Path) -> list[Candidates]:
    """The candidates in a file that `collect` or the simulated labeller wrote; raises UserError with file:line."""
    return read_lines(path, lambda row: [parse_candidates(row)])[0]


def read_labels(path: Path) -> list[Label]:
    """The labels of a file; raises UserError with file:line and reason for the first that is not one.

    Rankings and pairs of other origin are labels too (the simulated labeller's, or `prompt`, `chosen`, `rejected`):
    what they do not tell stays unknown. The verdict follows from the ranks, the labeller is "unknown" where unnamed.
    """
    return read_lines(path, lambda row: [parse_label(row)])[0]


def parse_candidates(row: Row) -> Candidates:
    """The candidates of one record, a label's too; raises BadRow where they cannot be compared."""
    prompt, responses, ids = answers_of(row)
    require(len(set(responses)) == len(responses), "two responses are the same text", BadRow)
    sources = texts_of(row, "sources", len(responses)) if "sources" in row else None
    return Candidates(prompt, responses, response_ids=ids, sources=sources)


def parse_label(row: Row) -> Label:
    """One label; raises BadRow where it contradicts itself or is not one."""
    if "chosen" in row and "responses" not in row:
        row = {**row, "responses": [row["chosen"], text_of(row, "rejected")], "ranks": [0, 1]}
    compared = parse_candidates(row)
    count = len(compared.responses)
    sizes = {"shown": count, "scores": count, "orders": 2}
    lists: dict[str, Any] = {name: tuple(list_of(row, name, size)) for name, size in sizes.items() if name in row}
    ranks, shown = tuple(list_of(row, "ranks", count)), lists.get("shown")
    if sorted(set(ranks)) != list(range(len(set(ranks)))):
        raise BadRow(f"'ranks' {list(ranks)} leave a rank out; count 0 for the best, then 1, and so on")
    if shown is not None and sorted(shown) != list(range(count)):
        raise BadRow(f"'shown' {list(shown)} must name each of the {count} positions once, from 0")
    row = {"verdict": "tie" if len(set(ranks)) == 1 else "ranked", "labeller": "unknown", "note": "", **row}
    texts: dict[str, Any] = {name: text_of(row, name) for name in ("verdict", "labeller", "note")}
    repeat = value_of({"repeat": False, **row}, "repeat", bool, "true or false")
    label = Label(**vars(compared), ranks=ranks, **texts, repeat=repeat, seconds=row.get("seconds"), **lists)
    _check_verdict(label.verdict, ranks, shown)
    require(bool(label.labeller.strip()), "the field 'labeller' is blank", BadRow)
    if label.seconds is not None and not (is_number(label.seconds) and label.seconds >= 0):
        raise BadRow(f"the field 'seconds' is {describe(label.seconds)}, not a number of 0 or more")
    if row.get("item", label.item) != label.item:
        raise BadRow(f"'item' is {row['item']!r}, but this prompt and these responses are {label.item!r}")
    return label


def _check_verdict(verdict: str, ranks: tuple[int, ...], shown: tuple[int, ...] | None) -> None:
    require(verdict in VERDICTS, f"the verdict is {verdict!r}; it must be one of {', '.join(VERDICTS)}", BadRow)
    if verdict in SIDES and (len(ranks) != 2 or shown is None):
        raise BadRow(f"the verdict {verdict!r} needs two responses and 'shown', the order they were shown in")
    meant = {"tie", "bad", "skip"} if len(set(ranks)) == 1 else {"ranked", verdict_of(ranks, shown or (0, 1))}
    words = f"the verdict {verdict!r} and the ranks {list(ranks)} contradict each other"
    require(verdict in meant, words, BadRow)

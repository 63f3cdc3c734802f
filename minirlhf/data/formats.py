"""From rows to records: what the fields of a file mean, found from the fields themselves and never from a name.

Every reader gives the project's records: `{"prompt", "response"}`, `{"prompt", "chosen", "rejected"}`, `{"prompt",
"responses", "ranks"}` or `{"prompt"}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from minirlhf.data.fields import (
    ANSWERS,
    ASSISTANT,
    HUMAN,
    PROMPTS,
    BadRow,
    Layout,
    LeftOut,
    answer_of,
    as_answer,
    as_text,
    describe,
    find,
    message_prompt,
    not_blank,
    prompt_of,
    split_dialogue,
    split_shared_start,
    split_turns,
    text_of,
    turns_of,
)

Record = dict[str, Any]
Kind = Literal["pairs", "demonstrations", "prompts"]
RATINGS = "rating|label|score|stars|sentiment"


def _read_ranking(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    texts, ranks, ids = row["responses"], row["ranks"], row.get("response_ids")
    text_of(row, "prompt")
    if not (isinstance(texts, list) and isinstance(ranks, list) and len(texts) == len(ranks) >= 2):
        raise BadRow("'responses' and 'ranks' must be lists of the same length, at least 2")
    if not all(type(rank) is int for rank in ranks):
        raise BadRow("'ranks' must be whole numbers, 0 for the best")
    for text in texts:
        text_of({"responses": text}, "responses")
    known = ids is None or (isinstance(ids, list) and len(ids) == len(texts))
    if not known or not all(isinstance(i, list) and all(type(n) is int and n >= 0 for n in i) for i in ids or []):
        raise BadRow("'response_ids' must be a list of token ids for each response")
    return [row]


def _read_label_studio(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    """Both exports: the task under "data" with its annotations, and the short one with all in one object."""
    task = row.get("data", row)
    if not isinstance(task, dict):
        raise BadRow(f"the field 'data' is {describe(task)}, not an object")
    prompt = message_prompt(text_of(task, "prompt"))
    left, right = (as_answer(text_of(task, name)) for name in ("answer1", "answer2"))
    if kind == "prompts":
        return [{"prompt": prompt}]
    records = []
    for side, labeller in _selections(row):
        if side not in ("left", "right"):
            raise BadRow(f"selected is {side!r}; it must be left or right")
        chosen, rejected = (left, right) if side == "left" else (right, left)
        who = {} if labeller is None else {"labeller": labeller}
        records.append(_pair(prompt, chosen, rejected) | who)
    if not records:
        raise LeftOut("not labelled")
    return records


def _selections(row: dict[str, Any]) -> list[tuple[object, object]]:
    """(side, labeller) of every annotation that was not cancelled."""
    annotations = row.get("annotations", row.get("completions"))
    if annotations is None:  # the short export keeps the result under the name of its control
        found = [value for value in row.values() if isinstance(value, dict) and "selected" in value]
        return [(value["selected"], row.get("annotator")) for value in found]
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise BadRow("'annotations' must be a list of objects")
    sides = []
    for annotation in annotations:
        results = [] if annotation.get("was_cancelled") else annotation.get("result") or []
        values = [r.get("value") for r in results if isinstance(r, dict)]
        found = [v["selected"] for v in values if isinstance(v, dict) and "selected" in v]
        sides += [(side, annotation.get("completed_by")) for side in found]
    return sides


def _read_pair(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    """chosen and rejected, as texts or lists of messages, with a field for the prompt or without one."""
    if isinstance(row["chosen"], list):
        return [_pair_of_messages(row)]
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if any(name in row for name in PROMPTS.split("|")):
        prompt = prompt_of(row, "plain")
        if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):  # whole texts, prompt included
            return [_pair(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))]
        prompt = prompt_of(row, layout)
        sides = [answer_of(row, side, prompt, layout) for side in ("chosen", "rejected")]
        return [{**_provenance(row, prompt), **_pair(prompt, *sides)}]
    if chosen.lstrip().startswith(HUMAN.strip()) or ASSISTANT in chosen:
        (prompt, better), (other, worse) = split_dialogue(chosen), split_dialogue(rejected)
        return [_pair(prompt, better, worse, other_prompt=other)]
    return [_pair(*split_shared_start(chosen, rejected))]


def _pair_of_messages(row: dict[str, Any]) -> Record:
    given = row.get("prompt")
    start = turns_of(given, "prompt") if isinstance(given, list) else []
    sides = [start + turns_of(row[name], name) for name in ("chosen", "rejected")]
    if isinstance(given, str) and all(len(turns) == 1 for turns in sides):  # answers alone, to the message in `prompt`
        sides = [[(HUMAN, not_blank(given)), *turns] for turns in sides]
    (prompt, better), (other, worse) = map(split_turns, sides)
    return _pair(prompt, better, worse, other_prompt=other)


def _pair(prompt: str, chosen: str, rejected: str, *, other_prompt: str | None = None) -> Record:
    """A pair record; raises LeftOut where its sides cannot be compared."""
    if other_prompt is not None and other_prompt.strip() != prompt.strip():
        raise LeftOut("the two sides have different prompts")
    if not chosen.strip() or not rejected.strip():
        raise LeftOut("an empty response")
    if chosen.strip() == rejected.strip():
        raise LeftOut("chosen equals rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _provenance(row: dict[str, Any], prompt: str) -> Record:
    """All other fields of a record that is the project's own already."""
    return row if row.get("prompt") == prompt else {}


def _read_messages(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    name = find(row, "messages|conversations")
    turns = turns_of(row[name], name)
    if kind == "prompts" and turns[-1][0] == HUMAN:
        return [{"prompt": not_blank(as_text(turns)) + ASSISTANT}]
    return [_demonstration(*split_turns(turns))]


def _read_instances(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    if not isinstance(row["instances"], list) or not all(isinstance(i, dict) for i in row["instances"]):
        raise BadRow("'instances' must be a list of objects with input and output")
    parts = [{"instruction": row["instruction"], **instance} for instance in row["instances"]]
    return [record for part in parts for record in _read_demonstration(part, kind, layout)]


def _read_demonstration(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    prompt = prompt_of(row, layout)
    response = answer_of(row, find(row, ANSWERS), prompt, layout)
    return [{**(_provenance(row, prompt) if "response" in row else {}), **_demonstration(prompt, response)}]


def _demonstration(prompt: str, response: str) -> Record:
    if not response.strip():
        raise LeftOut("an empty response")
    return {"prompt": prompt, "response": response}


def _read_rated(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    name = find(row, RATINGS)
    try:
        rating = float(row[name])
    except (TypeError, ValueError) as error:
        raise BadRow(f"the field {name!r} is {row[name]!r}, not a number") from error
    if not math.isfinite(rating):
        raise BadRow(f"the field {name!r} is {row[name]!r}, not a finite number")
    return [{**_demonstration("", text_of(row, "text").strip()), "rating": rating}]


def _read_text(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    return [_demonstration("", text_of(row, "text"))]


def _read_prompt(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    prompt = prompt_of(row, "plain")
    return [{**_provenance(row, prompt), "prompt": not_blank(prompt)}]


@dataclass(frozen=True)
class Format:
    """A kind of row: the fields it needs ("a|b": either), what can be read from it, and its reader."""

    name: str
    needs: tuple[str, ...]
    kinds: tuple[Kind, ...]
    read: Callable[[dict[str, Any], Kind, Layout], list[Record]]

    def fits(self, row: object) -> bool:
        """Whether a row has all fields of this format."""
        return isinstance(row, dict) and all(any(n in row for n in need.split("|")) for need in self.needs)


# In order: the first that fits most rows is taken.
FORMATS = (
    Format("rankings", ("prompt", "responses", "ranks"), ("pairs", "prompts"), _read_ranking),
    Format(
        "Label Studio pairs",
        ("data", "annotations|completions"),
        ("pairs", "demonstrations", "prompts"),
        _read_label_studio,
    ),
    Format(
        "Label Studio pairs, short export",
        ("prompt", "answer1", "answer2"),
        ("pairs", "demonstrations", "prompts"),
        _read_label_studio,
    ),
    Format("chat messages", ("messages|conversations",), ("demonstrations", "prompts"), _read_messages),
    Format("instructions with instances", ("instruction", "instances"), ("demonstrations", "prompts"), _read_instances),
    Format("prompts with answers", (PROMPTS, ANSWERS), ("demonstrations", "prompts"), _read_demonstration),
    Format("preference pairs", ("chosen", "rejected"), ("pairs", "demonstrations", "prompts"), _read_pair),
    Format("rated texts", ("text", RATINGS), ("demonstrations",), _read_rated),
    Format("texts", ("text",), ("demonstrations",), _read_text),
    Format("prompts", (PROMPTS,), ("prompts",), _read_prompt),
)

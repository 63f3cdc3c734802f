"""From rows to records: what the fields of a file mean, found from the fields themselves and never from a name.

Every reader gives the project's records: `{"prompt", "response"}`, `{"prompt", "chosen", "rejected"}`, `{"prompt",
"responses", "ranks"}` or `{"prompt"}`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from minirlhf.runtime import UserError, require

V = TypeVar("V")
Layout = Literal["messages", "plain"]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), HUMAN),
    **dict.fromkeys(("assistant", "gpt", "model"), ASSISTANT),
    "system": "",
}
PROMPTS = "prompt|instruction|question"
MESSAGES = ("messages", "conversations", "prompt", "chosen", "rejected")  # fields that can hold a list of them
ANSWERS = "response|completion|output|answer"
NO_ANSWER = "no answer at the end of the dialogue"


class BadRow(UserError, ValueError):
    """A row that is not what its file is made of: a mistake to correct, said with its line."""


class LeftOut(UserError):
    """A row that is well formed but says nothing that could be learned, e.g. an empty answer: counted."""


def find(row: dict[str, Any], names: str) -> str:
    """The first of the names ("a|b") that is a field of the row."""
    for name in names.split("|"):
        if name in row:
            return name
    raise BadRow(f"no field {names.replace('|', ' or ')!r} in this record")


def value_of(row: dict[str, Any], names: str, kind: type[V], words: str) -> V:
    """The value of a field ("a|b": of either); raises BadRow where it is missing or of another kind."""
    name = find(row, names)
    if not isinstance(row[name], kind):
        raise BadRow(f"the field {name!r} is {describe(row[name])}, not {words}")
    return row[name]


def text_of(row: dict[str, Any], names: str) -> str:
    """The text in a field; raises BadRow where it is missing, not text, or half a character."""
    value, name = value_of(row, names, str, "text"), find(row, names)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"half a character (lone surrogate {value[error.start]!a} at {error.start})"
        raise BadRow(f"the field {name!r} holds {half}; replace it") from error
    return value


def list_of(row: dict[str, Any], names: str, count: int | None = None) -> list[Any]:
    """The list in a field, of `count` values where given, each as LISTS has it; raises BadRow."""
    name = find(row, names)
    values = value_of(row, name, list, "a list")
    require(count is None or len(values) == count, f"{name!r} has {len(values)} values for {count} responses", BadRow)
    allowed, words = LISTS.get(name, (None, ""))
    require(allowed is None or all(map(allowed, values)), f"{name!r} must be {words}", BadRow)
    return values


def texts_of(row: dict[str, Any], name: str, count: int | None = None) -> tuple[str, ...]:
    """A list of texts, `count` of them where given; raises BadRow."""
    values = list_of(row, name, count)
    return tuple(text_of({f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(values))


def is_number(value: object) -> bool:
    """True for a finite number."""
    return type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


# What each value of a list must be, by the name of its field, and that in words.
LISTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(MESSAGES, (_is_object, "a list of messages, each an object")),
    **dict.fromkeys(("annotations", "completions"), (_is_object, "a list of objects")),
    "instances": (_is_object, "a list of objects with input and output"),
    "response_ids": (_is_ids, "a list of token ids for each response"),
    "ranks": (lambda rank: type(rank) is int, "whole numbers, 0 for the best"),
    "shown": (_is_count, "whole numbers of 0 or more"),
    "scores": (is_number, "numbers"),
    "orders": (lambda value: is_number(value) and 0 <= value <= 1, "probabilities, from 0 to 1"),
}


def describe(value: object) -> str:
    kinds = {bool: "true or false", dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), f"the number {value}")


def message_prompt(text: str) -> str:
    """The prompt that asks for an answer to one message."""
    return f"{HUMAN} {not_blank(text).strip()}{ASSISTANT}"


def not_blank(prompt: str) -> str:
    require(bool(prompt.strip()), "the prompt is blank", BadRow)
    return prompt


def as_answer(text: str) -> str:
    """An answer in a dialogue: one space before it and nothing after, since EOS follows at once."""
    return " " + text.strip()


def prompt_of(row: dict[str, Any], layout: Layout) -> str:
    """The prompt of a row with a field for it, as the model will see it."""
    name = find(row, PROMPTS)
    text = text_of(row, name)
    if name == "instruction" and row.get("input"):
        text = f"{text.strip()}\n{text_of(row, 'input')}"
    if name != "prompt" or layout == "messages":
        return message_prompt(text)
    return not_blank(text) if text else text


def answer_of(row: dict[str, Any], name: str, prompt: str, layout: Layout) -> str:
    text = text_of(row, name)
    if find(row, PROMPTS) != "prompt" or layout == "messages":
        return as_answer(text)
    touches = prompt.endswith(":") and text[:1].strip()
    return f" {text}" if touches else text


def layout_of(rows: list[dict[str, Any]]) -> Layout:
    """The form of the prompts and answers of a file: messages, or texts that the answers continue as they stand.

    They are messages where most of them would run into each other: no space between, and no colon before. A prompt
    that is in the dialogue form already ends with a colon.
    """
    seams = []
    for row in rows:
        prompt = row.get("prompt")
        answer = next((row[name] for name in ("chosen", *ANSWERS.split("|")) if name in row), None)
        if isinstance(prompt, str) and isinstance(answer, str) and answer:
            seams.append(bool(prompt) and not (prompt[-1].isspace() or prompt[-1] == ":" or answer[0].isspace()))
    return "messages" if sum(seams) * 2 > len(seams) else "plain"


# ---------------------------------------------------------------------------------------------------------- dialogues
def turns_of(row: dict[str, Any], names: str) -> list[tuple[str, str]]:
    """(speaker, text) of each message in a list of {"role", "content"} or {"from", "value"}."""
    messages = list_of(row, names)
    require(len(messages) > 0, "no messages", BadRow)
    turns = []
    for message in messages:
        role = text_of(message, "role|from")
        words = f"unknown role {role!r} in {find(row, names)!r}; known are {', '.join(ROLES)}"
        require(role in ROLES, words, BadRow)
        turns.append((ROLES[role], _content(message)))
    return turns


def _content(message: dict[str, Any]) -> str:
    """The text of a message, which may come in parts."""
    name = find(message, "content|value")
    if not isinstance(message[name], list):
        return text_of(message, name)
    return "".join(text_of(part if isinstance(part, dict) else {}, "text") for part in message[name])


def as_text(turns: list[tuple[str, str]]) -> str:
    return "".join(f"{speaker} {text.strip()}" if speaker else text.strip() for speaker, text in turns)


def split_turns(turns: list[tuple[str, str]]) -> tuple[str, str]:
    """Prompt and answer of a dialogue: its last turn, which must be the assistant's, is the answer."""
    require(turns[-1][0] == ASSISTANT and any(speaker == HUMAN for speaker, _ in turns), NO_ANSWER, LeftOut)
    return as_text(turns[:-1]) + ASSISTANT, as_answer(turns[-1][1])


def split_dialogue(text: str) -> tuple[str, str]:
    """Prompt and answer of a dialogue in the plain-text form, at its last Assistant turn."""
    before, mark, answer = text.rpartition(ASSISTANT)
    require(bool(mark) and HUMAN not in answer, NO_ANSWER, LeftOut)
    return f"\n\n{before.lstrip()}{ASSISTANT}", as_answer(answer)


def split_shared_start(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The start that two texts share, up to a whole word, is their prompt."""
    length = len(os.path.commonprefix([chosen, rejected]))
    if not (chosen[length : length + 1].isspace() and rejected[length : length + 1].isspace()):
        length = max((i for i in range(length) if chosen[i].isspace()), default=0)
    return chosen[:length], chosen[length:], rejected[length:]


Record = dict[str, Any]
Kind = Literal["pairs", "demonstrations", "prompts"]
KINDS: tuple[Kind, ...] = ("pairs", "demonstrations", "prompts")  # the richest first
RATINGS = "rating|label|score|stars|sentiment"


def answers_of(row: dict[str, Any]) -> tuple[str, tuple[str, ...], tuple[list[int], ...] | None]:
    """Prompt, responses and, where they are known, their sampled ids, of a record that compares at least two."""
    prompt, responses = text_of(row, "prompt"), texts_of(row, "responses")
    require(len(responses) > 1, f"{len(responses)} responses; a comparison needs at least 2", BadRow)
    if row.get("response_ids") is None:
        return prompt, responses, None
    return prompt, responses, tuple(list_of(row, "response_ids", len(responses)))


def _read_ranking(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    _, responses, _ = answers_of(row)
    list_of(row, "ranks", len(responses))
    return [row]


def _read_label_studio(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    """Both exports: the task under "data" with its annotations, and the short one with all in one object."""
    task = value_of(row, "data", dict, "an object") if "data" in row else row
    prompt = message_prompt(text_of(task, "prompt"))
    left, right = (as_answer(text_of(task, name)) for name in ("answer1", "answer2"))
    if kind == "prompts":
        return [{"prompt": prompt}]
    records = []
    for side, labeller in _selections(row):
        require(side in ("left", "right"), f"selected is {side!r}; it must be left or right", BadRow)
        chosen, rejected = (left, right) if side == "left" else (right, left)
        who = {} if labeller is None else {"labeller": labeller}
        records.append(_pair(prompt, chosen, rejected) | who)
    require(len(records) > 0, "not labelled", LeftOut)
    return records


def _selections(row: dict[str, Any]) -> list[tuple[object, object]]:
    """(side, labeller) of every annotation that was not cancelled."""
    if row.get("annotations", row.get("completions")) is None:  # the short export has the result under its control
        short = [value for value in row.values() if isinstance(value, dict) and "selected" in value]
        return [(value["selected"], row.get("annotator")) for value in short]
    sides: list[tuple[object, object]] = []
    for annotation in list_of(row, "annotations|completions"):
        results = [] if annotation.get("was_cancelled") else annotation.get("result") or []
        values = [r.get("value") for r in results if isinstance(r, dict)]
        chosen = [v["selected"] for v in values if isinstance(v, dict) and "selected" in v]
        sides += [(side, annotation.get("completed_by")) for side in chosen]
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
    start = turns_of(row, "prompt") if isinstance(given, list) else []
    sides = [start + turns_of(row, name) for name in ("chosen", "rejected")]
    if isinstance(given, str) and all(len(turns) == 1 for turns in sides):  # answers alone, to the message in `prompt`
        sides = [[(HUMAN, not_blank(given)), *turns] for turns in sides]
    (prompt, better), (other, worse) = map(split_turns, sides)
    return _pair(prompt, better, worse, other_prompt=other)


def _pair(prompt: str, chosen: str, rejected: str, *, other_prompt: str | None = None) -> Record:
    """A pair record; raises LeftOut where its sides cannot be compared."""
    alike = other_prompt is None or other_prompt.strip() == prompt.strip()
    require(alike, "the two sides have different prompts", LeftOut)
    require(bool(chosen.strip() and rejected.strip()), "an empty response", LeftOut)
    require(chosen.strip() != rejected.strip(), "chosen equals rejected", LeftOut)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _provenance(row: dict[str, Any], prompt: str) -> Record:
    """All other fields of a record that is the project's own already."""
    return row if row.get("prompt") == prompt else {}


def _read_messages(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    turns = turns_of(row, "messages|conversations")
    if kind == "prompts" and turns[-1][0] == HUMAN:
        return [{"prompt": not_blank(as_text(turns)) + ASSISTANT}]
    return [_demonstration(*split_turns(turns))]


def _read_instances(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    parts = [{"instruction": row["instruction"], **instance} for instance in list_of(row, "instances")]
    return [record for part in parts for record in _read_demonstration(part, kind, layout)]


def _read_demonstration(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    prompt = prompt_of(row, layout)
    response = answer_of(row, find(row, ANSWERS), prompt, layout)
    return [{**(_provenance(row, prompt) if "response" in row else {}), **_demonstration(prompt, response)}]


def _demonstration(prompt: str, response: str) -> Record:
    require(bool(response.strip()), "an empty response", LeftOut)
    return {"prompt": prompt, "response": response}


def _read_rated(row: dict[str, Any], kind: Kind, layout: Layout) -> list[Record]:
    name = find(row, RATINGS)
    try:
        rating = float(row[name])
    except (TypeError, ValueError):
        rating = math.nan
    require(math.isfinite(rating), f"the field {name!r} is {row[name]!r}, not a finite number", BadRow)
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
        """True where a row has all fields of this format."""
        return isinstance(row, dict) and all(any(n in row for n in need.split("|")) for need in self.needs)


# In order: the first that fits most rows is taken.
FORMATS = (
    Format("rankings", ("prompt", "responses", "ranks"), ("pairs", "prompts"), _read_ranking),
    Format("Label Studio pairs", ("data", "annotations|completions"), KINDS, _read_label_studio),
    Format("Label Studio pairs, short export", ("prompt", "answer1", "answer2"), KINDS, _read_label_studio),
    Format("chat messages", ("messages|conversations",), ("demonstrations", "prompts"), _read_messages),
    Format("instructions with instances", ("instruction", "instances"), ("demonstrations", "prompts"), _read_instances),
    Format("prompts with answers", (PROMPTS, ANSWERS), ("demonstrations", "prompts"), _read_demonstration),
    Format("preference pairs", ("chosen", "rejected"), KINDS, _read_pair),
    Format("rated texts", ("text", RATINGS), ("demonstrations",), _read_rated),
    Format("texts", ("text",), ("demonstrations",), _read_text),
    Format("prompts", (PROMPTS,), ("prompts",), _read_prompt),
)

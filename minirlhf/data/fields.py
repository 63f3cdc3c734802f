"""Fields of a row as texts, and dialogues as text: what all readers of formats share.

Messages become a dialogue in plain text, `\\n\\nHuman: …`, and an answer starts with a space.
A row that cannot be read raises BadRow; one that is well formed and says nothing raises LeftOut, and is counted.
"""

from __future__ import annotations

import os
from typing import Any, Literal

Layout = Literal["messages", "plain"]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), HUMAN),
    **dict.fromkeys(("assistant", "gpt", "model"), ASSISTANT),
    "system": "",
}
PROMPTS = "prompt|instruction|question"
ANSWERS = "response|completion|output|answer"
NO_ANSWER = "no answer at the end of the dialogue"


class BadRow(ValueError):
    """A row that is not what its file is made of: a mistake to correct, said with its line."""


class LeftOut(Exception):
    """A row that is well formed but says nothing that could be learned, e.g. an empty answer: counted."""


def find(row: dict[str, Any], names: str) -> str:
    """The first of the names ("a|b") that is a field of the row."""
    for name in names.split("|"):
        if name in row:
            return name
    raise BadRow(f"no field {names.replace('|', ' or ')!r} in this record")


def text_of(row: dict[str, Any], name: str) -> str:
    """The text in a field; raises BadRow where it is missing, not text, or half a character."""
    value = row[find(row, name)]
    if not isinstance(value, str):
        raise BadRow(f"the field {name!r} is {describe(value)}, not text")
    lone = next((i for i, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None) if not value.isascii() else None
    if lone is not None:
        raise BadRow(
            f"the field {name!r} holds half a character (lone surrogate {value[lone]!a} at {lone}); replace it"
        )
    return value


def describe(value: object) -> str:
    kinds = {bool: "true or false", dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), f"the number {value}")


def message_prompt(text: str) -> str:
    """The prompt that asks for an answer to one message."""
    return f"{HUMAN} {not_blank(text).strip()}{ASSISTANT}"


def not_blank(prompt: str) -> str:
    if not prompt.strip():
        raise BadRow("the prompt is blank")
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
    """Whether the prompts and answers of a file are messages, or texts that the answers continue as they stand.

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
def turns_of(messages: object, name: str) -> list[tuple[str, str]]:
    """(speaker, text) of each message in a list of {"role", "content"} or {"from", "value"}."""
    if not isinstance(messages, list) or not messages:
        raise BadRow(
            f"the field {name!r} is {describe(messages)}, not a list of messages" if messages else "no messages"
        )
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow(f"a message in {name!r} is {describe(message)}, not an object")
        role = text_of(message, find(message, "role|from"))
        if role not in ROLES:
            raise BadRow(f"unknown role {role!r} in {name!r}; known are {', '.join(ROLES)}")
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
    if turns[-1][0] != ASSISTANT or all(speaker != HUMAN for speaker, _ in turns):
        raise LeftOut(NO_ANSWER)
    return as_text(turns[:-1]) + ASSISTANT, as_answer(turns[-1][1])


def split_dialogue(text: str) -> tuple[str, str]:
    """Prompt and answer of a dialogue in the plain-text form, at its last Assistant turn."""
    before, found, answer = text.rpartition(ASSISTANT)
    if not found or HUMAN in answer:
        raise LeftOut(NO_ANSWER)
    return f"\n\n{before.lstrip()}{ASSISTANT}", as_answer(answer)


def split_shared_start(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The start that two texts share, up to a whole word, is their prompt."""
    length = len(os.path.commonprefix([chosen, rejected]))
    if not (chosen[length : length + 1].isspace() and rejected[length : length + 1].isspace()):
        length = max((i for i in range(length) if chosen[i].isspace()), default=0)
    return chosen[:length], chosen[length:], rejected[length:]

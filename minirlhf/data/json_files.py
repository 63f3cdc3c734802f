"""JSON, one document or one value a line, read strictly and with the place of every value.

NaN and Infinity, which are not JSON, and keys that stand twice in an object are faults of their line. A broken line
does not stop the reading of JSON Lines; a broken array is read up to where its syntax breaks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minirlhf.data.rows import Bad, Content, Row


class Decoder:
    """Strict JSON: NaN and Infinity, which are not JSON, and keys that stand twice are faults, not values."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        self.faults += [f"the field {key!r} stands twice in one object" for key in set(keys) if keys.count(key) > 1]
        return dict(pairs)

    def _constant(self, name: str) -> None:
        self.faults.append(f"{name} is not JSON; write a number or null")

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value that starts at `start` and where it ends; raises ValueError with the reason in words."""
        self.faults = []
        try:
            return self.decoder.raw_decode(text, start)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def is_json_string(line: str) -> bool:
    try:
        return isinstance(json.loads(line), str)
    except ValueError:
        return False


def read_json(lines: list[str], path: Path) -> Content:
    """One JSON document, or one value a line: the latter where the first line is a whole object or text."""
    decoder = Decoder()
    first = next(line for line in lines if line.strip()).strip()
    if first[0] != "[" and _is_whole(decoder, first):
        return _read_json_lines(decoder, lines, path)
    text = "\n".join(lines)
    start = len(text) - len(text.lstrip())
    if first[0] == "[":
        return _read_array(decoder, text, start, path)
    if not _is_whole(decoder, text.strip()):
        return _read_json_lines(decoder, lines, path)
    value, _ = decoder.decode(text, start)
    return _keep(Content("JSON"), decoder, f"{path}:{_line_of(text, start)}", value)


def _is_whole(decoder: Decoder, text: str) -> bool:
    """Whether a text is one JSON value and nothing else."""
    try:
        return decoder.decode(text)[1] == len(text)
    except ValueError:
        return False


def _keep(content: Content, decoder: Decoder, place: str, value: Any) -> Content:
    if decoder.faults:
        content.bad.append(Bad(place, decoder.faults[0]))
    else:
        content.rows.append(Row(place, value))
    return content


def _read_json_lines(decoder: Decoder, lines: list[str], path: Path) -> Content:
    content = Content("JSON Lines")
    for number, line in enumerate(lines, 1):
        text, place = line.strip(" \t\r"), f"{path}:{number}"
        if not text:
            continue
        try:
            value, end = decoder.decode(text)
        except ValueError as error:
            content.bad.append(Bad(place, f"not JSON ({_reason(error)}); each line must hold one object"))
            continue
        if text[end:]:
            content.bad.append(Bad(place, "not JSON (something follows the value); each line must hold one object"))
            continue
        _keep(content, decoder, place, value)
    return content


def _read_array(decoder: Decoder, text: str, start: int, path: Path) -> Content:
    """The elements of one JSON array, each with the line it starts on; stops where the syntax breaks."""
    content, line, counted = Content("JSON array"), 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    position = skip(start + 1)
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.decode(text, position)
        except ValueError as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            content.bad.append(
                Bad(f"{path}:{where}", f"not JSON ({_reason(error)}); the rest of the file was not read")
            )
            return content
        _keep(content, decoder, f"{path}:{line}", value)
        position = skip(position)
        if position < len(text) and text[position] == ",":
            position = skip(position + 1)
        elif position < len(text) and text[position] != "]":
            break
    after = position + 1 if text[position : position + 1] == "]" else None
    if after is None or text[after:].strip():
        where = _line_of(text, min(skip(position if after is None else after), len(text) - 1))
        content.bad.append(Bad(f"{path}:{where}", "not JSON (the array does not end as it should)"))
    return content


def _reason(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1

"""From bytes to rows: what container a file is, found from its content and never from its name.

JSON (one array or object), JSON Lines, TSV and plain text, each also gzipped, and Parquet. A row keeps its place, and
what cannot be read becomes a `Bad` with `file:line`: reading goes on, so that one pass finds every bad line.
Left out: CSV, whose quoting rules differ between writers, and archives of several files.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minirlhf.runtime import UserError


@dataclass(frozen=True)
class Row:
    """One value of a file and its place, `file:line`."""

    place: str
    value: Any


@dataclass(frozen=True)
class Bad:
    """A line that cannot be read, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Content:
    """The rows of a file. `container` says in words what the file is."""

    container: str
    rows: list[Row] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)

    def add(self, place: str, value: Any, faults: list[str]) -> None:
        """Take a value as a row, or its first fault."""
        if faults:
            self.bad.append(Bad(place, faults[0]))
        else:
            self.rows.append(Row(place, value))


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

    def is_whole(self, text: str) -> bool:
        """True where a text is one JSON value and nothing else."""
        try:
            return self.decode(text)[1] == len(text)
        except ValueError:
            return False


def read_json(lines: list[str], path: Path) -> Content:
    """One JSON document, or one value a line: the latter where the first line is a whole object or text."""
    decoder, text = Decoder(), "\n".join(lines)
    start = len(text) - len(text.lstrip())
    if text[start] == "[":
        return _read_array(decoder, text, start, path)
    if decoder.is_whole(text[start:].partition("\n")[0].strip()) or not decoder.is_whole(text.strip()):
        return _read_json_lines(decoder, lines, path)
    content, line = Content("JSON"), text.count("\n", 0, start) + 1
    content.add(f"{path}:{line}", decoder.decode(text, start)[0], decoder.faults)
    return content


def _read_json_lines(decoder: Decoder, lines: list[str], path: Path) -> Content:
    content = Content("JSON Lines")
    for number, line in enumerate(lines, 1):
        text, place = line.strip(" \t\r"), f"{path}:{number}"
        if not text:
            continue
        try:
            value, end = decoder.decode(text)
            if end < len(text):
                raise ValueError("something follows the value")
            content.add(place, value, decoder.faults)
        except ValueError as error:
            reason = getattr(error, "msg", error)
            content.bad.append(Bad(place, f"not JSON ({reason}); each line must hold one object"))
    return content


def _read_array(decoder: Decoder, text: str, start: int, path: Path) -> Content:
    """The elements of one JSON array, each with the line it starts on; stops where the syntax breaks."""
    content, line, counted = Content("JSON array"), 1, 0
    position = _skip(text, start + 1)
    while text[position : position + 1] not in ("", "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.decode(text, position)
        except ValueError as error:
            where, reason = getattr(error, "lineno", line), getattr(error, "msg", error)
            content.bad.append(Bad(f"{path}:{where}", f"not JSON ({reason}); the rest of the file was not read"))
            return content
        content.add(f"{path}:{line}", value, decoder.faults)
        position = _skip(text, position)
        if text[position : position + 1] != ",":
            break
        position = _skip(text, position + 1)
    closed = text[position : position + 1] == "]"
    rest = _skip(text, position + closed)
    if not closed or text[rest:].strip():
        where = text.count("\n", 0, min(rest, len(text) - 1)) + 1
        content.bad.append(Bad(f"{path}:{where}", "not JSON (the array does not end as it should)"))
    return content


def _skip(text: str, position: int) -> int:
    """The next position that holds none of JSON's blanks."""
    blanks = BLANKS.match(text, position)
    return blanks.end() if blanks else position


BLANKS = re.compile(r"[ \t\r\n]*")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
SAMPLE = 100  # lines that decide what a file is
# Marks of encodings and archives that are not read, with the reason given.
REFUSED = {
    b"\xff\xfe": "UTF-16 text; save the file as UTF-8",
    b"\xfe\xff": "UTF-16 text; save the file as UTF-8",
    b"\xef\xbb\xbf": "starts with a byte order mark; save the file as UTF-8 without it",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
    b"BZh": "bzip2-compressed; unpack it first",
    b"\xfd7zXZ": "xz-compressed; unpack it first",
}


def read_file(path: Path) -> Content:
    """All rows of a file; raises UserError where the file as a whole cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    packed = raw[:2] == b"\x1f\x8b"
    if packed:
        raw = _unpack(raw, path)
    content = _read_parquet(raw, path) if raw[:4] == b"PAR1" else _read_text(raw, path)
    content.container += ", gzip" if packed else ""
    return content


def _unpack(raw: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: gzip data that cannot be unpacked ({error}); copy the file again") from error


def _read_parquet(raw: bytes, path: Path) -> Content:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: Parquet that cannot be read ({error}); copy the file again") from error
    return Content("Parquet", [Row(f"{path}:{number}", value) for number, value in enumerate(values, 1)])


def _read_text(raw: bytes, path: Path) -> Content:
    for mark, reason in REFUSED.items():
        if raw.startswith(mark):
            return Content("unreadable", bad=[Bad(f"{path}:1", reason)])
    lines, bad = _decode(raw, path)
    sample = [line for line in lines if line.strip()][:SAMPLE]
    if not sample:
        return Content("empty", bad=bad)
    first = sample[0].strip()
    if first[0] in "[{" or (first[0] == '"' and Decoder().is_whole(first)):
        content = read_json(lines, path)
    elif "\t" in sample[0].lstrip() and sum("\t" in line for line in sample) * 2 > len(sample):
        content = _read_tsv(lines, path)
    else:
        content = Content("plain text", [Row(f"{path}:{number}", line) for number, line in enumerate(lines, 1)])
    content.bad[:0] = bad
    return content


def _decode(raw: bytes, path: Path) -> tuple[list[str], list[Bad]]:
    """Lines as text, "" for those that are not UTF-8.

    Split at newlines alone: str.splitlines would also break a text at U+2028 and its like.
    """
    lines, bad = [], []
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            lines.append("")
            reason = f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); save the file as UTF-8"
            bad.append(Bad(f"{path}:{number}", reason))
    return lines, bad


# ----------------------------------------------------------------------------------------------------------------- TSV
def _read_tsv(lines: list[str], path: Path) -> Content:
    """Rows of named columns, without quoting: a quotation mark is part of the text.

    With a first line of names, those. Without, by where the number stands: text TAB rating (split at the last tab),
    id TAB rating TAB text, rating TAB text, or text TAB rating TAB anything.
    """
    table = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    names = table[0][1].split("\t")
    if all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in names):
        content, cut, body = Content("TSV with names"), lambda line: line.split("\t"), table[1:]
    else:
        names, cut = _columns([line.split("\t") for _, line in table[:SAMPLE]])
        content, body = Content("TSV"), table
    for number, line in body:
        cells, place = cut(line), f"{path}:{number}"
        if len(cells) != len(names):
            reason = f"{line.count(chr(9)) + 1} columns where {', '.join(names)} are expected"
            content.bad.append(Bad(place, reason))
        else:
            content.rows.append(Row(place, dict(zip(names, cells, strict=True))))
    return content


def _columns(cells: list[list[str]]) -> tuple[list[str], Callable[[str], list[str]]]:
    """Names of the columns of a table without names, and how to cut a line into them."""

    def numbers(column: int) -> bool:
        hits = sum(len(c) > 1 and NUMBER.fullmatch(c[column].strip()) is not None for c in cells)
        return hits >= 0.9 * len(cells)

    if numbers(-1):
        return ["text", "rating"], lambda line: line.rsplit("\t", 1)
    if numbers(0) and all(len(c) > 2 for c in cells) and numbers(1):
        return ["id", "rating", "text"], lambda line: line.split("\t", 2)
    if numbers(0):
        return ["rating", "text"], lambda line: line.split("\t", 1)
    if numbers(1):
        return ["text", "rating"], lambda line: line.split("\t")[:2]
    width = len(cells[0])
    return [str(i) for i in range(width)], lambda line: line.split("\t")

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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from minirlhf.data.formats import BadRow, Kind, LeftOut, Record
from minirlhf.runtime import UserError

R = TypeVar("R")


class Bad(NamedTuple):
    """A line that cannot be read, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Dataset:
    """The contents of a source.

    container  what its bytes are, e.g. "JSON Lines, gzip"
    rows       (place, value) in their order; a place is `file:line`;  bad  lines that cannot be read
    format     what the fields of its rows mean;  left_out  reasons with their counts
    records    the project's records, of one kind
    """

    container: str
    rows: list[tuple[str, Any]] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    source: str = ""
    format: str = "nothing that can be read"
    kind: Kind = "prompts"
    records: list[Record] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def parse(self, read: Callable[[dict[str, Any]], list[R]]) -> list[R]:
        """All that `read` makes of the rows; a row that it refuses (BadRow) becomes bad, or is left out and counted."""
        results: list[R] = []
        for place, value in self.rows:
            try:
                if not isinstance(value, dict):
                    raise BadRow("not an object with fields")
                results += read(value)
            except BadRow as error:
                self.bad.append(Bad(place, str(error)))
            except LeftOut as reason:
                self.left_out[str(reason)] += 1
        self.bad.sort(key=lambda bad: int(bad.place.rpartition(":")[2]))
        return results

    def summary(self) -> str:
        """One line: what was found, and what was left out."""
        line = f"{self.source}: {self.container}, {self.format}: {len(self.records)} {self.kind}"
        reasons = ", ".join(f"{count} with {reason}" for reason, count in self.left_out.most_common())
        return f"{line}; {reasons} left out" if reasons else line


# ---------------------------------------------------------------------------------------------------------------- JSON
def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRow(f"the field {twice!r} stands twice in one object")
    return fields


def _refuse(name: str) -> None:
    raise BadRow(f"{name} is not JSON; write a number or null")


JSON, STRICT = json.JSONDecoder(), json.JSONDecoder(object_pairs_hook=_as_dict, parse_constant=_refuse)
NOT_JSON = (ValueError, RecursionError)


def _is_whole(text: str) -> bool:
    """True where a text is one JSON value and nothing else."""
    try:
        JSON.decode(text)
    except NOT_JSON:
        return False
    return True


def _read_json(lines: list[str], path: Path) -> Dataset:
    """One array, one document, or one value a line: the latter where the first line is a whole object or text.

    Strict: NaN and Infinity, which are not JSON, and keys that stand twice are faults, not values.
    """
    text, content = "\n".join(lines), Dataset("JSON Lines")
    start = len(text) - len(text.lstrip())
    parts: Iterable[tuple[int, str]] = enumerate(lines, 1)
    if text[start] == "[":
        content.container, parts = "JSON array", _elements(text, start, path, content.bad)
    elif not _is_whole(text[start:].partition("\n")[0]) and _is_whole(text):
        content.container, parts = "JSON", [(text.count("\n", 0, start) + 1, text)]
    for number, part in parts:
        place = f"{path}:{number}"
        try:
            if part.strip(" \t\r\n"):
                content.rows.append((place, STRICT.decode(part)))
        except NOT_JSON as error:
            words = f"not JSON ({getattr(error, 'msg', error)}); each line must hold one object"
            content.bad.append(Bad(place, str(error) if isinstance(error, BadRow) else words))
    return content


def _elements(text: str, start: int, path: Path, bad: list[Bad]) -> Iterator[tuple[int, str]]:
    """The elements of the array that begins at `start`, each with its line; what breaks the syntax is bad, and last."""
    line, counted = 1, 0
    position, mark = _skip(text, start + 1), ","
    while mark == "," and text[position : position + 1] not in ("", "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            end = JSON.raw_decode(text, position)[1]
        except NOT_JSON as error:
            where, reason = getattr(error, "lineno", line), getattr(error, "msg", error)
            bad.append(Bad(f"{path}:{where}", f"not JSON ({reason}); the rest of the file was not read"))
            return
        yield line, text[position:end]
        position = _skip(text, end)
        mark = text[position : position + 1]
        position = _skip(text, position + (mark == ","))
    closed = text[position : position + 1] == "]"
    rest = _skip(text, position + closed)
    if not closed or rest < len(text):
        where = text.count("\n", 0, min(rest, len(text) - 1)) + 1
        bad.append(Bad(f"{path}:{where}", "not JSON (the array does not end as it should)"))


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


def read_file(path: Path) -> Dataset:
    """All rows of a file; raises UserError where the file as a whole cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    packed = raw[:2] == b"\x1f\x8b"
    try:
        raw = gzip.decompress(raw) if packed else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: gzip data that cannot be unpacked ({error}); copy the file again") from error
    content = _read_parquet(raw, path) if raw[:4] == b"PAR1" else _read_text(raw, path)
    content.container += ", gzip" if packed else ""
    return content


def _read_parquet(raw: bytes, path: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: Parquet that cannot be read ({error}); copy the file again") from error
    return Dataset("Parquet", [(f"{path}:{number}", value) for number, value in enumerate(values, 1)])


def _read_text(raw: bytes, path: Path) -> Dataset:
    for mark, reason in REFUSED.items():
        if raw.startswith(mark):
            return Dataset("unreadable", bad=[Bad(f"{path}:1", reason)])
    lines, bad = _decode(raw, path)
    sample = [line for line in lines if line.strip()][:SAMPLE]
    if not sample:
        return Dataset("empty", bad=bad)
    first = sample[0].strip()
    if first[0] in "[{" or (first[0] == '"' and _is_whole(first)):
        content = _read_json(lines, path)
    elif "\t" in sample[0].lstrip() and sum("\t" in line for line in sample) * 2 > len(sample):
        content = _read_tsv(lines, path)
    else:
        content = Dataset("plain text", [(f"{path}:{number}", line) for number, line in enumerate(lines, 1)])
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
def _read_tsv(lines: list[str], path: Path) -> Dataset:
    """Rows of named columns, without quoting: a quotation mark is part of the text.

    With a first line of names, those. Without, by where the number stands: text TAB rating (split at the last tab),
    id TAB rating TAB text, rating TAB text, or text TAB rating TAB anything.
    """
    table = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    names = table[0][1].split("\t")
    if all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in names):
        content, cut, body = Dataset("TSV with names"), lambda line: line.split("\t"), table[1:]
    else:
        names, cut = _columns([line.split("\t") for _, line in table[:SAMPLE]])
        content, body = Dataset("TSV"), table
    for number, line in body:
        cells, place = cut(line), f"{path}:{number}"
        if len(cells) != len(names):
            reason = f"{line.count(chr(9)) + 1} columns where {', '.join(names)} are expected"
            content.bad.append(Bad(place, reason))
        else:
            content.rows.append((place, dict(zip(names, cells, strict=True))))
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

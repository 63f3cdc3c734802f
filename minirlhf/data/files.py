"""From bytes to rows: what container a file is, found from its content and never from its name.

JSON (one array or object), JSON Lines, TSV and plain text, each also gzipped, and Parquet. A row keeps its place, and
what cannot be read becomes a `Bad` with `file:line`: reading goes on, so that one pass finds every bad line.
Left out: CSV, whose quoting rules differ between writers, and archives of several files.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from minirlhf.data.json_files import is_json_string, read_json
from minirlhf.data.rows import Bad, Content, Row
from minirlhf.runtime import UserError

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
    if raw[:4] == b"PAR1":
        content = _read_parquet(raw, path)
    else:
        content = _read_text(raw, path)
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
    first = sample[0].lstrip()
    if first[0] in "[{" or is_json_string(first):
        content = read_json(lines, path)
    elif "\t" in first and sum("\t" in line for line in sample) * 2 > len(sample):
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
        names, cut = _columns(list(_sample_cells(table)))
        content, body = Content("TSV"), table
    for number, line in body:
        cells, place = cut(line), f"{path}:{number}"
        if len(cells) != len(names):
            reason = f"{line.count(chr(9)) + 1} columns where {', '.join(names)} are expected"
            content.bad.append(Bad(place, reason))
        else:
            content.rows.append(Row(place, dict(zip(names, cells, strict=True))))
    return content


def _sample_cells(table: list[tuple[int, str]]) -> Iterator[list[str]]:
    return (line.split("\t") for _, line in table[:SAMPLE])


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

"""Files: their hashes, and the one way to write, append to and read them, so that a reader never meets half of one.

Nothing else in the package opens a file for writing (tests/test_files.py reads the tree for it).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from minirlhf.runtime import require

CHUNK = 1 << 20  # bytes read at a time


def file_hash(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file's bytes, or of the first `size` of them, in hexadecimal."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def source_hash(source: Path | str) -> str:
    """SHA-256 of a file, or of the weights in a model folder; a name that is neither stands for itself.

    Weights in several parts have the hash of their parts' hashes, in the order of their names.
    """
    path = Path(source)
    file = path / "model.safetensors" if path.is_dir() else path
    if file.is_file():
        return file_hash(file)
    parts = [file_hash(part) for part in sorted(path.glob("model-*.safetensors"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest() if parts else f"named {source}"


def fresh_folder(folder: Path) -> Path:
    """An empty folder at `folder`; what stood there moves to the first free `<name>.1`, `<name>.2`, …, and is named."""
    if folder.exists() and any(folder.iterdir()):
        number = 1
        while (old := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(old)
        print(f"{folder} held an earlier run: it is now {old}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path` to write into; on leaving, it takes the place of `path` in one step.

    At every moment `path` holds the old content or the new, on the disk too. An error leaves the old one. A link stays
    a link: its target is replaced. What is no plain file (a terminal, a pipe) is written to directly.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".saving-{path.name}")
    discard(temporary)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Write a whole file, in UTF-8 with Unix line ends, in one step."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path | str, value: Any) -> None:
    """Write readable JSON, in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_records(path: Path | str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSONL, one per line, readable UTF-8, in one step."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSONL file that this project appends to; none where there is no file.

    A last line that was not written whole is left out, and said. Raises UserError with file and line of any other that
    is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif line and number == len(lines):
            print(f"{path}: the last line was not written whole and is left out", file=sys.stderr)
        else:
            require(not line, f"{path}:{number}: is not a JSON object; mend or remove the line")
    return records


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file that this project writes; empty where there is no file. UserError where it is none."""
    path = Path(path)
    value = _record(path.read_bytes()) if path.is_file() else {}
    require(value is not None, f"{path}: is not a JSON object; make it again, or remove it")
    return value or {}


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Lines:
    """A JSONL file to append to: each record is flushed as it comes, so that a reader sees it and a kill keeps it.

    keep  bytes of the file that stay, where it is to go on from there; a last line that was not written whole goes
    """

    def __init__(self, path: Path, *, keep: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file = path, path.open("a+b", buffering=0)
        if keep is not None:
            self.cut(keep)
        self._mend()

    def _mend(self) -> None:
        """Finish or cut off a last line without its newline."""
        self._file.seek(0)
        whole, newline, torn = self._file.read().rpartition(b"\n")
        if torn and _record(torn) is not None:
            self._write(b"\n")
        elif torn:
            self.cut(len(whole + newline))
            print(f"{self.path}: the last line was not written whole and is cut off", file=sys.stderr)

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records at the end; after an error (a full disk) the file holds what it held before."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._write(lines.encode(errors="replace"))

    def _write(self, content: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self.cut(before)
            raise

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        os.ftruncate(self._file.fileno(), size)

    def sync(self) -> int:
        """Wait until all is on the disk; returns the size in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def discard(path: Path) -> None:
    """Delete what stands there. A folder vanishes in one step, so that no half of it is ever taken for whole."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".old-{path.name}"))
        shutil.rmtree(hidden)


def sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)

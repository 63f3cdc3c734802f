"""Files: their hashes, and how they are written so that a reader never meets half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_records(path: Path | str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSONL, one a line, readable UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step: at every moment it holds the old text or the new one."""
    partial = path.with_name(f".saving-{path.name}")
    discard(partial)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync_folder(path.parent)


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

"""The log of calls to a paid or slow service: every call is on the disk, and what was answered is not asked again.

One JSON object a line, appended and synced when the call ends:

    key             names what was asked: SHA-256 of address and request
    time, seconds   when the call began (UTC), and how long it took
    request         what was sent, as JSON
    status          of HTTP; null where no answer came
    answer          what was read from the answer; null for a failed call
    error           why it failed; null for a good one
    tokens          as the server counts them; where it does not, the request's bytes, which are never fewer
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

from minirlhf.runtime import UserError, held_signals

NEEDED = ("key", "answer", "tokens")


class CallLog:
    """An open log; `calls` and `tokens` count all in it, also those of earlier runs. Use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self.path, self.calls, self.tokens = path, 0, 0
        self.answers: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from error
        self._lock()
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            self._count(self._read(line, number))
        if whole != content:  # a crash in mid-write leaves a torn last line
            self._file.truncate(len(whole))

    def _lock(self) -> None:
        import fcntl  # on Unix alone

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(f"{self.path}: another process is using it; give another --calls") from error

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        good = isinstance(row, dict) and all(name in row for name in NEEDED)
        if not (good and isinstance(row["answer"], dict | None) and type(row["tokens"]) is int):
            self._file.close()
            raise UserError(f"{self.path}:{number}: not a line of a log of calls; give another file, or mend it")
        return row

    def _count(self, row: dict[str, Any]) -> None:
        self.calls += 1
        self.tokens += row["tokens"]
        if row["answer"] is not None:
            self.answers[row["key"]] = row["answer"]

    def add(self, row: dict[str, Any]) -> None:
        """Write a call; it is on the disk when this returns."""
        with held_signals():
            self._file.write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._count(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def call_key(*parts: object) -> str:
    """Names what is asked, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

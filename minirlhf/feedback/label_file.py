"""The file that labels are written to while somebody labels: a label is on the disk before the next question appears.

So a kill loses nothing. Undo cuts the last line off. Both leave the file whole at every moment: a line that a crash
tore is cut off when the file is opened again, and a second process that would write to the same file is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minirlhf.feedback.labels import Label, read_labels
from minirlhf.files import Lines
from minirlhf.runs.checkpoint import only_writer
from minirlhf.runtime import UserError, held_signals


class Journal(contextlib.ExitStack):
    """A JSONL file that no other process writes to meanwhile, with every record synced as it comes.

    flag  what to change where another process has the file open;  of  what a line holds, in words
    Raises UserError there, and where the file cannot be written. Use it in a `with`.
    """

    def __init__(self, path: Path, *, flag: str, of: str) -> None:
        super().__init__()
        self.path, self.of = path, of
        try:
            self.enter_context(only_writer(path, flag=flag))
            path.touch(mode=0o600)
            self._lines = self.enter_context(Lines(path))
        except OSError as error:
            self.close()
            raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; it is on the disk when this returns, or the file is as it was before."""
        before = self.path.stat().st_size
        try:
            with held_signals():
                self._lines.append(record)
                self._lines.sync()
        except OSError as error:
            self._lines.cut(before)
            raise UserError(f"{self.path}: the {self.of} was not saved ({error.strerror}); the others are") from error


class LabelFile(Journal):
    """An open file of labels; `labels` are those in it, oldest first. Raises UserError where a line is not a label."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, flag="--output", of="label")
        try:
            self.labels = read_labels(path) if path.stat().st_size else []
        except BaseException:
            self.close()
            raise

    def append(self, label: Label) -> None:
        """Write a label."""
        self.write(label.record())
        self.labels.append(label)

    def pop(self) -> Label:
        """Take the last label out of the file again."""
        with held_signals():
            content = self.path.read_bytes()
            self._lines.cut(content.rstrip(b"\n").rfind(b"\n") + 1)
            self._lines.sync()
            return self.labels.pop()

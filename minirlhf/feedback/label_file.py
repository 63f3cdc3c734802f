"""The file that labels are written to while somebody labels: append, fsync, and nothing else, so a kill loses nothing.

Undo cuts the last line off. Both leave the file whole at every moment: a line that a crash tore is cut off when the
file is opened again, and a second process that would write to the same file is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Self

from minirlhf.feedback.labels import Label, read_labels
from minirlhf.runtime import UserError, held_signals


class LabelFile:
    """An open file of labels; `labels` are those in it, oldest first.

    Raises UserError where a line is not a label, where another process has the file open, or where it cannot be
    written. Use it in a `with`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from error
        try:
            self._lock()
            self._mend()
            self.labels = read_labels(path) if path.stat().st_size else []
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        import fcntl  # on Unix alone, like the terminal; reading labels needs neither

        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another process is labelling into it; give another --output") from error

    def _mend(self) -> None:
        """Finish or cut off a last line without its newline, which is what a crash in mid-write leaves."""
        content = self.path.read_bytes()
        whole, newline, torn = content.rpartition(b"\n")
        if not torn:
            return
        try:
            json.loads(torn)
        except ValueError:
            self._cut(len(whole + newline))
            print(f"{self.path}: cut off a last line that was not written whole")
        else:
            self._write(b"\n")

    def append(self, label: Label) -> None:
        """Write a label; it is on the disk when this returns."""
        before = os.fstat(self._descriptor).st_size
        line = json.dumps(label.record(), ensure_ascii=False) + "\n"
        with held_signals():
            try:
                self._write(line.encode())
            except OSError as error:
                self._cut(before)
                reason = f"the label was not saved ({error.strerror}); the others are"
                raise UserError(f"{self.path}: {reason}") from error
            self.labels.append(label)

    def pop(self) -> Label:
        """Take the last label out of the file again."""
        with held_signals():
            content = self.path.read_bytes()
            self._cut(content.rstrip(b"\n").rfind(b"\n") + 1)
            return self.labels.pop()

    def _write(self, content: bytes) -> None:
        while content:
            content = content[os.write(self._descriptor, content) :]
        os.fsync(self._descriptor)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let another process write to the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

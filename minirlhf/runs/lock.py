"""One process writes a folder at a time.

The lock is the operating system's, on a file beside the folder: it ends with the process, however that ends, so no lock
is ever stale. Outside Unix there is none.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from minirlhf.runtime import UserError, require


def require_writable(folder: Path, *, flag: str = "--run") -> None:
    """Raise UserError unless `folder` can be written, or made where it does not exist."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    require(there.is_dir(), f"{folder}: cannot be written, {there} is not a folder; give another {flag}")
    allowed = os.access(there, os.W_OK | os.X_OK)
    require(allowed, f"{folder}: cannot be written, {there} is read-only for you; give another {flag}")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process writes `folder`; raises UserError that names the process which does."""
    path = lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    number = _locked(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        os.close(number)


def require_unlocked(run: Path) -> None:
    """Raise UserError where a process writes a folder in `run`."""
    for path in run.glob(".*.lock"):
        with only_writer(run / path.name.removeprefix(".").removesuffix(".lock")):
            pass


def lock_file(folder: Path) -> Path:
    """The file beside `folder` that its writer holds."""
    return folder.absolute().with_name(f".{folder.absolute().name}.lock")


def _locked(path: Path, folder: Path) -> int:
    """The number of the open lock file, which holds this process's id."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _lock(number, folder)
            if path.exists() and os.path.samestat(os.fstat(number), path.stat()):  # else its last holder removed it
                os.truncate(number, 0)
                os.write(number, str(os.getpid()).encode())
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)


def _lock(number: int, folder: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl  # not on every system

    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(number, 20).decode("ascii", "replace") or "unknown"
        raise UserError(
            f"{folder}: process {holder} is writing there; wait until it has ended, or give another --run"
        ) from error

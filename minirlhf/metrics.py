"""One stage's run on disk: its configuration, its metrics row by row, its times; and its progress as it goes on.

`metrics.jsonl` holds no wall-clock values, so that equal runs have equal files; times and rates go to `timing.jsonl`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirlhf import processes, track
from minirlhf.progress import Progress

Value = float | int | Tensor
LOGS = ("metrics.jsonl", "timing.jsonl")
CHUNK = 1 << 20  # bytes read at a time


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


class RunLog:
    """The log of one stage: `run.json` at the start, then a row a step.

    folder  runs/<name>/<stage>; an earlier run there is moved aside, never overwritten
    config  the stage's configuration, a dataclass
    inputs  files whose hashes are kept, and models, by their weights
    keep    of a run that goes on: the bytes of each log to keep, by name; later rows are dropped
    done    rows among them
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        inputs: Sequence[Path | str] = (),
        models: Sequence[Path | str] = (),
        steps: int = 0,
        keep: Mapping[str, int] | None = None,
        done: int = 0,
    ) -> None:
        self.folder = folder
        self.started = self.last = time.perf_counter()
        description = {
            "config": {k: _plain(v) for k, v in dataclasses.asdict(config).items()},
            "inputs": {str(path): source_hash(path) for path in inputs},
            "models": {str(path): source_hash(path) for path in models},
            "versions": versions(),
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "processes": processes.world_size(),
            },
        }
        if keep is None:  # after the hashes: what is read may be in the folder that moves
            fresh_folder(folder)
            write_json(folder / "run.json", description)
        for name, size in (keep or {}).items():
            os.truncate(self.folder / name, size)
        self._metrics, self._timing = ((self.folder / name).open("a", encoding="utf-8") for name in LOGS)
        self._tracker = track.start(getattr(config, "track", None), folder, description["config"], done=done)
        self._progress = Progress(folder.name, steps=steps, done=done)

    def row(self, step: int, values: Mapping[str, Value], *, tokens: int) -> None:
        """Write the metrics of one finished step and the time since the last; `tokens` were processed in it."""
        plain = {k: float(v) for k, v in values.items()}
        self._metrics.write(json.dumps({"step": step, **plain}) + "\n")
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        rate = {"tokens_per_second": tokens / seconds}
        self._timing.write(json.dumps({"step": step, "seconds": seconds, **rate}) + "\n")
        if self._tracker:
            self._tracker.row(step, plain | rate)
        self._progress.update(plain, tokens=tokens)

    def say(self, text: str) -> None:
        """A line on standard error that leaves the progress as it is."""
        self._progress.say(text)

    def sync(self) -> dict[str, dict[str, Any]]:
        """Flush the rows to the disk; returns size and SHA-256 of each log."""
        for file in (self._metrics, self._timing):
            file.flush()
            os.fsync(file.fileno())
        paths = {name: self.folder / name for name in LOGS}
        return {name: {"size": path.stat().st_size, "sha256": file_hash(path)} for name, path in paths.items()}

    def close(self) -> float:
        """Close the files; returns the stage's seconds."""
        self._progress.close()
        if self._tracker:
            self._tracker.close()
        self._metrics.close()
        self._timing.close()
        return time.perf_counter() - self.started


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    try:
        own = metadata.version("minirlhf")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"python": platform.python_version(), "torch": torch.__version__, "minirlhf": own}


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value

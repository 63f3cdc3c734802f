"""One stage's run on disk: its configuration, its metrics row by row, its times, and a live line.

`metrics.jsonl` holds no wall-clock values, so that equal runs have equal files; times and rates go to `timing.jsonl`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Value = float | int | Tensor


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class RunLog:
    """The log of one stage: `run.json` at the start, then a row a step.

    folder  runs/<name>/<stage>; an earlier run there is moved aside, never overwritten
    config  the stage's configuration, a dataclass
    inputs  files whose hashes are kept
    """

    def __init__(self, folder: Path, config: Any, *, inputs: Sequence[Path] = (), steps: int = 0) -> None:
        self.folder = fresh_folder(folder)
        self.started = self.last = time.perf_counter()
        description = {
            "config": {k: _plain(v) for k, v in dataclasses.asdict(config).items()},
            "inputs": {str(path): file_hash(path) for path in inputs},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **_own_version()},
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        }
        write_json(self.folder / "run.json", description)
        self._metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._timing = (self.folder / "timing.jsonl").open("w", encoding="utf-8")
        self._bar = tqdm(total=steps, desc=folder.name, dynamic_ncols=True, mininterval=0.5, disable=None)

    def row(self, step: int, values: Mapping[str, Value], *, tokens: int) -> None:
        """Write the metrics of one finished step and the time since the last; `tokens` were processed in it."""
        plain = {k: float(v) for k, v in values.items()}
        self._metrics.write(json.dumps({"step": step, **plain}) + "\n")
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self._timing.write(json.dumps({"step": step, "seconds": seconds, "tokens_per_second": tokens / seconds}) + "\n")
        self._bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in list(plain.items())[:4]), refresh=False)
        self._bar.update(1)

    def close(self) -> float:
        """Close the files; returns the stage's seconds."""
        self._bar.close()
        self._metrics.close()
        self._timing.close()
        return time.perf_counter() - self.started


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _own_version() -> dict[str, str]:
    try:
        return {"minirlhf": metadata.version("minirlhf")}
    except metadata.PackageNotFoundError:
        return {"minirlhf": "not installed"}

"""One stage's run on disk: its configuration, its metrics row by row, its times; and its progress as it goes on.

`metrics.jsonl` holds no wall-clock values, so that equal runs have equal files; times and rates go to `timing.jsonl`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minirlhf import distributed
from minirlhf.config import TrackerName
from minirlhf.files import Lines, file_hash, fresh_folder, read_records, write_json
from minirlhf.runtime import require

LIVE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
SECONDS = 10.0  # between two plain lines, at least,
SHARE = 0.02  # and this share of the steps: a long run has at most fifty
SHOWN = 2  # metrics in a line, the first of a row


class Progress:
    """The progress of one stage.

    name   of the stage
    steps  of the whole stage; of a stage of one step there is nothing to say
    done   steps that an earlier process has finished
    """

    def __init__(self, name: str, *, steps: int, done: int = 0) -> None:
        self.name, self.steps, self.step = name, steps, done
        self.began = self.printed_at = time.perf_counter()
        self.first = self.printed = done
        self.tokens = 0
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=done, desc=name, bar_format=LIVE, dynamic_ncols=True, mininterval=0.5, disable=not live
        )

    def update(self, values: Mapping[str, float], *, tokens: int) -> None:
        """One more step is finished, with these metrics; `tokens` were processed in it."""
        now = time.perf_counter()
        self.step += 1
        self.tokens += tokens
        if not self.bar.disable:
            self.bar.set_postfix_str(self._describe(values, now), refresh=False)
            self.bar.update(1)
            return
        is_time = now - self.printed_at >= SECONDS and self.step - self.printed >= SHARE * self.steps
        if self.steps > 1 and (is_time or self.step == self.steps):
            left = tqdm.format_interval((self.steps - self.step) * (now - self.began) / (self.step - self.first))
            self.say(f"{self.name}: step {self.step} of {self.steps}, {self._describe(values, now)}, {left} left")
            self.printed, self.printed_at = self.step, now

    def _describe(self, values: Mapping[str, float], now: float) -> str:
        shown = [f"{name} {value:.4g}" for name, value in list(values.items())[:SHOWN]]
        return ", ".join([*shown, f"{self.tokens / (now - self.began):,.0f} tokens/s"])

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """End the live line."""
        self.bar.close()


TRACKED = "tracked"


def require_tracker(name: TrackerName | None) -> None:
    """Raise UserError where the tracker's package is missing."""
    specification = importlib.util.find_spec(name) if name else None
    # A folder of that name, such as wandb leaves behind, can be found too, and has no origin.
    there = name is None or (specification is not None and specification.origin is not None)
    require(there, f"--track {name}: this package is not installed; install it with `pip install {name}`")


def _start_tracker(name: TrackerName | None, folder: Path, config: Mapping[str, Any], *, done: int) -> Any:
    """The tracker of the stage, None without one; loaded by name, because a run without one needs none."""
    return importlib.import_module("minirlhf.runs.track").start(name, folder, config, done=done) if name else None


Value = float | int | Tensor
LOGS = ("metrics.jsonl", "timing.jsonl")


class RunLog:
    """The log of one stage: `run.json` at the start, then one row per step.

    folder  runs/<name>/<stage>; an earlier run there is moved aside, never overwritten
    config  the stage's configuration, a dataclass
    inputs  hashes of the files that the stage reads, by path, and of the models
    keep    of a run that goes on: the bytes of each log to keep, by name; later rows are dropped
    done    rows among them
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        inputs: Mapping[str, str] | None = None,
        models: Mapping[str, str] | None = None,
        steps: int = 0,
        keep: Mapping[str, int] | None = None,
        done: int = 0,
    ) -> None:
        self.folder = folder
        self.last = time.perf_counter()
        description = {
            "config": plain(dataclasses.asdict(config)),
            "inputs": inputs or {},
            "models": models or {},
            "versions": versions(),
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "processes": distributed.world_size(),
            },
        }
        if keep is None:
            fresh_folder(folder)
            write_json(folder / "run.json", description)
        self._metrics, self._timing = (Lines(folder / name, keep=(keep or {}).get(name)) for name in LOGS)
        self._tracker = _start_tracker(getattr(config, "track", None), folder, description["config"], done=done)
        self._progress = Progress(folder.name, steps=steps, done=done)

    def row(self, step: int, values: Mapping[str, Value], *, tokens: int) -> None:
        """Write the metrics of one finished step and the time since the last; `tokens` were processed in it."""
        plain = {k: float(v) for k, v in values.items()}
        self._metrics.append({"step": step, **plain})
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        rate = {"tokens_per_second": tokens / seconds}
        self._timing.append({"step": step, "seconds": seconds, **rate})
        if self._tracker:
            self._tracker.row(step, plain | rate)
        self._progress.update(plain, tokens=tokens)

    def say(self, text: str) -> None:
        """A line on standard error that leaves the progress as it is."""
        self._progress.say(text)

    def sync(self) -> dict[str, dict[str, Any]]:
        """Flush the rows to the disk; returns size and SHA-256 of each log."""
        files = (self._metrics, self._timing)
        return {file.path.name: {"size": file.sync(), "sha256": file_hash(file.path)} for file in files}

    def close(self) -> None:
        """Close the files."""
        self._progress.close()
        if self._tracker:
            self._tracker.close()
        self._metrics.close()
        self._timing.close()


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`."""
    return read_records(folder / "metrics.jsonl")


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    try:
        version = metadata.version("minirlhf")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {"python": platform.python_version(), "torch": torch.__version__, "minirlhf": version}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(config, default=str))

"""Metrics in a tracker beside `metrics.jsonl`, for those who use one: `--track tensorboard` or `--track wandb`.

    tensorboard --logdir runs/tiny          # all stages of the run
    wandb sync runs/tiny/*/tracked/wandb/offline-run-*

What a tracker writes stands in `<stage>/tracked/`. It is no result of the stage: it may be deleted at any time.
Weights & Biases stays offline unless WANDB_MODE says otherwise: no account is asked for and nothing leaves the machine.
A stage that is resumed is a second run there, of the same name, which begins where the first was saved.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from minirlhf.runtime import require

TrackerName = Literal["tensorboard", "wandb"]
FOLDER = "tracked"


class Tracker(Protocol):
    """Where the rows of a stage go."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a finished step."""

    def close(self) -> None:
        """Write what is left."""


def require_installed(name: TrackerName | None) -> None:
    """Raise UserError where the tracker's package is missing."""
    found = importlib.util.find_spec(name) if name else None
    # A folder of that name, such as wandb leaves behind, can be found too, and has no origin.
    there = name is None or (found is not None and found.origin is not None)
    require(there, f"--track {name}: this package is not installed; install it with `pip install {name}`")


def start(name: TrackerName | None, folder: Path, config: Mapping[str, Any], *, done: int) -> Tracker | None:
    """The tracker of the stage in `folder`, None without one. `done` steps stand in it from an earlier process."""
    if name is None:
        return None
    (folder / FOLDER).mkdir(exist_ok=True)
    return TensorBoard(folder, done) if name == "tensorboard" else WeightsAndBiases(folder, config)


class TensorBoard:
    """Event files that `tensorboard --logdir` shows; what follows step `done` is replaced."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / FOLDER), purge_step=done or None)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `minirlhf`, named after the run's folder and the stage."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project="minirlhf",
            name=f"{folder.absolute().parent.name}/{folder.name}",
            dir=str(folder / FOLDER),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()

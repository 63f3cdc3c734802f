"""Metrics in a tracker beside `metrics.jsonl`, for those who use one: `--track tensorboard` or `--track wandb`.

    tensorboard --logdir runs/tiny          # all stages of the run
    wandb sync runs/tiny/*/tracked/wandb/offline-run-*

What a tracker writes stands in `<stage>/tracked/`. It is no result of the stage: it may be deleted at any time.
Weights & Biases stays offline unless WANDB_MODE says otherwise: no account is asked for and nothing leaves the machine.
A stage that is resumed is a second run there, of the same name, which begins where the first was saved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from minirlhf.config import TrackerName
from minirlhf.runs.log import TRACKED


class Tracker(Protocol):
    """Receiver of a stage's rows."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a finished step."""

    def close(self) -> None:
        """Write what is left."""


def start(name: TrackerName, folder: Path, config: Mapping[str, Any], *, done: int) -> Tracker:
    """The tracker of the stage in `folder`; `done` steps stand in it from an earlier process."""
    (folder / TRACKED).mkdir(exist_ok=True)
    return TensorBoard(folder, done) if name == "tensorboard" else WeightsAndBiases(folder, config)


class TensorBoard:
    """Event files that `tensorboard --logdir` shows; what follows step `done` is replaced."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / TRACKED), purge_step=done or None)

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
            dir=str(folder / TRACKED),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()

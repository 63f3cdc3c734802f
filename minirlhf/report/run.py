"""What the folder of a run holds, as far as it has got: any stage, and any file of a stage, may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.evaluate.trace import FILE as TRACE
from minirlhf.files import read_json, read_records
from minirlhf.runs.health import read_hints
from minirlhf.runtime import require

Row = dict[str, Any]

# The kinds of stages in their order: title, and a number that it logs and no kind above it here. Folders may have any
# name, and one run may hold several of a kind.
KINDS = {
    "sft": ("SFT", "loss"),
    "feedback": ("Feedback", "agreement_with_judge"),
    "reward": ("Reward model", "accuracy"),
    "ppo": ("PPO", "clip_fraction"),
    "dpo": ("DPO", "reward_chosen"),
    "online-dpo": ("Online DPO", "ties"),
    "rejection": ("Rejection sampling", "score_best"),
}


@dataclass(frozen=True)
class StageRun:
    """One stage's folder.

    kind     one of KINDS, or "other"
    setup    run.json: configuration, inputs, models, versions, machine; empty where it is missing
    rows     of metrics.jsonl;  hints, trace  of the files of these names
    seconds  that its steps took, as far as timing.jsonl tells
    """

    name: str
    kind: str
    setup: Row
    rows: list[Row]
    hints: list[Row]
    trace: list[Row]
    seconds: float
    finished: bool

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric was logged as a finite number."""
        return [(row["step"], row[metric]) for row in self.rows if is_number(row.get(metric)) and "step" in row]

    def metrics(self) -> list[str]:
        """The names of its numbers, in the order in which they appear."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "step"]


@dataclass(frozen=True)
class Run:
    """One run.

    label     what it is called in the report
    seconds   seconds.json of the demo;  summary, answers  of the evaluation;  calibration  of the reward model
    """

    label: str
    stages: list[StageRun]
    seconds: dict[str, float]
    summary: Row
    answers: list[Row]
    calibration: Row

    @property
    def models(self) -> dict[str, Row]:
        """The evaluated models by name."""
        return self.summary.get("models", {})

    def of_kind(self, kind: str) -> list[StageRun]:
        """Its stages of a kind, the one with the usual name first."""
        return [stage for stage in self.stages if stage.kind == kind]


def is_number(value: object) -> bool:
    """A finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def kind_of(name: str, metrics: Iterable[str]) -> str:
    """The kind of the stage that logged these metrics, of a folder's name where there are none yet."""
    logged, usual = set(metrics), name if name in KINDS else "other"
    return next((kind for kind, (_, metric) in reversed(KINDS.items()) if metric in logged), usual)


def read_stage(folder: Path) -> StageRun:
    """A stage, finished or not."""
    rows = read_records(folder / "metrics.jsonl")
    return StageRun(
        name=folder.name,
        kind=kind_of(folder.name, (name for row in rows for name in row)),
        setup=read_json(folder / "run.json"),
        rows=rows,
        hints=read_hints(folder),
        trace=read_records(folder / TRACE),
        seconds=sum(row["seconds"] for row in read_records(folder / "timing.jsonl") if is_number(row.get("seconds"))),
        finished=read_json(folder / "stage.json").get("finished") is True,
    )


def read_run(folder: Path, label: str) -> Run:
    """A run; raises UserError where the folder holds none."""
    require(folder.is_dir(), f"{folder}: no such folder; give the folder of a run, as runs/tiny")
    parts = [path for path in folder.iterdir() if (path / "run.json").is_file() or (path / "metrics.jsonl").is_file()]
    stages = [read_stage(path) for path in parts]
    stages.sort(key=lambda stage: ([*KINDS, "other"].index(stage.kind), stage.name != stage.kind, stage.name))
    summary = read_json(folder / "summary.json")
    require(bool(stages or summary), f"{folder}: holds no stage of a run; give the folder above sft/, reward/, ppo/")
    return Run(
        label=label,
        stages=stages,
        seconds=read_json(folder / "seconds.json"),
        summary=summary,
        answers=read_records(folder / "answers.jsonl"),
        calibration=read_json(folder / "calibration.json"),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, each called by the end of its path that tells it from the others."""
    whole = [folder.resolve() for folder in folders]
    require(len(set(whole)) == len(whole), f"{folders[0]}: is given twice; name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return [read_run(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, whole, strict=True)]


def called(runs: Sequence[Run], run: Run, name: str, between: str = ": ") -> str:
    """A name within a run, with the run's label before it where there are several."""
    return name if len(runs) == 1 else f"{run.label}{between}{name}"


def labelled(runs: Sequence[Run], kind: str) -> list[tuple[str, Run, StageRun]]:
    """The stages of a kind, each with the shortest name that tells it from the others."""
    one_each = all(len(run.of_kind(kind)) < 2 for run in runs)
    label = (lambda run, stage: run.label) if one_each and len(runs) > 1 else lambda r, s: called(runs, r, s.name, "/")
    return [(label(run, stage), run, stage) for run in runs for stage in run.of_kind(kind)]

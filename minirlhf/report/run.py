"""Content of a run's folder, as far as it has got: any stage, and any file of a stage, may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minirlhf.evaluate.trace import FILE as TRACE
from minirlhf.files import read_json, read_records
from minirlhf.runs.health import HINTS
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


class StageRun:
    """One stage's folder.

    kind     one of KINDS, or "other"
    setup    run.json: configuration, inputs, models, versions, machine; empty where it is missing
    rows     of metrics.jsonl, and `metrics`, their names in order;  hints, trace  of the files of these names
    seconds  that its steps took, as far as timing.jsonl tells
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.setup = read_json(folder / "run.json")
        self.rows = read_records(folder / "metrics.jsonl")
        self.metrics = list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))
        self.kind = kind_of(self.name, self.metrics)
        self.hints = read_records(folder / HINTS)
        self.trace = read_records(folder / TRACE)
        times = read_records(folder / "timing.jsonl")
        self.seconds = sum(row["seconds"] for row in times if is_number(row.get("seconds")))
        self.finished = read_json(folder / "stage.json").get("finished") is True

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric was logged as a finite number."""
        return [(row["step"], row[metric]) for row in self.rows if is_number(row.get(metric)) and "step" in row]


class Run:
    """One run; UserError where the folder holds none.

    label    what it is called in the report; `prefix` stands before the names of its parts, where there are several
    seconds  seconds.json of the demo;  summary (its `models` by name), answers  of the evaluation
    """

    def __init__(self, folder: Path, label: str, prefix: str) -> None:
        require(folder.is_dir(), f"{folder}: no such folder; give the folder of a run, as runs/tiny")
        self.label, self.prefix = label, prefix
        logs = [*folder.glob("*/run.json"), *folder.glob("*/metrics.jsonl")]
        stages = [StageRun(path) for path in {log.parent for log in logs if log.is_file()}]
        order = [*KINDS, "other"]
        self.stages = sorted(stages, key=lambda stage: (order.index(stage.kind), stage.name != stage.kind, stage.name))
        self.summary = read_json(folder / "summary.json")
        empty = not stages and not self.summary
        require(not empty, f"{folder}: holds no stage of a run; give the folder above sft/, reward/, ppo/")
        self.models: dict[str, Row] = self.summary.get("models", {})
        self.seconds = read_json(folder / "seconds.json")
        self.answers = read_records(folder / "answers.jsonl")
        self.calibration = read_json(folder / "calibration.json")

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


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, each called by the end of its path that tells it from the others."""
    whole = [folder.resolve() for folder in folders]
    require(len(set(whole)) == len(whole), f"{folders[0]}: is given twice; name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    labels = ["/".join(path.parts[-depth:]) for path in whole]
    return [Run(f, label, f"{label}: " if len(whole) > 1 else "") for f, label in zip(folders, labels, strict=True)]


def labelled(runs: Sequence[Run], kind: str) -> list[tuple[str, Run, StageRun]]:
    """The stages of a kind, each with the shortest name that tells it from the others."""
    one_each = len(runs) > 1 and all(len(run.of_kind(kind)) < 2 for run in runs)
    stages = [(run, stage) for run in runs for stage in run.of_kind(kind)]
    return [(run.label if one_each else run.prefix + stage.name, run, stage) for run, stage in stages]

"""Many runs of one kind, each in a process of its own: what has a result is not run again.

A study (an ablation, a frontier) is a list of trials and one function that runs a trial in its folder and returns its
figures. An interrupted study goes on where it stopped: finished trials are read back, and a trial that was cut off
starts its function again, in the same folder, so that the stages in it can resume.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import project  # noqa: F401  first: it finds the package

from minirlhf.files import write_json
from minirlhf.runtime import require

RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """One run of a study: a name, unique and fit for a folder, and what tells it from the others (plain JSON)."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


Function = Callable[[Path, Mapping[str, Any]], Mapping[str, Any]]


def run_trials(
    function: Function, trials: Sequence[Trial], folder: Path, *, jobs: int = 1, minutes: float | None = None
) -> dict[str, dict[str, Any]]:
    """The figures of every trial that has some, by name, in the order of `trials`.

    function  (folder of the trial, its settings) -> figures, plain JSON; defined at the top of a module
    folder    of the study; a trial writes below `<folder>/<name>`, and its figures go to `result.json` there
    jobs      trials at a time, each in a process with one thread
    minutes   no trial is started after so many; those that run are finished
    A trial that fails is named with its error, and the others go on. Raises UserError where a result in the folder is
    of other settings, and at the end where trials failed.
    """
    known = {trial.name: read_result(folder, trial) for trial in trials}
    require(len(known) == len(trials), "trials: two have one name; give each its own")
    waiting = [trial for trial in trials if known[trial.name] is None]
    failed = _run(function, waiting, folder, known, jobs=jobs, minutes=minutes)
    left = [name for name, figures in known.items() if figures is None and name not in failed]
    if left:
        print(f"{folder}: {len(left)} of {len(trials)} trials are left; the same command goes on with them")
    require(not failed, f"{folder}: {', '.join(sorted(failed))} failed, see error.txt; the same command tries again")
    return {name: figures for name, figures in known.items() if figures is not None}


def read_result(folder: Path, trial: Trial) -> dict[str, Any] | None:
    """The figures of a finished trial, else None; UserError where they belong to other settings."""
    path = folder / trial.name / RESULT
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found["settings"] == json.loads(json.dumps(dict(trial.settings)))
    require(same, f"{path}: is the result of other settings; remove the folder, or give the study another")
    return found["figures"]


def _run(
    function: Function,
    waiting: list[Trial],
    folder: Path,
    known: dict[str, dict[str, Any] | None],
    *,
    jobs: int,
    minutes: float | None,
) -> set[str]:
    """Run the trials and fill `known`; returns the names of those that failed."""
    started, failed = time.perf_counter(), set()
    running: dict[Future, Trial] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        while waiting or running:
            if minutes is not None and time.perf_counter() - started > 60 * minutes:
                waiting = []
            while waiting and len(running) < jobs:
                trial = waiting.pop(0)
                running[pool.submit(_run_one, function, folder / trial.name, dict(trial.settings))] = trial
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                trial = running.pop(future)
                known[trial.name], seconds = future.result()
                if known[trial.name] is None:
                    failed.add(trial.name)
                print(f"{trial.name}: {'failed' if trial.name in failed else 'done'}, {seconds:.0f} s", flush=True)
    return failed


def _one_thread() -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that a trial may start
    torch.set_num_threads(1)


def _run_one(function: Function, folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Any] | None, float]:
    """In its own process: the figures of one trial, None where it failed, and its seconds."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    error = folder / "error.txt"
    try:
        figures = dict(function(folder, settings))
    except Exception:
        error.write_text(traceback.format_exc(), encoding="utf-8")
        return None, time.perf_counter() - started
    error.unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    partial = folder / f"{RESULT}.part"
    write_json(partial, {"settings": settings, "figures": figures, "seconds": round(seconds, 1)})
    partial.replace(folder / RESULT)
    return figures, seconds

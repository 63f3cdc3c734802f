"""What the tests of labelling share: candidates to compare, a session, and a process in a pseudo-terminal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from minirlhf.feedback.label_file import LabelFile
from minirlhf.feedback.labels import Candidates, read_candidates
from minirlhf.feedback.session import Session
from minirlhf.feedback.tasks import TaskConfig, make_tasks
from minirlhf.files import write_records


def benchmark(name: str, folder: str = "benchmarks") -> ModuleType:
    """A script of benchmarks/ or studies/ as a module."""
    path = Path(__file__).parent.parent / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def write_candidates(path: Path, prompts: int, count: int = 2) -> list[Candidates]:
    """A file of `count` answers to each of so many prompts."""
    write_records(
        path,
        [
            {
                "prompt": f"\n\nHuman: Question {i}?\n\nAssistant:",
                "responses": [f" Answer {i}.{k}" for k in range(count)],
                "response_ids": [[i, k, 9] for k in range(count)],
                "sources": [f"model@{k}" for k in range(count)],
            }
            for i in range(prompts)
        ],
    )
    return read_candidates(path)


class Clock:
    """A clock that goes on by two seconds whenever it is read."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 2.0
        return self.time


def session_on(
    folder: Path, *, prompts: int = 4, count: int = 2, labeller: str = "anna", repeats: float = 0.0
) -> Session:
    """A session on a file of labels that stays open; the candidates are made where there are none yet."""
    file = folder / "candidates.jsonl"
    if not file.exists():
        write_candidates(file, prompts, count)
    mode = "pairs" if count == 2 else "rankings"
    tasks = make_tasks(TaskConfig(candidates=file), labeller, mode=mode, repeat_share=repeats)
    return Session(tasks, LabelFile(folder / "labels.jsonl"), labeller=labeller, clock=Clock())

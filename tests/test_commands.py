"""Every command line of README and pages does what it says: run in this process, page by page, at a small size.

The commands of a page run in its order in one folder, which holds a finished tiny run as runs/tiny and the files that
the page speaks of. Settings that only make a run longer get small defaults; flags of the command stay as they are. What
cannot run here (the network, a server, keys, 124M parameters) is read by the same code up to its checks,
and what is run elsewhere is listed with the place.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pytest
import tiny
from pyarrow import parquet

from minirlhf import config
from minirlhf.config import run_script
from minirlhf.files import write_records

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md")]
PAGES += [ROOT / "CONTRIBUTING.md"]
PAGES += [page for folder in ("studies", "benchmarks") for page in sorted((ROOT / folder).glob("*.md"))]
PROGRAMS = ("python", "python3", "torchrun", "make", ".venv/bin/python", ".venv/bin/pip")
# Settings that make a run long, and what they are here; those that a command gives keep its value.
SMALL = {
    **{"epochs": 0.5, "iterations": 1, "rollout_size": 8, "minibatches": 1, "batch_size": 8, "group_size": 1},
    **{"max_prompts": 200, "max_items": 60, "reference_samples": 4, "max_new_tokens": 16, "n_layer": 1, "n_head": 2},
    **{"candidates": 2, "n_embd": 32, "trace_prompts": 4, "n": 2, "validation_share": 0.3},
}
ELSEWHERE = {  # the first words of a command, and where it is run
    "make": ".ci/run",
    "python3 -m venv": ".ci/run",
    ".venv/bin/pip install": ".ci/run",
    ".venv/bin/python -m pytest": ".ci/run",
    ".venv/bin/python -m minirlhf": ".ci/run, by its other name",
    "python -m pytest": ".ci/run",
    "python -m minirlhf --resume": "tests/test_resume.py",
    "python train_ppo.py --resume": "tests/test_resume.py",
    "torchrun": "tests/test_processes.py",
}
READ_ONLY = {  # what cannot run here: it is read up to its checks
    "the network": r"Anthropic/|trl-lib/|stanfordnlp/|owner/name",
    "124M parameters": r"--preset gpt2|runs/imdb|runs/hh|runs/tldr",
    "a server": r"--by endpoint|--page|real-endpoint",
    "a judge that was trained before": r"judge-model",
    "a run that takes minutes": r"studies/ablate\.py|runs/polite|runs/gsm8k|runs/arithmetic --",
}
WITH_SETTINGS = "studies/ablate.py"  # the one study whose flags are those of a Config, and can be read as others are

REAL = r"MINIRLHF_REAL_DATA|/real-|polite-instructions|gsm8k"  # what reads data that is not part of the project
# Labels by hand are given by the simulated people in their place, who tell apart even bad answers by their length.
BY_HAND = "python -m minirlhf.feedback label"
SIMULATED = ["--by", "simulated", "--length-bias", "0.01", "--output", "runs/tiny/labels/labels.jsonl"]


class Command(NamedTuple):
    """A command of a page: where it stands, its environment, its words, and its exit code.

    A page that shows a mistake shows its error right below: there the code is 2.
    """

    place: str
    environment: dict[str, str]
    words: list[str]
    code: int

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def code_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line of a code block that is not Python's; lines that end with a backslash joined."""
    fence, number, joined = None, 0, ""
    for n, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fence = line[3:] or "text" if fence is None else None
        elif (fence is not None and fence != "python") or (fence is None and (line.startswith("    ") or joined)):
            number = number if joined else n
            joined += line.strip()
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            yield number, joined
        joined = ""


def commands(page: Path) -> list[Command]:
    """The commands of a page, without a shell's prompt and comments."""
    found = []
    lines = list(code_lines(page))
    for (number, line), (_, below) in itertools.pairwise([*lines, (0, "")]):
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:
            continue  # an apostrophe of a text
        settings = list(itertools.takewhile(lambda w: re.fullmatch(r"[A-Z_]+=.*", w), words))
        words = words[len(settings) :]
        if words and words[0] in PROGRAMS and len(words) > 1:
            code = 2 if below.startswith("error: ") else 0
            found.append(Command(f"{page.name}:{number}", dict(s.split("=", 1) for s in settings), words, code))
    return found


def write_files(folder: Path) -> None:
    """The files that the pages speak of, each in its form, from the embedded world's answers."""
    pairs = [
        {"prompt": p, "chosen": f" {a}", "rejected": f" {b}"}
        for p, a, b in ((p, f"It is {i}.", f"I do not know {i}.") for i, p in enumerate(tiny.PROMPTS * 2))
    ]
    for name in ("pairs.jsonl", "FILE", "imdb-pairs.jsonl"):
        write_records(folder / name, pairs)
    write_records(folder / "imdb-prompts.jsonl", [{"prompt": r["prompt"]} for r in pairs])
    alpaca = [{"instruction": r["prompt"], "input": "", "output": r["chosen"]} for r in pairs]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    with gzip.open(folder / "hh.jsonl.gz", "wt") as file:
        for r in pairs:
            start = f"\n\nHuman: {r['prompt']}\n\nAssistant:"
            file.write(json.dumps({side: start + r[side] for side in ("chosen", "rejected")}) + "\n")
    tasks = [
        {
            "id": i,
            "data": {"prompt": r["prompt"], "answer1": r["chosen"], "answer2": r["rejected"]},
            "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "left"}}], "was_cancelled": False}],
        }
        for i, r in enumerate(pairs)
    ]
    (folder / "label-studio-export.json").write_text(json.dumps(tasks))
    table = pyarrow.table({"query": [r["prompt"] for r in pairs], "reply": [r["chosen"] for r in pairs]})
    parquet.write_table(table, folder / "data.parquet")


def write_python_files(page: Path, folder: Path) -> None:
    """The files that a page shows: its blocks of Python whose first line is a comment with the file's name."""
    for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        (folder / name).write_text(text, encoding="utf-8")


def smaller(preset: Any) -> Any:
    """A preset with the small settings, as far as it has them."""
    known = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)}
    numbers = {name: value for name, value in known.items() if isinstance(value, int | float) and name in SMALL}
    return dataclasses.replace(preset, **{name: type(value)(SMALL[name]) or 1 for name, value in numbers.items()})


def run(command: Command, patch: pytest.MonkeyPatch, *, read_only: bool) -> None:
    """The command in this process, with small defaults; `read_only` stops behind the reading of its settings."""
    original = run_script

    def small(main: Callable, presets: dict[str, Any], *, several: bool = False) -> None:
        presets = {name: smaller(preset) for name, preset in presets.items()}
        original((lambda config: read.append(config)) if read_only else main, presets, several=several)

    read: list[Any] = []
    code = 0
    for name, value in command.environment.items():
        patch.setenv(name, value)
    arguments = [os.path.expandvars(word) for word in command.words[1:]]
    patch.setattr(config, "run_script", small)
    patch.setattr(sys, "stdin", io.StringIO("What does the lion eat?\n/quit\n"))
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("minirlhf")}
    try:
        if arguments[0] == "-m":
            patch.setattr(sys, "argv", arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            patch.setattr(sys, "argv", arguments)
            patch.syspath_prepend((ROOT / arguments[0]).parent)
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.modules.update(loaded)
    assert code == command.code, f"{command.place}: {command.text} ended with {code}"
    assert bool(read) == read_only


def benchmark_flags(command: Command) -> None:
    """A benchmark or a study takes minutes: that it exists and knows the flags is all that is looked at."""
    folder = (ROOT / command.words[1]).parent
    known = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert (ROOT / command.words[1]).is_file(), command.place
    for flag in (word.partition("=")[0] for word in command.words if word.startswith("--")):
        assert f'"{flag}"' in known, f"{command.place}: {flag}"


def test_commands_are_found() -> None:
    """Fenced and indented, with a prompt or without, continued lines whole, comments left out."""
    readme, feedback = (commands(page) for page in (ROOT / "README.md", ROOT / "docs" / "feedback.md"))
    texts = [command.text for command in readme]
    assert "python train_sft.py --train alpaca.json" in texts
    assert any(command.text == "python -m minirlhf.feedback collect" for command in feedback)
    assert not any(word in ("\\", "#", "$") for page in PAGES for command in commands(page) for word in command.words)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # a module that runs as a script here
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "a", "b"):
        shutil.copytree(tiny.finished_run(), tmp_path / "runs" / name)
    write_files(tmp_path)
    write_python_files(page, tmp_path)
    real = os.environ.get("MINIRLHF_REAL_DATA")
    if real:
        for file in ("preference/polite-instructions.json", "sft/gsm8k.train.jsonl.gz"):
            shutil.copy(Path(real) / file, tmp_path)
    for command in commands(page):
        text = command.text
        if any(text.startswith(words) for words in ELSEWHERE):
            continue
        if command.words[1].startswith(("benchmarks/", "studies/")) and command.words[1] != WITH_SETTINGS:
            benchmark_flags(command)
            continue
        if not real and re.search(REAL, text):
            continue
        if text == BY_HAND:
            command.words.extend(SIMULATED)
        with monkeypatch.context() as patch:
            run(command, patch, read_only=any(re.search(why, text) for why in READ_ONLY.values()))

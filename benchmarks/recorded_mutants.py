"""Mutants recorded by their text: what the tests notice before a restructuring, they must notice after it.

    python -m pytest --cov --cov-context=test --cov-report= --junitxml=junit.xml      # which test runs which line
    python benchmarks/recorded_mutants.py record RECORD.json --coverage .coverage --junit junit.xml
    python benchmarks/recorded_mutants.py retry RECORD.json --output retried.json     # in the tree of this script

`record` takes 200 one-line mutations of all modules but the maths (`draw_mutants.py`; `mutate.py` covers the maths in
full). A mutant is written into a copy of the tree, and a forked process runs the tests that ran this line, those called
as its module first and then the quickest, and after them whole test files by their names. The first test that fails is
noted. Started again, `record` goes on where it stopped.

`retry` looks for the old text in all code of the present tree, whatever the file and the indentation, puts the new text
there, and runs the recorded test, found by its name. Where that test is gone or passes, test files by name are run.
Where the text has vanished, `--successors FILE` gives the like mutant in the code that took its place, by its number:
`old` and `new`, and `tests` to begin with where no file of tests has the module's name.
A test that fails on the unchanged tree kills nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from draw_mutants import ROOT, SEED, code, draw, places  # noqa: E402

LIBRARIES = """numpy pyarrow.parquet transformers datasets tyro tiktoken safetensors.torch regex einops sympy
huggingface_hub matplotlib.pyplot torch._dynamo torch.distributed.fsdp torch.export torch.onnx"""
ONE_TEST, ALL_TESTS = 20, 60  # seconds: CPU time of one test, and time of one mutant
WIDER = ["scripts", "stages", "resume", "bad_commands", "bad_input", "settings", "one_flag", "docs"]


# ------------------------------------------------------------------------------------------------ finding the text
def find(sources: dict[Path, list[str]], mutant: dict) -> tuple[Path, int, str] | None:
    """File, line and new line of a mutant; its neighbours may have gone if the line itself is unique."""
    old, new = mutant["old"].split("\n"), mutant["new"].split("\n")
    at = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    for text, inside in ((old, at), ([old[at]], 0)):
        found = places(sources, text)
        if len(found) == 1:
            return found[0][0], found[0][1] + inside, new[at]
    return None


# ---------------------------------------------------------------------------------------------------------------- tests
class Watch:
    """Notes each test that begins, and those that fail; skips what was run before; ends a run that takes too long."""

    def __init__(self, notes: Path, skip: set[str], deadline: float) -> None:
        self.notes, self.skip, self.deadline = notes.open("a", buffering=1), skip, deadline

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.skip]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if time.monotonic() > self.deadline:
            pytest.exit("enough", returncode=0)
        print("begun", nodeid, file=self.notes)
        signal.setitimer(signal.ITIMER_PROF, ONE_TEST)  # either ends the process
        signal.alarm(8 * ONE_TEST)

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            print("failed", report.nodeid, file=self.notes)

    pytest_collectreport = pytest_runtest_logreport


def run(folder: Path, tests: list[str], skip: set[str], deadline: float, *options: str) -> tuple[list[str], set[str]]:
    """The tests that began in a fork of this process, and those that failed or ended the process."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        notes, child = Path(temporary) / "notes", os.fork()
        if child == 0:
            os.setsid()
            os.chdir(folder)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os.environ |= {"PYTHONPATH": str(folder), "TMPDIR": temporary}
            tempfile.tempdir = temporary
            sys.path.insert(0, str(folder))
            sys.dont_write_bytecode = "--collect-only" not in options
            arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:cov", *options, *tests]
            os._exit(int(pytest.main(arguments, plugins=[Watch(notes, skip, deadline)])))
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) not in range(6)  # not ended by pytest
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what its tests have started
        lines = [line.split(" ", 1) for line in notes.read_text().splitlines()] if notes.exists() else []
    begun, failed = ([test for kind, test in lines if kind == wanted] for wanted in ("begun", "failed"))
    return begun, {*failed, *(begun[-1:] if killed else [])}


def likely(path: Path) -> list[list[str]]:
    """Test files by name: those called as the module, those called as its folder or importing it, those of stages."""
    house = path.parent.name if path.parent.name not in ("minirlhf", ROOT.name) else "main"
    stem = house if path.stem.startswith("__") else path.stem.removeprefix("train_")
    tests, importing = sorted((ROOT / "tests").rglob("test_*.py")), rf"import.*\b(train_)?{stem}\b|\.{stem} import"
    near = [test for test in tests if house in test.stem or re.search(importing, test.read_text("utf-8"))]
    wider = [test for name in WIDER for test in tests if test.stem == f"test_{name}"]
    groups = [test for test in tests if stem in test.stem], near, wider
    return [[test.relative_to(ROOT).as_posix() for test in group] for group in groups]


def recorded(test: str) -> list[list[str]]:
    """The recorded test wherever it stands now: with its parameters, or with all where those are others."""
    name, bracket, parameters = test.split("::")[-1].partition("[")
    files = [f for f in sorted((ROOT / "tests").rglob("*.py")) if re.search(rf"^def {name}\(", f.read_text(), re.M)]
    found = [f"{file.relative_to(ROOT).as_posix()}::{name}" for file in files]
    return [[test + bracket + parameters for test in found], found]


def killer(folder: Path, groups: list[list[str]], broken: set[str]) -> str:
    """The first test that fails, or "survived"; the groups of tests are tried in their order."""
    skip, deadline = set(broken), time.monotonic() + ALL_TESTS
    for tests in filter(None, groups):
        begun, failed = run(folder, tests, skip, deadline, "-x")
        if failed:
            return begun[-1] if begun else tests[0]  # none began where a module could not be imported
        skip |= set(begun)
    return "survived"


def measured(coverage_file: Path, junit: Path, mutants: list[dict]) -> dict[int, list[list[str]]]:
    """The tests that ran each mutant's line, by its number: those called as its module first, then the quickest."""
    import coverage

    data, seconds, found = coverage.CoverageData(str(coverage_file)), {}, {}
    data.read()
    for case in ElementTree.parse(junit).iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            seconds[f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"] = float(case.get("time"))
    for mutant in mutants:
        stem = Path(mutant["module"]).stem.removeprefix("train_")
        contexts = data.contexts_by_lineno(str(ROOT / mutant["module"])).get(mutant["line"], [])
        tests = [test for test in {c.split("|")[0] for c in contexts} if seconds.get(test, ONE_TEST) < ONE_TEST]
        tests.sort(key=lambda test: (stem not in test.split("::")[0], seconds[test], test))
        found[mutant["number"]] = [tests[:40], tests[40:200]]
    return found


# ---------------------------------------------------------------------------------------------------------------- verbs
def try_all(
    mutants: list[dict], first_tests: dict[int, list[list[str]]], successors: dict[str, dict], write: Callable[[], None]
) -> None:
    """Give each mutant its `killed_by`. Where that test fails on the unchanged tree too, the mutant runs without it."""
    broken: set[str] = set()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve() / "tree"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv", ".hypothesis"))
        run(folder, ["tests"], set(), math.inf, "--collect-only")  # the bytecode of all modules and tests, once
        waiting = [mutant for mutant in mutants if "killed_by" not in mutant]
        random.Random(SEED).shuffle(waiting)  # a record that is cut off is of all modules too
        while waiting:
            sources = code(ROOT)
            for mutant in waiting:
                mutant["killed_by"] = "text vanished"
                successor = successors.get(str(mutant["number"]), {})
                place = find(sources, mutant)
                if place is None and successor:
                    mutant["successor"], place = successor, find(sources, successor)
                if place:
                    path, at, line = place
                    target, lines = folder / path.relative_to(ROOT), path.read_text("utf-8").splitlines(keepends=True)
                    lines[at] = lines[at][: len(lines[at]) - len(lines[at].lstrip())] + line + "\n"
                    target.write_text("".join(lines), encoding="utf-8")
                    groups = [successor.get("tests", []), *first_tests[mutant["number"]], *likely(path)]
                    mutant["killed_by"] = killer(folder, groups, broken)
                    shutil.copy2(path, target)  # with its time, so that its bytecode is valid again
                print(f"{mutant['number']:3}  {mutant['killed_by']}", flush=True)
                write()
            killers = {mutant["killed_by"] for mutant in mutants} - {"survived", "text vanished"} - broken
            begun, failed = run(folder, sorted(killers), set(), math.inf) if killers else ([], set())
            print(f"{len(begun)} of {len(killers)} tests ran on the unchanged tree, {len(failed)} failed", flush=True)
            broken |= failed  # a time-out ends this run, and its mutant gives another: so all killers are seen to pass
            waiting = [mutant for mutant in mutants if mutant["killed_by"] in failed]


def write_record(path: Path, head: dict, mutants: list[dict]) -> None:
    """JSON with one mutant a line."""
    rows = ",\n".join(json.dumps(mutant, ensure_ascii=False) for mutant in mutants)
    path.write_text(f'{json.dumps(head)[:-1]}, "mutants": [\n{rows}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["record", "retry"])
    parser.add_argument("record", type=Path, help="the file to write (record; it goes on where it stopped) or to read")
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage", help="for record")
    parser.add_argument("--junit", type=Path, default=ROOT / "junit.xml", help="for record")
    parser.add_argument("--sample", type=int, help="retry only so many of the killed ones, drawn at random")
    parser.add_argument("--successors", type=Path, help="mutants in place of those whose text has vanished, for retry")
    parser.add_argument("--output", type=Path, default=os.devnull, help="where retry writes its result")
    arguments = parser.parse_args()
    for library in LIBRARIES.split():  # once, not in every fork
        importlib.import_module(library)
    hypothesis.settings.register_profile("mutate", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutate")
    torch.set_num_threads(1)
    head = {"python": platform.python_version(), "torch": torch.__version__, "seed": SEED}
    mutants = json.loads(arguments.record.read_text("utf-8"))["mutants"] if arguments.record.exists() else draw()
    if arguments.verb == "record":
        tests = measured(arguments.coverage, arguments.junit, mutants)
        output = arguments.record
    else:
        if arguments.sample:
            mutants = random.Random(SEED).sample([m for m in mutants if "tests" in m["killed_by"]], arguments.sample)
        mutants = [{**m, "recorded": m["killed_by"]} for m in mutants]
        tests, output = {m["number"]: recorded(m.pop("killed_by")) for m in mutants}, arguments.output
    successors = json.loads(arguments.successors.read_text("utf-8")) if arguments.successors else {}
    try_all(mutants, tests, successors, lambda: write_record(output, head, mutants))
    if arguments.verb == "retry":
        print("\n| mutant | module | recorded | now |\n| --- | --- | --- | --- |")
        print("\n".join(f"| {m['number']} | `{m['module']}` | {m['recorded']} | {m['killed_by']} |" for m in mutants))
    alive, gone = (sum(m["killed_by"] == end for m in mutants) for end in ("survived", "text vanished"))
    print(f"\n{len(mutants)} mutants: {len(mutants) - alive - gone} killed, {alive} survived, {gone} texts vanished")


if __name__ == "__main__":
    main()

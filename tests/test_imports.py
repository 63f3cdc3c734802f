"""The house has floors, and imports point down: parsed from the source, so that nothing has to run."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minirlhf"

# From the ground up. What stands on one floor may import its neighbours and everything below.
FLOORS = [
    {"ops", "world", "kv_cache", "distributed"},
    {"ppo", "dpo", "bradley_terry", "grpo"},
    {"runtime"},
    {"config", "files", "tokenizer", "hf", "optim", "batch"},
    {"model"},
    {"comparisons", "generate"},
    {"encode", "reward"},
    {"data", "runs"},
    {"reward_functions", "rollout"},
    {"evaluate"},  # its judges label, too
    {"feedback"},
    {"report", "rejection"},
    {"chat", "online_dpo"},
    {"train_sft", "train_reward", "train_ppo", "train_dpo"},
    {"__main__"},
]
MATHS = {"ops": set(), "ppo": {"ops"}, "dpo": {"ops"}, "bradley_terry": {"ops"}, "grpo": {"ops"}}
# What no script needs before it is asked for: the wings behind the algorithm, and packages that take long to import.
NOT_LOADED = {"minirlhf.world", "minirlhf.feedback", "minirlhf.evaluate", "minirlhf.report"}
SLOW = {"datasets", "pandas", "matplotlib", "huggingface_hub", "transformers", "pyarrow"}


def sources() -> dict[str, list[Path]]:
    """The files of every noun of the package and of every script, by name."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    found |= {path.name: sorted(path.rglob("*.py")) for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    return found | {path.stem: [path] for path in ROOT.glob("train_*.py")}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, also inside functions; relative imports are made absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def nouns(name: str) -> set[str]:
    """The nouns of the house that a module imports, itself left out."""
    found = set()
    for full in set().union(*map(imported, sources()[name])):
        parts = full.split(".")
        if parts[0] == "minirlhf" and len(parts) > 1:
            found.add(parts[1])
        elif parts[0].startswith("train_"):
            found.add(parts[0])
    return found & {n for floor in FLOORS for n in floor} - {name}


def floor_of(name: str) -> int:
    return next(level for level, floor in enumerate(FLOORS) if name in floor)


def test_every_module_has_a_floor():
    assert sources().keys() <= {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize("name", sorted(sources()))
def test_imports_point_down(name):
    upwards = {other for other in nouns(name) if floor_of(other) > floor_of(name)}
    assert not upwards, f"{name} imports {sorted(upwards)}, which stand above it"


def test_neighbours_do_not_import_each_other():
    for floor in FLOORS:
        for name in floor & sources().keys():
            assert not [other for other in nouns(name) & floor if name in nouns(other)]


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_imports_torch_and_ops_and_nothing_else(name):
    (path,) = sources()[name]
    roots = {full.split(".")[0] for full in imported(path)}
    assert roots <= {"torch", "math", "dataclasses", "minirlhf"}
    assert {full for full in imported(path) if full.startswith("minirlhf")} <= {f"minirlhf.{n}" for n in MATHS[name]}


def test_the_world_imports_the_standard_library_and_itself():
    for path in sources().get("world", []):
        for full in imported(path):
            root = full.split(".")[0]
            assert root in sys.stdlib_module_names or full.startswith("minirlhf.world"), f"{path.name}: {full}"


SCRIPTS = ("train_sft", "train_reward", "train_ppo", "train_dpo")
# Prints what each script loads, in a process of its own; only torch, which all need, is loaded once.
LOADS = """
import importlib, json, os, sys, torch
for script in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(script)
        print(json.dumps([script, sorted(sys.modules)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def modules() -> dict[str, list[str]]:
    """The names in `sys.modules` after the import of each script."""
    environment, command = {**os.environ, "PYTHONPATH": str(ROOT)}, [sys.executable, "-c", LOADS, *SCRIPTS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_loads_no_judge_and_nothing_slow(script, modules):
    """What a static reading finds is what Python loads, too."""
    loaded = modules[script]
    own = {name for name in loaded if name.split(".")[0] == "minirlhf" or name.startswith("train_")}
    assert own == closure(script)
    assert not [name for name in own if any(f"{name}.".startswith(f"{wing}.") for wing in NOT_LOADED)]
    assert not SLOW & {name.split(".")[0] for name in loaded}


def closure(script: str) -> set[str]:
    """All modules of the project that a script imports, directly or not."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    files[script] = ROOT / f"{script}.py"
    found, todo = set(), [script]
    while todo:
        name = todo.pop()
        if name in files and name not in found:
            found.add(name)
            parts = [full.split(".") for full in imported(files[name])]
            todo += [".".join(part[:k]) for part in parts for k in range(1, len(part) + 1)]
    return found

"""The house has floors, and imports point down: parsed from the source, so that nothing has to run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minirlhf"

# From the ground up. What stands on one floor may import its neighbours and everything below.
FLOORS = [
    {"ops", "world", "attention", "kv_cache"},
    {"ppo", "dpo", "bradley_terry", "advantages"},
    {"processes"},
    {"memory", "metrics", "runtime", "settings", "progress", "track", "hints", "healthy"},
    {"bootstrap", "win_rate", "diversity", "words", "proxy"},
    {"hub", "model_card", "ablation_report"},
    {"hf_folder"},
    {"model"},
    {"reward"},
    {"optim", "ensemble"},
    {"checkpoint"},
    {"stage"},
    {"data", "tokenizer"},
    {"decoder"},
    {"generate", "dry_run"},
    {"rewards"},
    {"rollout", "objective", "environment"},
    {"experience"},
    {"ppo_update"},
    {"feedback"},
    {"judges", "comparison", "comparison_table"},
    {"evaluate", "report", "calibration", "rejection", "chat", "dialogue", "trials", "trace"},
    {"train_sft", "train_reward", "train_ppo", "train_dpo"},
    {"__main__", "ablate", "online_dpo"},
]
MATHS = {"ops": set(), "ppo": {"ops"}, "dpo": {"ops"}, "bradley_terry": {"ops"}, "advantages": {"ops"}}


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

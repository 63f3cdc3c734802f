"""What the benchmarks on real data share: where the data lie, a vocabulary for them, and what a result must carry."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import project  # noqa: F401  first: it finds the package
import torch

from minirlhf.runtime import project_file

sys.path.insert(0, str(project_file()))
import train_vocabulary  # a script of data/, not a module of the package


def data_folder() -> Path:
    """The folder of real data, from MINIRLHF_REAL_DATA; ends the program where it is unset or not there."""
    folder = os.environ.get("MINIRLHF_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        print("skipped: MINIRLHF_REAL_DATA must name the folder of real data (README, Tests against real files)")
        raise SystemExit(0)
    return Path(folder)


def vocabulary(texts: Iterable[str], size: int, folder: Path) -> Path:
    """A byte-level BPE vocabulary of at most `size` tokens trained on the texts; one made earlier is kept."""
    if not (folder / "vocab.bpe").exists():
        train_vocabulary.write(train_vocabulary.train(texts, size), folder)
    return folder


def circumstances(**settings: object) -> dict[str, object]:
    """What a committed figure must say about its run: command, settings, hardware, versions."""
    packages = ("torch", "numpy", "transformers", "trl", "vaderSentiment")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *map(str, [Path(sys.argv[0]).as_posix(), *sys.argv[1:]])]),
        **settings,
        "python": platform.python_version(),
        **versions,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def begin(work: Path, settings: Mapping[str, object]) -> None:
    """Make the folder of a run, or go on in one that was made with the same settings; ends the program otherwise."""
    path, text = work / "settings.json", json.dumps(settings, indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{work}: was made with other settings; use another --work, or remove the folder")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stage_seconds(work: Path) -> dict[str, float]:
    """Seconds that the training steps of each stage under a folder took, whenever they ran, by the stages' own logs."""
    logs = sorted(work.rglob("timing.jsonl"))
    steps = {log.parent: [json.loads(line)["seconds"] for line in log.read_text().splitlines()] for log in logs}
    return {folder.relative_to(work).as_posix(): round(sum(seconds), 1) for folder, seconds in steps.items()}


def heading(known: Mapping[str, object], work: Path) -> str:
    """One paragraph over a table of results: the circumstances, and how long the stages trained."""
    facts = "; ".join(f"{name} {value}" for name, value in known.items() if name not in ("command", "settings"))
    seconds = stage_seconds(work)
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    settings = f" Settings: {known['settings']}." if "settings" in known else ""
    total = f"Training seconds (wall): {stages}; {sum(seconds.values()):.0f} in all."
    return f"`{known['command']}`; {facts}.{settings} {total}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

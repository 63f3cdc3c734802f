"""What the benchmarks on real data share: where the data lie, a vocabulary for them, and what a result must carry."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

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


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""stage.json in a stage's folder: whether the stage is finished, and then what it made and from what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minirlhf import track
from minirlhf.checkpoint.manifest import plain, read_json
from minirlhf.checkpoint.store import write_atomically
from minirlhf.metrics import file_hash
from minirlhf.runtime import require

MARKER = "stage.json"


def read_marker(folder: Path) -> dict[str, Any]:
    """What the marker in `folder` says; empty where there is none."""
    path = folder / MARKER
    marker = read_json(path) if path.exists() else {}
    require(isinstance(marker, dict), f"{path}: not a JSON object; remove it")
    return marker


def mark_begun(folder: Path) -> None:
    """Say that the stage in `folder` has begun and is not finished."""
    write_atomically(folder / MARKER, json.dumps({"finished": False}))


def mark_finished(folder: Path, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Say that it is finished, with the hashes of all that it made; goes last of all."""
    marker = {
        "finished": True,
        "config": {name: plain(value) for name, value in config.items()},
        "inputs": dict(inputs),
        "outputs": outputs(folder),
    }
    write_atomically(folder / MARKER, json.dumps(marker, indent=1))


def clear_begun(folder: Path, *, logs: set[str], results: set[str]) -> None:
    """Delete a folder that a killed process had begun; one that holds anything else is left to be moved aside.

    logs, results  names of what a stage may have written by then; results only where the marker says so
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".saving-")}
    begun = {"run.json", MARKER, "checkpoints", track.FOLDER, *logs}
    if results and read_marker(folder).get("finished") is False:
        begun |= results
    if names <= begun:
        shutil.rmtree(folder)


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of the files that a stage has made, by name; the checkpoints have their own, a tracker's files none."""
    made = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    apart = {folder / "checkpoints", folder / track.FOLDER}
    made = [path for path in made if not apart & set(path.parents) and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in made}

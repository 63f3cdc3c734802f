"""What a checkpoint says of itself, and whether it is true.

The manifest vouches for every file by size and SHA-256, and for itself by a SHA-256 over its content. Nothing is opened
but the files of fixed names in the checkpoint's own folder and the logs beside it: no path from a manifest is followed,
and no link.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from minirlhf.metrics import LOGS, file_hash
from minirlhf.runtime import UserError, require

FORMAT = 1
FILES = ("state.safetensors", "state.json")
NAME = re.compile(r"\d{8}")
MAX_JSON = 1 << 24  # bytes; no manifest or state.json that was written here is larger
# What may differ between a run and its continuation: where it lives, how often it saves, memory and speed, who watches.
CHANGEABLE = {
    *("run", "resume", "dry_run", "checkpoint_every", "micro_batch_tokens", "gradient_checkpointing", "device"),
    "track",
}


class Damaged(UserError):
    """A checkpoint that is not as it was written; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    stage, step   name of the stage's folder; finished steps (iterations of PPO)
    config        the stage's configuration as plain values
    inputs        path -> SHA-256 of the files that the stage reads
    logs, files   name -> {"size", "sha256"} of the logs up to this step, and of the checkpoint's own files
    quality       of the model at this step, larger is better; None where it was not measured
    """

    stage: str
    step: int
    config: dict[str, Any]
    inputs: dict[str, str]
    logs: dict[str, dict[str, Any]]
    versions: dict[str, str]
    quality: float | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


KINDS = {
    **{"stage": str, "step": int, "config": dict, "inputs": dict, "logs": dict, "versions": dict},
    **{"quality": float | NoneType, "files": dict, "format": int},
}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json for the files that stand in `folder`."""
    files = {name: {"size": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in FILES}
    content = dataclasses.asdict(dataclasses.replace(manifest, files=files))
    text = json.dumps({**content, "sha256": own_hash(content)}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; raises Damaged unless it is whole and names only what belongs there."""
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder}: {'is a link, which is not followed' if folder.is_symlink() else 'no such folder'}")
    file = folder / "manifest.json"
    content = read_json(file)
    if not isinstance(content, dict) or content.keys() != KINDS.keys() | {"sha256"}:
        raise Damaged(f"{file}: not a manifest of a checkpoint")
    if content.pop("sha256") != own_hash(content):
        raise Damaged(f"{file}: not what was written (its own SHA-256 differs)")
    wrong = [name for name, kind in KINDS.items() if not isinstance(content[name], kind)]
    manifest = Manifest(**content)
    if wrong or manifest.format != FORMAT:
        raise Damaged(f"{file}: of another format ({', '.join(wrong) or manifest.format})")
    for kind, entries, names in (("files", manifest.files, FILES), ("logs", manifest.logs, LOGS)):
        _check_entries(f"{file}: its {kind}", entries, names)
    if folder.name != f"{manifest.step:08d}":
        raise Damaged(f"{file}: is of step {manifest.step}, and its folder is {folder.name}")
    return manifest


def _check_entries(what: str, entries: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """An exact set of names: a path such as ../../file gets no further than this."""
    if sorted(entries) != sorted(names):
        raise Damaged(f"{what} are {', '.join(sorted(entries))}, not {', '.join(names)}")
    for entry in entries.values():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or entry["size"] < 0:
            raise Damaged(f"{what} have no sizes")


def verify(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`; raises Damaged unless every file of it is as it was written.

    The logs of the stage, two folders up, are compared up to the length that they had: later rows may follow.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        size = regular_file(folder / name).st_size
        if size != entry["size"]:
            raise Damaged(f"{folder / name}: {size} bytes where {entry['size']} were written")
        if file_hash(folder / name) != entry.get("sha256"):
            raise Damaged(f"{folder / name}: not what was written (its SHA-256 differs)")
    for name, entry in manifest.logs.items():
        log = folder.parent.parent / name
        if regular_file(log).st_size < entry["size"] or file_hash(log, entry["size"]) != entry.get("sha256"):
            raise Damaged(f"{log}: its rows up to step {manifest.step} are not what was written")
    return manifest


def check_same(where: Path, written: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Raise UserError unless configuration and inputs are those that were `written` as `config` and `inputs`.

    Paths may differ, since what counts is the content of the files, and so may CHANGEABLE settings.
    """
    earlier = written["config"]
    changed = [
        f"--{name.replace('_', '-')} {value} (was {earlier.get(name)})"
        for name, value in config.items()
        if name not in CHANGEABLE and not isinstance(value, Path) and plain(value) != earlier.get(name)
    ]
    require(not changed, f"{where}: was written with other settings: {', '.join(changed)}; --resume needs the same")
    before = list(written["inputs"].values())
    require(len(before) == len(inputs), f"{where}: the run began with {len(before)} input files, now {len(inputs)}")
    for (path, now), then in zip(inputs.items(), before, strict=True):
        require(now == then, f"{path}: altered since {where} was written; restore it, or start again without --resume")


def plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def regular_file(path: Path) -> os.stat_result:
    """The file's own status; raises Damaged where it is missing, a link or anything but a plain file."""
    try:
        found = path.lstat()
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path}: not a plain file, and links are not followed")
    return found


def read_text(path: Path) -> str:
    """The text of a small plain file; raises Damaged where that is not what stands there."""
    if regular_file(path).st_size > MAX_JSON:
        raise Damaged(f"{path}: larger than any file of its kind")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{path}: cannot be read ({error})") from error


def read_json(path: Path) -> Any:
    """The value in a small JSON file; raises Damaged where it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not JSON ({error})") from error


def own_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

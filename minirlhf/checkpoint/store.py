"""Writing checkpoints so that a process may die at any moment, and reading the one to go on from.

A checkpoint is written under a temporary name and flushed to the disk, the manifest last, then renamed; then `latest`
is replaced. Whatever happens, the previous checkpoint stays as it was.
Left out on purpose: pickle in every form, and saving in the background, which would need another copy of all weights.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirlhf.checkpoint.manifest import (
    FILES,
    NAME,
    Damaged,
    Manifest,
    check_same,
    read_json,
    read_manifest,
    read_text,
    verify,
    write_manifest,
)
from minirlhf.checkpoint.state import Parts, expected, restore, same_layout
from minirlhf.runtime import UserError, require

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SMALL_FILES = 1 << 20  # bytes to have free beside the tensors


class DiskFull(UserError):
    """No room to write; the message names needed and free bytes."""


# ------------------------------------------------------------------------------------------------------------- writing
def save(root: Path, parts: Parts, manifest: Manifest) -> Path:
    """Write a checkpoint into `root` and make it the latest; keeps the newest two and the best. Returns its folder.

    Raises UserError where the disk is full (needed and free bytes) and where a tensor is not finite; the checkpoints
    that were there stay whole in both cases.
    """
    for name, tensor in parts.tensors.items():
        finite = bool(torch.isfinite(tensor).all())
        require(finite, f"{name} is not finite after step {manifest.step}, which is not saved")
    root.mkdir(parents=True, exist_ok=True)
    require_space(root, parts.nbytes)
    final = root / f"{manifest.step:08d}"
    temporary = root / f".saving-{final.name}"
    _discard(temporary)
    try:
        _write_files(temporary, parts, manifest)
        _discard(final)  # left by a run that went on from an earlier one
        temporary.rename(final)
        _sync_folder(root)
        write_atomically(root / "latest", f"{final.name}\n")
    except (OSError, SafetensorError) as error:
        _discard(temporary)
        full = disk_full(error, root, parts.nbytes)
        if full:
            raise full from error
        raise
    _prune(root, manifest.step)
    return final


def _write_files(folder: Path, parts: Parts, manifest: Manifest) -> None:
    folder.mkdir()
    save_file({name: tensor.cpu().contiguous() for name, tensor in parts.tensors.items()}, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(parts.numbers, indent=1), encoding="utf-8")
    for name in FILES:
        _sync(folder / name)
    write_manifest(folder, manifest)
    _sync(folder / "manifest.json")
    _sync_folder(folder)


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of `folder` has `needed` bytes free, and a little more for small files."""
    needed += SMALL_FILES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(f"{folder}: the disk is too full for checkpoints: {needed:,} bytes needed, {free:,} free")


def disk_full(error: BaseException, folder: Path, needed: int) -> DiskFull | None:
    """The error in words where it says that the disk is full (or a quota or size limit is reached), else None."""
    if isinstance(error, DiskFull):
        return error
    by_number = isinstance(error, OSError) and error.errno in DISK_FULL
    if not (by_number or any(f"os error {number})" in str(error) for number in DISK_FULL)):
        return None
    free = shutil.disk_usage(folder).free
    return DiskFull(
        f"{folder}: writing failed ({error}): {needed + SMALL_FILES:,} bytes needed, {free:,} free; what was saved "
        "before is whole. Make room and continue with --resume"
    )


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step: at every moment it holds the old text or the new one."""
    partial = path.with_name(f".saving-{path.name}")
    _discard(partial)
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync_folder(path.parent)


def clean(root: Path) -> None:
    """Remove what a killed process left unfinished in `root`."""
    for path in [*root.glob(".saving-*"), *root.glob(".old-*")]:
        _discard(path)


def _prune(root: Path, step: int) -> None:
    """Keep the newest two checkpoints up to `step` and the best; what lies beyond `step` is about to be replaced."""
    past = [path for path in _folders(root) if int(path.name) <= step]
    quality = {path: _quality(path) for path in past}
    best = max(past, key=lambda path: (quality[path], path.name))
    for path in past[:-2]:
        if path != best or quality[path] == -math.inf:
            _discard(path)


def _quality(path: Path) -> float:
    try:
        quality = read_manifest(path).quality
    except Damaged:
        quality = None
    return -math.inf if quality is None else quality


def _discard(path: Path) -> None:
    """Delete what stands there. A folder vanishes in one step, so that no half of it is ever taken for whole."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".old-{path.name}"))
        shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


# ------------------------------------------------------------------------------------------------------------- reading
def latest(root: Path) -> Path | None:
    """The folder of the newest checkpoint, None where there is none.

    It goes by the file `latest`; without one (the process died during its first save) by the largest number.
    """
    pointer = root / "latest"
    if not os.path.lexists(pointer):
        return max(_folders(root), default=None)
    try:
        name = read_text(pointer).strip()
        if not NAME.fullmatch(name):
            raise Damaged(f"{pointer}: holds no name of a checkpoint")
    except Damaged as error:
        raise Damaged(f"{error}; {_offer(root, None)}") from error
    return root / name


def check(folder: Path, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Raise UserError unless the checkpoint in `folder` is of this stage, with these settings and inputs.

    It reads the manifest alone, so that a run which cannot go on says so before any weights are read.
    """
    try:
        manifest = read_manifest(folder)
        if manifest.stage != stage:
            raise Damaged(f"{folder / 'manifest.json'}: is of the stage {manifest.stage!r}, not of {stage!r}")
        check_same(folder, vars(manifest), config, inputs)
    except Damaged as error:
        raise Damaged(f"{error}; {_offer(folder.parent, folder)}") from error


def load(folder: Path, state: object, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Manifest:
    """Fill `state` (a dataclass, see `parts`) from the checkpoint in `folder`.

    config, inputs  of the run that goes on: they must be those that the checkpoint was written with
    Raises UserError in one line that names the file, and the newest other checkpoint that is whole. Everything is
    checked before anything is changed: after an error `state` is what it was.
    """
    check(folder, stage=stage, config=config, inputs=inputs)
    try:
        manifest = verify(folder)
        stored = _read_parts(folder, expected(state))
    except Damaged as error:
        raise Damaged(f"{error}; {_offer(folder.parent, folder)}") from error
    restore(state, stored)
    return manifest


def _read_parts(folder: Path, wanted: Parts) -> Parts:
    """The stored tensors and numbers, checked to be of the wanted names, shapes and types."""
    file = folder / "state.safetensors"
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    room = file.stat().st_size - 8
    if header > min(room, MAX_HEADER):
        raise Damaged(f"{file}: not a safetensors file (a header of {header} bytes, with room for {room})")
    try:
        stored = Parts(load_file(file), read_json(folder / "state.json"))
    except SafetensorError as error:
        raise Damaged(f"{file}: not a safetensors file ({error})") from error
    wrong = _differences(stored.tensors, wanted.tensors)
    if not same_layout(wanted.numbers, stored.numbers):
        wrong.append("state.json has other fields")
    if wrong:
        raise Damaged(f"{file}: does not fit this stage: {'; '.join(wrong[:4])}")
    return stored


def _differences(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    wrong += [f"{name} is unexpected" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        ours, theirs = wanted[name], stored[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            wrong.append(f"{name} is {theirs.dtype} {tuple(theirs.shape)}, not {ours.dtype} {tuple(ours.shape)}")
    return sorted(wrong)


def _offer(root: Path, damaged: Path | None) -> str:
    """What the user can do: continue from the newest other checkpoint that is whole, or start again."""
    for path in reversed(_folders(root)):
        if path != damaged and _is_whole(path):
            return f"{path} is whole: to go on from it, `echo {path.name} > {root / 'latest'}` and use --resume again"
    return "no other checkpoint is whole: start again without --resume"


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except Damaged:
        return False
    return True


def _folders(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest first."""
    return sorted(path for path in root.glob("*") if NAME.fullmatch(path.name))

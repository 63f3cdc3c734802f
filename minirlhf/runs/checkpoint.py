"""Checkpoints for exact resume: the whole state of a stage in a folder that is either whole or not there.

    <stage>/checkpoints/00000100/state.safetensors   parameters, and the optimizers' moments by their parameter's name
                                 state.json          counters, the KL coefficient, the optimizers' settings
                                 manifest.json       stage, step, configuration, hashes of inputs, logs and these files
    <stage>/checkpoints/latest                       the name of the newest

What is not in it: random generators, data positions and learning rates, which are functions of (seed, stream, step)
everywhere in this project, and the reward model's normaliser, which is folded into its weights.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from minirlhf.files import discard, file_hash, sync, sync_folder, write_atomically
from minirlhf.runs.log import LOGS, TRACKED, plain
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


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


@dataclass
class Parts:
    """tensors by name, e.g. `model.wte.weight` and `optimizer.model.wte.weight.exp_avg`; everything else as JSON."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def clone(self) -> Parts:
        """The same values in tensors of their own."""
        return Parts({name: tensor.clone() for name, tensor in self.tensors.items()}, self.numbers)


def parts(state: object) -> Parts:
    """The parts of `state`; the tensors are the live ones, detached, the numbers are copies."""
    tensors: dict[str, Tensor] = {}
    for name, value in _fields(state):
        if isinstance(value, nn.Module):
            tensors |= {f"{name}.{key}": tensor.detach() for key, tensor in _tensors(value)}
        elif isinstance(value, Optimizer):
            tensors |= {key: tensor.detach() for key, tensor in _moments(state, name, value)}
    plain = {name: value for name, value in _fields(state) if not isinstance(value, nn.Module)}
    return Parts(tensors, {name: _plain(state, name, value) for name, value in plain.items()})


def _plain(state: object, name: str, value: Any) -> Any:
    """A field that is no model as JSON: an optimizer by its groups, a small dataclass by its fields."""
    if isinstance(value, Optimizer):
        names = _parameter_names(state)
        return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in value.param_groups]
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(state).__name__}.{name} is a {type(value).__name__}, which no checkpoint can hold")


def _moments(state: object, name: str, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps of each parameter that it has stepped, by name."""
    names = _parameter_names(state)
    for parameter, moments in optimizer.state.items():
        yield from ((f"{name}.{names[id(parameter)]}.{key}", moments[key]) for key in MOMENTS)


def expected(state: object) -> Parts:
    """The parts that `state` has after an optimizer step, without memory: tensors on the meta device."""
    found = parts(state)
    tensors = {name: tensor.to("meta") for name, tensor in found.tensors.items()}
    names = _parameter_names(state)
    optimizers = [(name, value) for name, value in _fields(state) if isinstance(value, Optimizer)]
    pairs = [(name, p) for name, value in optimizers for group in value.param_groups for p in group["params"]]
    for name, parameter in pairs:
        moments = {key: parameter.detach().to("meta") for key in MOMENTS}
        moments["step"] = torch.zeros((), dtype=torch.float32, device="meta")
        tensors |= {f"{name}.{names[id(parameter)]}.{key}": moment for key, moment in moments.items()}
    return Parts(tensors, found.numbers)


def same_layout(numbers: Any, other: Any) -> bool:
    """True where two trees of JSON have the same keys, lengths and kinds of values; the values may differ."""
    if isinstance(numbers, dict) and isinstance(other, dict):
        return numbers.keys() == other.keys() and all(same_layout(numbers[key], other[key]) for key in numbers)
    if isinstance(numbers, list | tuple) and isinstance(other, list | tuple):
        return len(numbers) == len(other) and all(map(same_layout, numbers, other))
    if isinstance(numbers, str) and isinstance(other, str):
        return numbers == other  # names of parameters
    number = (int, float)
    both_numbers = isinstance(numbers, number) and isinstance(other, number)
    return type(numbers) is type(other) or (both_numbers and bool not in (type(numbers), type(other)))


@torch.no_grad()
def restore(state: object, stored: Parts) -> None:
    """Put stored parts back into `state`. Compare them with `expected` and `same_layout` first: nothing is checked."""
    names = _parameter_names(state)
    for name, value in _fields(state):
        if isinstance(value, nn.Module):
            _restore_model(value, name, stored)
        elif isinstance(value, Optimizer):
            _restore_optimizer(value, name, stored, names)
        elif dataclasses.is_dataclass(value):
            vars(value).update(stored.numbers[name])
        else:
            setattr(state, name, stored.numbers[name])


def _restore_model(model: nn.Module, name: str, stored: Parts) -> None:
    for key, tensor in _tensors(model):
        tensor.copy_(stored.tensors[f"{name}.{key}"])


def _restore_optimizer(optimizer: Optimizer, name: str, stored: Parts, names: dict[int, str]) -> None:
    """Through the optimizer's own load_state_dict, which numbers parameters in the order of the groups.

    A parameter that had not been stepped has nothing stored.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for number, parameter in enumerate(parameters):
        prefix = f"{name}.{names[id(parameter)]}"
        if f"{prefix}.{MOMENTS[0]}" in stored.tensors:
            moments[number] = {key: stored.tensors[f"{prefix}.{key}"] for key in MOMENTS}
    numbers = iter(range(len(parameters)))
    groups = [
        {**saved, "betas": tuple(saved["betas"]), "params": [next(numbers) for _ in group["params"]]}
        for group, saved in zip(optimizer.param_groups, stored.numbers[name], strict=True)
    ]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _fields(state: object) -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(state):
        yield entry.name, getattr(state, entry.name)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers; tied weights appear once."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _parameter_names(state: object) -> dict[int, str]:
    """The name of every model parameter in `state`, by its identity."""
    models = [(name, value) for name, value in _fields(state) if isinstance(value, nn.Module)]
    return {id(parameter): f"{name}.{key}" for name, model in models for key, parameter in model.named_parameters()}


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
    discard(temporary)
    try:
        _write_files(temporary, parts, manifest)
        discard(final)  # left by a run that went on from an earlier one
        temporary.rename(final)
        sync_folder(root)
        write_atomically(root / "latest", f"{final.name}\n")
    except (OSError, SafetensorError) as error:
        discard(temporary)
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
        sync(folder / name)
    write_manifest(folder, manifest)
    sync(folder / "manifest.json")
    sync_folder(folder)


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


def clean(root: Path) -> None:
    """Remove what a killed process left unfinished in `root`."""
    for path in [*root.glob(".saving-*"), *root.glob(".old-*")]:
        discard(path)


def _prune(root: Path, step: int) -> None:
    """Keep the newest two checkpoints up to `step` and the best; what lies beyond `step` is about to be replaced."""
    past = [path for path in _folders(root) if int(path.name) <= step]
    quality = {path: _quality(path) for path in past}
    best = max(past, key=lambda path: (quality[path], path.name))
    for path in past[:-2]:
        if path != best or quality[path] == -math.inf:
            discard(path)


def _quality(path: Path) -> float:
    try:
        quality = read_manifest(path).quality
    except Damaged:
        quality = None
    return -math.inf if quality is None else quality


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
    begun = {"run.json", MARKER, "checkpoints", TRACKED, *logs}
    if results and read_marker(folder).get("finished") is False:
        begun |= results
    if names <= begun:
        shutil.rmtree(folder)


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of the files that a stage has made, by name; the checkpoints have their own, a tracker's files none."""
    made = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    apart = {folder / "checkpoints", folder / TRACKED}
    made = [path for path in made if not apart & set(path.parents) and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in made}

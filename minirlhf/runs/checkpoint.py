"""Checkpoints for exact resume: the whole state of a stage in a folder that is either whole or not there.

    <stage>/checkpoints/00000100/state.safetensors   parameters, and the optimizers' moments by their parameter's name
                                 state.json          counters, the KL coefficient, the optimizers' settings
                                 manifest.json       stage, step, configuration, hashes of inputs, logs and these files
    <stage>/checkpoints/latest                       the name of the newest

What is not in it: random generators, data positions and learning rates, which are functions of (seed, stream, step)
everywhere in this project, and the reward model's normaliser, which is folded into its weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minirlhf.files import atomic, discard, file_hash, sync_folder, write_text
from minirlhf.runs.log import LOGS, TRACKED, plain
from minirlhf.runtime import UserError, held_signals, require

FORMAT = 1
FILES = ("state.safetensors", "state.json")
NAME = "[0-9]" * 8
MAX_JSON = 1 << 24  # bytes; no manifest or state.json that was written here is larger
# What may differ between a run and its continuation: where it lives, how often it saves, memory and speed, who watches.
CHANGEABLE = set("run resume dry_run checkpoint_every track device micro_batch_tokens gradient_checkpointing".split())
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SMALL = 1 << 20  # bytes to have free beside the tensors
MARKER = "stage.json"
GO_ON = "to go on, write the name of another checkpoint's folder into `latest`, or start again without --resume"


class Damaged(UserError):
    """A file that is not as it was written; the message names it, and says how to go on."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; {GO_ON}")


class DiskFull(UserError):
    """No room to write; the message names needed and free bytes."""

    def __init__(self, folder: Path, needed: int, what: str) -> None:
        free = shutil.disk_usage(folder).free
        super().__init__(f"{folder}: {what}: {needed + SMALL:,} bytes needed, {free:,} free; make room and --resume")


# ---------------------------------------------------------------------------------------------------- a stage's state
@dataclasses.dataclass
class Parts:
    """tensors by name, e.g. `model.wte.weight` and `optimizer.model.wte.weight.exp_avg`; everything else as JSON."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def parts(state: object) -> Parts:
    """The parts of `state`, a dataclass; the tensors are the live ones, detached, the numbers are copies."""
    models = {name: value for name, value in vars(state).items() if isinstance(value, nn.Module)}
    names = {id(p): f"{name}.{key}" for name, model in models.items() for key, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in vars(state).items():
        if name in models:  # tied weights appear once
            named = {**dict(value.named_parameters()), **dict(value.named_buffers())}
            tensors |= {f"{name}.{key}": tensor.detach() for key, tensor in named.items()}
        elif isinstance(value, torch.optim.Optimizer):
            for parameter, moments in value.state.items():
                tensors |= {f"{name}.{names[id(parameter)]}.{key}": tensor for key, tensor in moments.items()}
            groups = value.param_groups
            numbers[name] = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]
        else:
            numbers[name] = vars(value) if dataclasses.is_dataclass(value) else value
    return Parts(tensors, json.loads(json.dumps(numbers)))


@torch.no_grad()
def restore(state: object, stored: Parts) -> None:
    """Put stored parts back into `state`; the caller has seen that they are of its layout."""
    for name, tensor in parts(state).tensors.items():
        tensor.copy_(stored.tensors[name])
    for name, number in stored.numbers.items():
        value = getattr(state, name)
        if isinstance(value, torch.optim.Optimizer):
            for group, saved in zip(value.param_groups, number, strict=True):
                group.update({**saved, "params": group["params"]})
        elif dataclasses.is_dataclass(value):
            vars(value).update(number)
        else:
            setattr(state, name, number)


def _layout(parts: Parts) -> dict[str, Any]:
    """Types and shapes of the tensors, and the numbers' tree with a type in place of each."""
    kinds: dict[str, Any] = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), lambda _: int | float)
    tensors = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in parts.tensors.items()}
    return tensors | json.loads(json.dumps({f"{name} in state.json": n for name, n in parts.numbers.items()}), **kinds)


# ---------------------------------------------------------------------------------------------------------- manifests
@dataclasses.dataclass(frozen=True)
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
    config: dict
    inputs: dict
    logs: dict
    versions: dict
    quality: float | None = None
    files: dict = dataclasses.field(default_factory=dict)
    format: int = FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json for the files that stand in `folder`."""
    files = {name: {"size": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in FILES}
    content = dataclasses.asdict(dataclasses.replace(manifest, files=files))
    write_text(folder / "manifest.json", json.dumps({**content, "sha256": json_hash(content)}, indent=1))


def json_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; raises Damaged unless it is whole and names only what belongs there."""
    require(not folder.is_symlink(), f"{folder}: is a link, which is not followed", Damaged)
    file = folder / "manifest.json"
    content = read(file)
    whole = isinstance(content, dict) and content.pop("sha256", None) == json_hash(content)
    require(whole, f"{file}: not what was written (its own SHA-256 differs)", Damaged)
    kinds = get_type_hints(Manifest)
    fits = content.keys() == kinds.keys() and all(isinstance(content[name], kind) for name, kind in kinds.items())
    require(fits and content["format"] == FORMAT, f"{file}: of another format", Damaged)
    step = content["step"]
    require(folder.name == f"{step:08d}", f"{file}: is of step {step}, and its folder is {folder.name}", Damaged)
    return Manifest(**content)


def verify(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`; raises Damaged unless every file of it is as it was written.

    The logs of the stage, two folders up, are compared up to the length that they had: later rows may follow.
    """
    manifest = read_manifest(folder)
    for where, entries, names in ((folder, manifest.files, FILES), (folder.parent.parent, manifest.logs, LOGS)):
        exact = sorted(entries) == sorted(names) and all(isinstance(entry, dict) for entry in entries.values())
        require(exact, f"{folder}/manifest.json: is of other files than {', '.join(names)}", Damaged)  # and so no ../..
        for name, entry in entries.items():
            size, written = file_size(where / name), entry.get("size")
            fits = size == written if names is FILES else type(written) is int and 0 <= written <= size
            same = fits and file_hash(where / name, written) == entry.get("sha256")
            require(same, f"{where / name}: is not what step {manifest.step} left (size or SHA-256)", Damaged)
    return manifest


def check_same(where: Path, written: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Raise UserError unless configuration and inputs are those that were `written` as `config` and `inputs`.

    Paths may differ, since what counts is the content of the files, and so may CHANGEABLE settings.
    """
    free = CHANGEABLE | {name for name, value in config.items() if isinstance(value, Path)}
    now, then = plain(config), written["config"]
    other = [name for name in now if name not in free and now[name] != then.get(name)]
    changed = ", ".join(f"--{name.replace('_', '-')} {now[name]} (was {then.get(name)})" for name in other)
    require(not changed, f"{where}: was written with other settings: {changed}; --resume needs the same")
    before = list(written["inputs"].values())
    require(len(before) == len(inputs), f"{where}: the run began with {len(before)} input files, now {len(inputs)}")
    altered = ", ".join(path for (path, digest), old in zip(inputs.items(), before, strict=True) if digest != old)
    require(not altered, f"{altered}: altered since {where} was written; restore it, or start again without --resume")


def file_size(path: Path) -> int:
    """Its bytes; raises Damaged where it is missing, a link or anything but a plain file."""
    require(os.path.isfile(path) and not os.path.islink(path), f"{path}: missing, or no plain file", Damaged)
    return path.stat().st_size


def read(path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    """The value in a small plain file, by default of JSON; raises Damaged where that is not what stands there."""
    require(file_size(path) <= MAX_JSON, f"{path}: larger than any file of its kind", Damaged)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: cannot be read ({error})") from error


# ------------------------------------------------------------------------------------------------------------- writing
def save(root: Path, parts: Parts, manifest: Manifest) -> None:
    """Write a checkpoint into `root` and make it the latest; keeps the newest two and the best.

    Raises UserError where the disk is full (needed and free bytes) and where a tensor is not finite; the checkpoints
    that were there stay whole in both cases.
    """
    broken = next((name for name, tensor in parts.tensors.items() if not torch.isfinite(tensor).all()), None)
    require(broken is None, f"{broken} is not finite after step {manifest.step}, which is not saved")
    root.mkdir(parents=True, exist_ok=True)
    require_space(root, parts.nbytes)
    final = root / f"{manifest.step:08d}"
    temporary = root / f".saving-{final.name}"
    discard(temporary)
    try:
        temporary.mkdir()
        weights = {name: tensor.cpu().contiguous() for name, tensor in parts.tensors.items()}
        with atomic(temporary / "state.safetensors") as file:
            save_file(weights, file)
        write_text(temporary / "state.json", json.dumps(parts.numbers, indent=1))
        write_manifest(temporary, manifest)
        discard(final)  # left by a run that went on from an earlier one
        temporary.rename(final)
        sync_folder(root)
        write_text(root / "latest", f"{final.name}\n")
    except (OSError, SafetensorError) as error:
        discard(temporary)
        raise disk_full(error, root, parts.nbytes) or error from error
    _prune(root, manifest.step)


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of `folder` has `needed` bytes free, and a little more for small files."""
    if shutil.disk_usage(folder).free < needed + SMALL:
        raise DiskFull(folder, needed, "the disk is too full for checkpoints")


def disk_full(error: BaseException, folder: Path, needed: int) -> DiskFull | None:
    """The error in words where it says that the disk is full (or a quota or size limit is reached), else None."""
    text = "" if isinstance(error, DiskFull) else str(error)
    if any(f"[Errno {number}]" in text or f"os error {number})" in text for number in DISK_FULL):
        return DiskFull(folder, needed, f"writing failed ({text}), and what was saved before is whole")
    return None


def clean(root: Path) -> None:
    """Remove what a killed process left unfinished in `root`."""
    for path in [*root.glob(".saving-*"), *root.glob(".old-*")]:
        discard(path)


def _prune(root: Path, step: int) -> None:
    """Keep the newest two checkpoints up to `step` and the best; what lies beyond `step` is about to be replaced."""
    past = [path for path in sorted(root.glob(NAME)) if int(path.name) <= step]
    measured = []
    for path in past:
        with contextlib.suppress(Damaged):
            measured.append((read_manifest(path).quality, path))
    _, best = max((entry for entry in measured if entry[0] is not None), default=(None, None))
    for path in set(past[:-2]) - {best}:
        discard(path)


# ------------------------------------------------------------------------------------------------------------- reading
def latest(root: Path) -> Path | None:
    """The folder of the newest checkpoint, None where there is none.

    It goes by the file `latest`; without one (the process died during its first save) by the largest number.
    """
    pointer = root / "latest"
    if not os.path.lexists(pointer):
        return max(root.glob(NAME), default=None)
    return root / read(pointer, lambda text: f"{int(text):08d}")


def check(folder: Path, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Raise UserError unless the checkpoint in `folder` is of this stage, with these settings and inputs.

    It reads the manifest alone, so that a run which cannot go on says so before any weights are read.
    """
    manifest = read_manifest(folder)
    require(manifest.stage == stage, f"{folder}/manifest.json: of the stage {manifest.stage}, not {stage}", Damaged)
    check_same(folder, vars(manifest), config, inputs)


def load(folder: Path, state: object, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Manifest:
    """Fill `state` (see `parts`; its moments are allocated) from the checkpoint in `folder`.

    config, inputs  of the run that goes on: they must be those that the checkpoint was written with
    Raises UserError in one line that names the file. Everything is checked before anything is changed: after an error
    `state` is what it was.
    """
    check(folder, stage=stage, config=config, inputs=inputs)
    manifest = verify(folder)
    try:
        with held_signals():  # what is raised within becomes a ValueError
            tensors = load_file(folder / "state.safetensors")
        stored = Parts(tensors, {**read(folder / "state.json")})
        ours, theirs = _layout(parts(state)), _layout(stored)
    except (SafetensorError, RecursionError, TypeError) as error:
        raise Damaged(f"{folder}: holds no tensors and numbers by name ({error})") from error
    other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    words = [f"{key} is {theirs.get(key, 'missing')!s:.80}, not {ours.get(key, 'missing')!s:.80}" for key in other[:4]]
    require(not other, f"{folder}: does not fit this stage: {'; '.join(words)}", Damaged)
    restore(state, stored)
    return manifest


# ------------------------------------------------------------------------------------------------------ begun, finished
def read_marker(folder: Path) -> dict[str, Any]:
    """Content of the marker in `folder`; empty where there is none."""
    path = folder / MARKER
    marker: Any = None if os.path.lexists(path) else {}
    with contextlib.suppress(Damaged):
        marker = read(path)
    require(isinstance(marker, dict), f"{path}: not a JSON object in a plain file; remove it")
    return marker


def mark(folder: Path, *, finished: bool, **facts: dict[str, Any]) -> None:
    """Say whether the stage in `folder` is finished: with `config`, `inputs` and `outputs`, and last of all."""
    write_text(folder / MARKER, json.dumps({"finished": finished, **facts}, indent=1))


def clear_begun(folder: Path, *, logs: set[str], results: set[str]) -> None:
    """Delete a folder that a killed process had begun; one that holds anything else is left to be moved aside.

    logs, results  names of what a stage may have written by then; results only where the marker says so
    """
    is_folder = folder.is_dir() and not folder.is_symlink()
    unfinished = is_folder and read_marker(folder).get("finished") is False
    begun = {"run.json", MARKER, "checkpoints", TRACKED, *logs, *(results if unfinished else ())}
    if is_folder and all(path.name in begun or path.name.startswith(".saving-") for path in folder.iterdir()):
        shutil.rmtree(folder)


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of the files that a stage has made, by name; the checkpoints have their own, a tracker's files none."""
    apart = {folder / "checkpoints", folder / TRACKED}
    made = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink() and not apart & {*p.parents}]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in made if path.name != MARKER}


# ----------------------------------------------------------------------------------------------------------- one writer
def require_writable(folder: Path, *, flag: str = "--run") -> None:
    """Raise UserError unless `folder` can be written, or made where it does not exist."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    require(there.is_dir(), f"{folder}: cannot be written, {there} is not a folder; give another {flag}")
    allowed = os.access(there, os.W_OK | os.X_OK)
    require(allowed, f"{folder}: cannot be written, {there} is read-only for you; give another {flag}")


@contextlib.contextmanager
def only_writer(folder: Path, *, flag: str = "--run") -> Iterator[None]:
    """Inside, no other process writes `folder`; raises UserError that names the process which does.

    The lock is the operating system's, on a file beside the folder: it ends with the process, however that ends, so no
    lock is ever stale. Its holder's id stands in another file, because Windows lets nobody read a locked one.
    """
    path = folder.absolute().with_name(f".{folder.absolute().name}.lock")
    holder, pid = path.with_suffix(".pid"), "unknown"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path, blocking=False).acquire()
    except Timeout as error:
        with contextlib.suppress(Damaged, OSError):
            pid = read(holder, str)
        raise UserError(f"{folder}: process {pid} is writing there; wait for its end or give another {flag}") from error
    with lock:
        try:
            holder.unlink(missing_ok=True)  # a link there is not followed
            write_text(holder, str(os.getpid()))
            yield
        finally:
            for file in (holder, path):  # while they are still ours; what Windows does not let go stays
                with contextlib.suppress(OSError):
                    file.unlink()


def require_unlocked(run: Path) -> None:
    """Raise UserError where a process writes a folder in `run`."""
    for path in run.glob(".*.lock"):
        with only_writer(run / path.name.removeprefix(".").removesuffix(".lock")):
            pass

"""Checkpoints: bit-exact round trips, and one clear error for every file that is not what was written.

Each damage is done to a stage of `tiny` that has several checkpoints, and met where a user meets it: in the stage's own
`main` with --resume.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_resume import EVERY, NEEDS, exit_code, forked

from minirlhf.files import file_hash
from minirlhf.model import GPT, GPTConfig
from minirlhf.optim import adamw, allocate_moments
from minirlhf.ppo import AdaptiveKL
from minirlhf.runs import checkpoint
from minirlhf.runs.checkpoint import Manifest, json_hash
from minirlhf.runs.log import LOGS
from minirlhf.runtime import UserError


@dataclass
class State:
    """Two models with an optimizer each, a controller and plain values: all kinds that a checkpoint holds."""

    policy: GPT
    value: torch.nn.Module
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer
    controller: AdaptiveKL | None
    step: int = 0
    note: float | None = None


def new_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    policy = GPT(GPTConfig(vocab_size=7, n_positions=5, n_layer=1, n_head=1, n_embd=4), seed=seed).to(dtype)
    value = torch.nn.Linear(3, 1)
    with torch.no_grad():
        value.weight.fill_(seed)
        value.bias.fill_(-seed)
    optimizers = adamw(policy, learning_rate=0.1 * seed, weight_decay=0.1), adamw(value, learning_rate=0.2)
    for optimizer in optimizers:
        allocate_moments(optimizer)
    return State(policy, value, *optimizers, AdaptiveKL(0.1 * seed, 6.0, 100.0))


def train(state: State, steps: int = 1) -> None:
    for _ in range(steps):
        state.policy(torch.tensor([[1, 2, 3 + state.step % 3]])).square().sum().backward()
        state.value(torch.ones(3)).square().sum().backward()
        for optimizer in (state.policy_optimizer, state.value_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        state.controller.update(3.0 + state.step, 7)
        state.step += 1


def bits(state: State) -> dict[str, bytes]:
    parts = checkpoint.parts(state)
    return {name: tensor.numpy().tobytes() for name, tensor in parts.tensors.items()} | {
        "": str(parts.numbers).encode()
    }


def logs(folder: Path) -> dict[str, dict]:
    for name in LOGS:
        (folder / name).touch()
    return {name: {"size": 0, "sha256": file_hash(folder / name)} for name in LOGS}


def save(folder: Path, state: State, quality: float | None = None) -> Path:
    manifest = Manifest("some", state.step, {"beta": 0.1}, {}, logs(folder), {}, quality)
    checkpoint.save(folder / "checkpoints", checkpoint.parts(state), manifest)
    return folder / "checkpoints" / f"{state.step:08d}"


def load(path: Path, state: State) -> Manifest:
    return checkpoint.load(path, state, stage="some", config={"beta": 0.1}, inputs={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_round_trip_is_exact_and_so_is_what_follows(tmp_path: Path, dtype: torch.dtype) -> None:
    state, other = new_state(1, dtype), new_state(2, dtype)
    train(state, 3)
    path = save(tmp_path, state)
    assert load(path, other).step == 3
    assert bits(other) == bits(state)
    train(state, 2)
    train(other, 2)
    assert bits(other) == bits(state)


def test_every_tensor_of_the_optimizers_is_named_by_its_parameter() -> None:
    state = new_state(1)
    train(state)
    names = checkpoint.parts(state).tensors.keys()
    for field, model in (("policy", state.policy), ("value", state.value)):
        for name, _ in model.named_parameters():
            assert f"{field}.{name}" in names
            assert {f"{field}_optimizer.{field}.{name}.{m}" for m in ("step", "exp_avg", "exp_avg_sq")} <= names
    assert names == checkpoint.parts(new_state(2)).tensors.keys()  # before the first step, too


def test_moments_from_the_start_are_those_of_the_first_step_and_change_no_update() -> None:
    """A parameter without a gradient, which AdamW passes over, keeps its zeros and its bits."""
    early, late = (GPT(GPTConfig(vocab_size=7, n_positions=5, n_layer=1, n_head=1, n_embd=4), seed=1) for _ in range(2))
    optimizers = [adamw(model, learning_rate=0.1, weight_decay=0.1) for model in (early, late)]
    allocate_moments(optimizers[0])
    for step in range(3):
        for model, optimizer in zip((early, late), optimizers, strict=True):
            model(torch.tensor([[1, 2, 3 + step]])).square().sum().backward()
            model.ln_f.bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
    assert tiny.equal(early.state_dict(), late.state_dict())
    first, lazy = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for number, moments in lazy.items():
        assert tiny.equal(first[number], moments)
        assert list(first[number]) == list(moments)
        assert [(t.dtype, t.device, t.stride()) for t in first[number].values()] == [
            (t.dtype, t.device, t.stride()) for t in moments.values()
        ]
    (passed_over,) = first.keys() - lazy.keys()
    assert all(not tensor.any() for tensor in first[passed_over].values())


def test_a_state_without_a_value_model_is_held_too(tmp_path: Path) -> None:
    def alone(seed: int) -> State:
        state = new_state(seed)
        state.value = state.value_optimizer = state.controller = None
        return state

    state, other = alone(1), alone(2)
    path = save(tmp_path, state)
    load(path, other)
    assert bits(other) == bits(state) and other.value is None
    other = new_state(2)
    before = bits(other)
    with pytest.raises(UserError, match=r"does not fit this stage: .*value.bias is missing, not torch.float32 \(1,\)"):
        load(path, other)
    assert bits(other) == before


def test_what_no_checkpoint_can_hold_is_refused() -> None:
    state = new_state(1)
    state.note = object()
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        checkpoint.parts(state)


def test_a_state_goes_back_to_the_parts_that_were_stored() -> None:
    state, other = new_state(1), new_state(2)
    train(state)
    before = bits(state)
    clone = checkpoint.Parts(
        {n: t.clone() for n, t in checkpoint.parts(state).tensors.items()}, checkpoint.parts(state).numbers
    )
    train(state)
    checkpoint.restore(other, clone)
    assert bits(other) == before != bits(state)


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    state = new_state(1)
    for quality in (None, 0.1, 0.5, None, 0.2, 0.2):
        train(state)
        save(tmp_path, state, quality)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["00000003", "00000005", "00000006", "latest"]
    assert checkpoint.latest(root) == root / "00000006"
    train(state)
    save(tmp_path, state, 0.5)  # as good: the newer one is the best now
    assert sorted(p.name for p in root.iterdir()) == ["00000006", "00000007", "latest"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux to know what is flushed")
def test_all_is_flushed_before_it_is_named_and_latest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = new_state(1)
    save(tmp_path, state)
    root, events = tmp_path / "checkpoints", []
    flush, rename, replace = os.fsync, Path.rename, Path.replace
    monkeypatch.setattr(os, "fsync", lambda n: events.append(os.readlink(f"/proc/self/fd/{n}")) or flush(n))
    monkeypatch.setattr(Path, "rename", lambda a, b: events.append((str(a), str(b))) or rename(a, b))
    monkeypatch.setattr(Path, "replace", lambda a, b: events.append((str(a), str(b))) or replace(a, b))
    state.step = 1
    save(tmp_path, state)
    partial = str(root / ".saving-00000001")
    named = events.index((partial, str(root / "00000001")))
    written = {f"{partial}/.saving-{name}" for name in ("state.json", "manifest.json", "state.safetensors")}
    assert {*written, partial} <= set(events[:named]) and events[named - 1] == partial
    latest = str(root / ".saving-latest")
    assert events[named + 1 :] == [str(root), latest, (latest, str(root / "latest")), str(root)]


def test_without_a_pointer_the_largest_number_is_the_newest(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert checkpoint.latest(root) is None
    state = new_state(1)
    for _ in range(2):
        train(state)
        save(tmp_path, state)
    (root / "latest").unlink()
    assert checkpoint.latest(root) == root / "00000002"


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    state = new_state(1)
    train(state)
    root = save(tmp_path, state).parent
    before = sorted(root.iterdir())
    (root / ".saving-00000002").mkdir()
    (root / ".saving-00000002" / "state.json").touch()
    (root / ".old-00000000").mkdir()
    (root / ".saving-latest").symlink_to(tmp_path / "elsewhere")
    checkpoint.clean(root)
    assert sorted(root.iterdir()) == before


# ------------------------------------------------------------------------------------------------------------ disk full
def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state(1)
    train(state)
    path = save(tmp_path, state)
    before = bits(state)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    train(state)
    needed = checkpoint.parts(state).nbytes + (1 << 20)
    with pytest.raises(UserError, match=f"{needed:,} bytes needed, 1,000 free"):
        save(tmp_path, state)
    other = new_state(2)
    load(path, other)
    assert bits(other) == before and sorted(p.name for p in path.parent.iterdir()) == ["00000001", "latest"]


def test_a_stage_does_not_begin_without_room_for_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_inputs(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(UserError, match="too full for checkpoints: .* bytes needed, 1,048,576 free"):
        tiny.run_stage("sft", tmp_path)


@pytest.mark.parametrize("function", ["save_file", "write_manifest"])
def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint_whole(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = new_state(1)
    train(state)
    path = save(tmp_path, state)
    before = bits(state)
    train(state)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, function, full)
    with pytest.raises(checkpoint.DiskFull, match=r"No space left.* bytes needed, .* free.*--resume"):
        save(tmp_path, state)
    other = new_state(2)
    load(path, other)
    assert bits(other) == before and sorted(p.name for p in path.parent.iterdir()) == ["00000001", "latest"]


def test_a_real_write_that_fails_is_met_as_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files makes the operating system refuse the write, in a process of its own."""
    state = new_state(1)
    train(state)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            save(tmp_path, state)
        except checkpoint.DiskFull:
            raise SystemExit(7) from None

    assert exit_code(forked(work, tmp_path / "errors")) == 7
    assert list((tmp_path / "checkpoints").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- damage
def flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1 << 4
    path.write_bytes(content)


def flip_tensor(folder: Path, name: str) -> None:
    """Flip a bit in the middle of the first stored tensor whose name ends so."""
    file = folder / "state.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, end = header[next(key for key in sorted(header) if key.endswith(name))]["data_offsets"]
    flip(file, (8 + length + (start + end) / 2) / (len(content) - 1))


def replace_by_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


def seal(folder: Path, **changes: object) -> None:
    """Give a checkpoint a manifest that vouches for what stands there now, as only malice would."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    for name in content["files"]:
        file = folder / name
        if file.is_file():
            content["files"][name] = {"size": file.stat().st_size, "sha256": file_hash(file)}
    content |= changes
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": json_hash(content)}))


def damage_input(newest: Path) -> str:
    stage = newest.parent.parent
    path = next(iter(json.loads((stage / "run.json").read_text())["inputs"]))
    with Path(path).open("a") as file:
        file.write("\n")
    return path


# What is done to the newest checkpoint, and the file that the error must name.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit in a weight": lambda c: flip_tensor(c, "wte.weight") or "state.safetensors",
    "flipped bit in the optimizer": lambda c: flip_tensor(c, "ln_f.bias.exp_avg_sq") or "state.safetensors",
    "flipped bit in a name": lambda c: flip(c / "state.safetensors", 0.001) or "state.safetensors",
    "flipped bit in a number": lambda c: flip(c / "state.json", 0.5) or "state.json",
    "flipped bit in the manifest": lambda c: flip(c / "manifest.json", 0.5) or "manifest.json",
    "truncated file": lambda c: os.truncate(c / "state.safetensors", 5000) or "state.safetensors",
    "empty file": lambda c: os.truncate(c / "state.json", 0) or "state.json",
    "longer file": lambda c: (c / "state.json").open("a").write(" ") and "state.json",
    "missing file": lambda c: (c / "state.safetensors").unlink() or "state.safetensors",
    "missing manifest": lambda c: (c / "manifest.json").unlink() or "manifest.json",
    "missing folder": lambda c: shutil.rmtree(c) or c.name,
    "manifest of another stage": lambda c: seal(c, stage="other") or "manifest.json",
    "checkpoint of another step": lambda c: seal(c, step=1) or "manifest.json",
    "another format": lambda c: seal(c, format=2) or "manifest.json",
    "path out of the folder": lambda c: seal(c, files={"../../../train.jsonl": {"size": 1}}) or "manifest.json",
    "link in place of a file": lambda c: replace_by_link(c / "state.safetensors") or "state.safetensors",
    "settings of another run": lambda c: seal(c, config={}) or c.name,
    "altered metrics": lambda c: flip(c.parent.parent / "metrics.jsonl", 0.99) or "metrics.jsonl",
    "pointer to nowhere": lambda c: (c.parent / "latest").write_text("../../elsewhere") and "latest",
    "altered data file": damage_input,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each stage whose last process died before it wrote the model."""
    runs = {}
    for name, needs in NEEDS.items():
        runs[name] = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp(name), *needs)
        tiny.run_stage(name, runs[name], checkpoint_every=EVERY[name])
        shutil.rmtree(runs[name] / name / "model")
        (runs[name] / name / "stage.json").write_text('{"finished": false}')
    return runs


def copied(run: Path, folder: Path) -> Path:
    """The run in a place of its own; the paths in run.json follow."""
    shutil.copytree(run, folder / "run")
    for file in (folder / "run").glob("*/run.json"):
        file.write_text(file.read_text().replace(str(run), str(folder / "run")))
    return folder / "run"


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", NEEDS)
def test_damage_is_one_clear_error_and_never_loaded(
    name: str, kind: str, stopped: dict[str, Path], tmp_path: Path
) -> None:
    run = copied(stopped[name], tmp_path)
    root = run / name / "checkpoints"
    newest = checkpoint.latest(root)
    file = str(DAMAGE[kind](newest))
    with pytest.raises(UserError) as caught:
        tiny.run_stage(name, run, resume=True, checkpoint_every=EVERY[name])
    message = str(caught.value)
    assert file in message and "\n" not in message and not (run / name / "model").exists()
    if kind == "altered data file":
        assert "altered since" in message and "restore it" in message
        return
    if kind == "settings of another run":
        assert "was written with other settings" in message and "--resume needs the same" in message
        return
    # The error says how to go on; doing it leads to the same result.
    assert message.endswith("; " + checkpoint.GO_ON)
    if kind in ("truncated file", "missing folder"):
        other = max(path for path in root.iterdir() if path.name.isdigit() and path != newest)
        (root / "latest").write_text(f"{other.name}\n")
        tiny.run_stage(name, run, resume=True, checkpoint_every=EVERY[name])
        ours, theirs = (load_file(r / name / "model" / "model.safetensors") for r in (run, tiny.finished_run()))
        assert tiny.equal(ours, theirs)


def test_sizes_are_compared_before_any_content_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state(1)
    folder = save(tmp_path, state)
    with (folder / "state.safetensors").open("ab") as file:
        file.write(b"x")
    monkeypatch.setattr(checkpoint, "file_hash", None)
    with pytest.raises(UserError, match=r"state.safetensors: is not what step 0 left \(size or SHA-256\)"):
        checkpoint.verify(folder)


def test_a_manifest_of_a_monstrous_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, new_state(1))
    os.truncate(folder / "manifest.json", checkpoint.MAX_JSON + 1)
    monkeypatch.setattr(Path, "read_text", None)
    with pytest.raises(UserError, match="manifest.json: larger than any file of its kind"):
        checkpoint.read_manifest(folder)


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    state = new_state(1)
    train(state)
    folder = save(tmp_path, state)
    file = folder / "manifest.json"
    content = file.read_bytes()
    for position in range(0, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="manifest.json"):
            checkpoint.read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"beta": 0.4}, r"--beta 0.4 \(was 0.3\)"), ({"stage": "dpo2"}, None), ({"micro_batch_tokens": 64}, None)],
)
def test_other_settings_are_refused_and_those_that_change_no_result_are_not(
    changes: dict, words: str | None, stopped: dict[str, Path], tmp_path: Path
) -> None:
    run = copied(stopped["dpo"], tmp_path)
    if words:
        with pytest.raises(UserError, match=words):
            tiny.run_stage("dpo", run, resume=True, **changes)
    else:
        tiny.run_stage("dpo", run, resume=True, checkpoint_every=EVERY["dpo"], **changes)


def test_a_state_stays_as_it_was_where_a_checkpoint_does_not_fit(tmp_path: Path) -> None:
    state = new_state(1)
    train(state)
    path = save(tmp_path, state)
    other = new_state(2, torch.float64)
    before = bits(other)
    with pytest.raises(UserError, match=r"does not fit this stage: policy.h.0"):
        load(path, other)
    assert bits(other) == before
    for name, value in (("controller", None), ("note", 0.5), ("step", False), ("policy_optimizer", None)):
        other = new_state(2)
        setattr(other, name, value)
        before = bits(other)
        with pytest.raises(UserError, match=f"does not fit this stage: {name}"):
            load(path, other)
        assert bits(other) == before


# -------------------------------------------------------------------------------------------------------------- malice
class Gadget:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def archive(entry: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(entry, "owned")
    return content.getvalue()


def replace_tensors(content: bytes) -> Callable[[Path, Path], None]:
    def attack(folder: Path, victim: Path) -> None:
        (folder / "state.safetensors").write_bytes(content)
        seal(folder)

    return attack


def pickled(folder: Path, victim: Path) -> None:
    replace_tensors(pickle.dumps(Gadget(victim.with_name("owned"))))(folder, victim)


def traversal(folder: Path, victim: Path) -> None:
    """All hashes are right, so that nothing but the name can give it away."""
    files = {name: folder / name for name in ("state.safetensors", "../../../victim")}
    seal(folder, files={name: {"size": path.stat().st_size, "sha256": file_hash(path)} for name, path in files.items()})


def traversal_of_logs(folder: Path, victim: Path) -> None:
    files = {name: folder.parent.parent / name for name in ("../victim", "timing.jsonl")}
    seal(folder, logs={name: {"size": path.stat().st_size, "sha256": file_hash(path)} for name, path in files.items()})


def sizes(size: object) -> Callable[[Path, Path], None]:
    """Going on would cut the logs to a size that is none."""

    def attack(folder: Path, victim: Path) -> None:
        empty = hashlib.sha256().hexdigest()
        seal(folder, logs={name: {"size": size, "sha256": empty} for name in LOGS})

    return attack


def link(folder: Path, victim: Path) -> None:
    shutil.move(folder / "state.safetensors", victim.with_name("elsewhere"))
    (folder / "state.safetensors").symlink_to(victim.with_name("elsewhere"))


def link_to_folder(folder: Path, victim: Path) -> None:
    folder.rename(victim.with_name("elsewhere"))
    folder.symlink_to(victim.with_name("elsewhere"))


def link_of_logs(folder: Path, victim: Path) -> None:
    """Going on would cut the file short that the link leads to."""
    log = folder.parent.parent / "metrics.jsonl"
    victim.write_bytes(log.read_bytes() + victim.read_bytes())
    log.unlink()
    log.symlink_to(victim)


def pipe(folder: Path, victim: Path) -> None:
    """Opening it would wait for ever."""
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def deep_numbers(folder: Path, victim: Path) -> None:
    (folder / "state.json").write_text("[" * 900 + "]" * 900)
    seal(folder)


def list_of_numbers(folder: Path, victim: Path) -> None:
    numbers = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(list(numbers.items())))
    seal(folder)


def offsets(folder: Path, victim: Path) -> None:
    header = json.dumps({"step": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    replace_tensors(len(header).to_bytes(8, "little") + header)(folder, victim)


MALICE: dict[str, Callable[[Path, Path], None]] = {
    "pickle": pickled,
    "header of 2^63": replace_tensors((1 << 63).to_bytes(8, "little") + b"{}"),
    "header beyond the file": replace_tensors((1000).to_bytes(8, "little") + b"{}"),
    "tensors beyond the file": offsets,
    "archive": replace_tensors(archive("../../../victim")),
    "path traversal": traversal,
    "path traversal of logs": traversal_of_logs,
    "negative sizes": sizes(-1),
    "sizes in words": sizes("0"),
    "link": link,
    "link to a folder": link_to_folder,
    "link of a log": link_of_logs,
    "pipe": pipe,
    "deep nesting of numbers": deep_numbers,
    "a list of numbers": list_of_numbers,
    "deep nesting": lambda folder, victim: (folder / "manifest.json").write_text("[" * 100_000) and None,
    "huge number": lambda folder, victim: seal(folder, step=10**30),
    "wrong kinds": lambda folder, victim: seal(folder, config=[], inputs=3, files=[]),
}


@pytest.mark.parametrize("kind", MALICE)
def test_malicious_files_are_refused_without_side_effect(kind: str, stopped: dict[str, Path], tmp_path: Path) -> None:
    run = copied(stopped["dpo"], tmp_path)
    victim = run / "victim"
    victim.write_text("victim")
    MALICE[kind](checkpoint.latest(run / "dpo" / "checkpoints"), victim)

    def tree() -> dict[str, bytes]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in files}

    before = tree()
    with pytest.raises(UserError):
        tiny.run_stage("dpo", run, resume=True, checkpoint_every=EVERY["dpo"])
    assert tree() == before

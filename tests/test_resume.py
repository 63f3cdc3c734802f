"""Exact resume: a stage that is stopped at any moment and resumed ends with the same bits as one that was not.

The stages are those of `tiny`. A stop is an error raised at a chosen step, before, within or after the optimizer's
work, or while a checkpoint is being written; the real signals are sent to processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import __main__ as pipeline
from minirlhf import distributed, ops, ppo, reward_functions
from minirlhf.config import run_script
from minirlhf.feedback import __main__ as feedback
from minirlhf.runs import checkpoint
from minirlhf.runs import stage as stage_module
from minirlhf.runs.log import read_rows
from minirlhf.runs.stage import Stage
from minirlhf.runtime import DivergenceError, Interrupted, SignalGate, UserError, held_signals, interruptible

MODULES = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo, "dpo": train_dpo}
NEEDS = {"sft": (), "reward": ("sft", "feedback"), "ppo": ("sft", "reward"), "dpo": ("sft", "feedback")}
# checkpoint_every, and the calls of `train_step` at which to stop: PPO makes four in each of its three iterations.
EVERY = {"sft": 4, "reward": 2, "ppo": 1, "dpo": 2}
STOPS = {"sft": (1, 7, 12), "reward": (2, 5), "ppo": (2, 5, 9, 12), "dpo": (1, 4)}
CHANGES = {
    "sft": {"epochs": 4.0, "validation_every": 5},
    "reward": {},
    "ppo": {"kl_target": 0.5, "kl_horizon": 30.0},
    "dpo": {},
}
SAVING = [("sft", "save_file"), ("reward", "write_manifest"), ("ppo", "write_text"), ("dpo", "sync_folder")]


class Stop(Exception):
    """Stands for whatever ends a process."""


def new_run(name: str, folder: Path) -> Path:
    return tiny.copy_of(tiny.finished_run(), folder, *NEEDS[name])


def run(name: str, folder: Path, **changes: object) -> None:
    tiny.run_stage(name, folder, **{"checkpoint_every": EVERY[name], **CHANGES[name], **changes})


def result(folder: Path) -> dict[str, object]:
    """All that must be equal: the model, the last checkpoint's tensors and numbers, the metrics."""
    last = checkpoint.latest(folder / "checkpoints")
    weights = ("model.safetensors", "config.json")
    found = {name: (folder / "model" / name).read_bytes() for name in weights}
    found |= {name: tensor.numpy().tobytes() for name, tensor in load_file(last / "state.safetensors").items()}
    return found | {"numbers": (last / "state.json").read_text(), "metrics": (folder / "metrics.jsonl").read_text()}


def nothing_left_behind(folder: Path) -> None:
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert len(names) <= 4 and not [name for name in names if name.startswith(".")]
    assert [path.name for path in folder.parent.glob(f"{folder.name}*")] == [folder.name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, object]]:
    """The result of a stage that nothing stopped."""
    known: dict[str, dict[str, object]] = {}

    def of(name: str) -> dict[str, object]:
        if name not in known:
            folder = new_run(name, tmp_path_factory.mktemp(name))
            run(name, folder)
            known[name] = result(folder / name)
        return known[name]

    return of


def stop_at(
    patch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    calls: int,
    *,
    after: bool = False,
    error: type[Exception] = Stop,
) -> None:
    """Let the call number `calls` of a function raise an error, before or after its work."""
    function, seen = getattr(owner, name), []

    def stopping(*args: object, **kwargs: object) -> object:
        seen.append(None)
        if len(seen) == calls and not after:
            raise error
        value = function(*args, **kwargs)
        if len(seen) == calls:
            raise error
        return value

    patch.setattr(owner, name, stopping)


AFTER = [(name, calls, True) for name, stops in STOPS.items() for calls in stops]
BEFORE = [("sft", 7, False), ("ppo", 9, False), ("ppo", 12, False), ("dpo", 4, False)]  # of PPO's four minibatches


@pytest.mark.parametrize(("name", "calls", "after"), [*AFTER, *BEFORE])
def test_stopped_within_a_step_and_resumed_ends_with_the_same_bits(
    name: str, calls: int, after: bool, whole: Callable, tmp_path: Path
) -> None:
    """An error before the first optimizer step saves the last finished step; one behind it saves nothing."""
    folder = new_run(name, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, MODULES[name], "train_step", calls, after=after)
        with pytest.raises(Stop):
            run(name, folder)
    done = (calls - 1) // 4 if name == "ppo" else calls - 1
    of_no_step = after or (name == "ppo" and (calls - 1) % 4 > 0)
    done -= done % EVERY[name] if of_no_step else 0
    newest = checkpoint.latest(folder / name / "checkpoints")
    assert (newest and int(newest.name)) == (done or None)
    run(name, folder, resume=True)
    assert result(folder / name) == whole(name)
    nothing_left_behind(folder / name)


@pytest.mark.parametrize(("name", "function"), [*SAVING, ("ppo", "save_file"), ("dpo", "_prune")])
def test_killed_while_saving_and_resumed_ends_with_the_same_bits(
    name: str, function: str, whole: Callable, tmp_path: Path
) -> None:
    folder = new_run(name, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        # Of small files the lock's, the marker and two of the checkpoint's own come before the first `latest`.
        stop_at(patch, checkpoint, function, 5 if function == "write_text" else 2)
        patch.setattr(Stage, "_save_last", lambda self: None)  # a killed process saves nothing
        with pytest.raises(Stop):
            run(name, folder)
    (folder / name / "checkpoints" / ".saving-00000099").mkdir()  # of a step that will not be saved again
    run(name, folder, resume=True)
    assert result(folder / name) == whole(name)
    nothing_left_behind(folder / name)


@pytest.mark.parametrize("name", MODULES)
def test_killed_between_checkpoints_drops_the_rows_since_the_last(name: str, whole: Callable, tmp_path: Path) -> None:
    folder = new_run(name, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, MODULES[name], "train_step", 10 if name == "ppo" else 5, after=True)
        patch.setattr(Stage, "_save_last", lambda self: None)
        with pytest.raises(Stop):
            run(name, folder, checkpoint_every=1 if name == "ppo" else 3)
    with (folder / name / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a row that was being written
    run(name, folder, resume=True)
    assert result(folder / name) == whole(name)
    times = (folder / name / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in times] == [row["step"] for row in read_rows(folder / name)]


@pytest.mark.parametrize("name", MODULES)
def test_killed_after_the_last_step_writes_the_model_from_the_last_checkpoint(
    name: str, whole: Callable, tmp_path: Path
) -> None:
    folder = new_run(name, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, stage_module.tokenizer, "save", 1)
        with pytest.raises(Stop):
            run(name, folder)
    run(name, folder, resume=True)
    assert result(folder / name) == whole(name)


def test_a_finished_stage_is_left_as_it_is(tmp_path: Path) -> None:
    folder = new_run("dpo", tmp_path)
    run("dpo", folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run("dpo", folder, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    with pytest.raises(UserError, match=r"--seed 4 \(was 3\)"):
        run("dpo", folder, resume=True, seed=4)
    model = folder / "dpo" / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="model.safetensors: altered since the stage finished"):
        run("dpo", folder, resume=True)
    (folder / "dpo" / "stage.json").unlink()
    run("dpo", folder, resume=True)  # made again from the last checkpoint, as the message says
    run("dpo", folder, resume=True)


def test_without_resume_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    folder = new_run("dpo", tmp_path)
    run("dpo", folder)
    run("dpo", folder)
    assert (folder / "dpo.1" / "checkpoints" / "latest").exists() and (folder / "dpo" / "model").exists()


def test_resume_with_nothing_there_begins(tmp_path: Path, whole: Callable) -> None:
    folder = new_run("dpo", tmp_path)
    run("dpo", folder, resume=True)
    assert result(folder / "dpo") == whole("dpo")


def test_interrupted_feedback_starts_again_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.finished_run(), tmp_path, "sft")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, feedback, "write_records", 1, after=True)
        with pytest.raises(Stop):
            tiny.run_stage("feedback", folder)
    tiny.run_stage("feedback", folder, resume=True)
    expected = tiny.finished_run() / "feedback" / "rankings.jsonl"
    assert (folder / "feedback" / "rankings.jsonl").read_bytes() == expected.read_bytes()
    assert [path.name for path in folder.glob("feedback*")] == ["feedback"]


def test_the_pipeline_skips_what_is_finished_and_resumes_the_rest(tmp_path: Path) -> None:
    """Stages of `tiny` in the pipeline's loop, stopped in the middle of PPO."""
    ran: list[str] = []

    def stand_in(name: str) -> tuple[Callable, type]:
        def main(config: object) -> None:
            ran.append(name)
            if name == "evaluate":
                (config.run / "answers.jsonl").write_text("")
            else:
                tiny.run_stage(name, config.run, resume=config.resume)

        return main, pipeline.STAGES[name][1]

    tiny.write_inputs(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "STAGES", {name: stand_in(name) for name in pipeline.STAGES})
        patch.setattr(pipeline, "report_on", lambda config: config.run)
        patch.setattr(pipeline, "fresh_folder", lambda run: run)  # the inputs are in it
        with pytest.MonkeyPatch.context() as inner:
            stop_at(inner, train_ppo, "train_step", 6)
            with pytest.raises(Stop):
                pipeline.main(pipeline.Config(run=tmp_path, device="cpu"))
        assert ran == ["sft", "feedback", "reward", "ppo"]
        before = {name: (tmp_path / name / "stage.json").stat().st_mtime_ns for name in ran[:3]}
        pipeline.main(pipeline.Config(run=tmp_path, device="cpu", resume=True))
    assert before == {name: (tmp_path / name / "stage.json").stat().st_mtime_ns for name in before}
    for name in ("sft", "reward", "ppo", "dpo"):
        expected, found = (r / name / "metrics.jsonl" for r in (tiny.finished_run(), tmp_path))
        assert found.read_text() == expected.read_text()


# ------------------------------------------------------------------------------------------------------------- signals
def forked(work: Callable[[], None], errors: Path) -> int:
    """The process id of a copy of this process that does `work` as a script would; its stderr goes to a file."""
    process = os.fork()
    if process:
        return process
    code = 99
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup it is ignored
    try:
        sys.stderr = errors.open("w", buffering=1)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def exit_code(process: int, seconds: float = 120.0) -> int | None:
    """The exit code of a process, None where a signal killed it; it is killed after some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists()


# stage, function during whose call number so-and-so the signal comes, the last finished step
SIGNALS = [
    ("ppo", "collect", 3, signal.SIGTERM, 2),  # while sampling
    ("ppo", "train_step", 5, signal.SIGHUP, 1),  # before the first of an iteration's four optimizer steps
    ("ppo", "train_step", 7, signal.SIGINT, 2),  # after two of them: that iteration is finished first
    ("sft", "held_out", 1, signal.SIGTERM, 5),  # while evaluating, after the optimizer step
]


@pytest.mark.parametrize(("name", "function", "calls", "number", "step"), SIGNALS)
def test_a_signal_acts_at_once_or_after_the_step_and_saves(
    name: str, function: str, calls: int, number: int, step: int, tmp_path: Path, whole: Callable
) -> None:
    folder = new_run(name, tmp_path)
    owner = MODULES[name]
    original, seen = getattr(owner, function), []

    def waiting(*args: object, **kwargs: object) -> object:
        seen.append(None)
        if len(seen) == calls:
            (folder / "here").touch()
            end = time.monotonic() + 1  # a sleep would not go on after a signal that waits
            while time.monotonic() < end:
                time.sleep(0.01)
        return original(*args, **kwargs)

    def script() -> None:
        setattr(owner, function, waiting)
        sys.argv = ["script.py"]
        run_script(lambda _: run(name, folder, checkpoint_every=1000), {"tiny": tiny.STAGES[name][1](folder)})

    process = forked(script, tmp_path / "errors")
    wait_for(folder / "here")
    os.kill(process, number)
    assert exit_code(process) == 128 + number
    errors = (tmp_path / "errors").read_text()
    assert f"step {step} of" in errors and "Traceback" not in errors
    assert checkpoint.latest(folder / name / "checkpoints").name == f"{step:08d}"
    run(name, folder, resume=True)
    assert result(folder / name) == whole(name)


def test_a_signal_that_a_library_swallows_acts_after_the_step(
    tmp_path: Path, whole: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, step, calls = new_run("sft", tmp_path), train_sft.train_step, []

    def swallowing(*args: object, **kwargs: object) -> dict:
        calls.append(None)
        if len(calls) == 3:
            with contextlib.suppress(Interrupted):
                signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted), interruptible():
        patch.setattr(train_sft, "train_step", swallowing)
        run("sft", folder, checkpoint_every=1000)
    assert checkpoint.latest(folder / "sft" / "checkpoints").name == "00000003"
    run("sft", folder, resume=True)
    assert result(folder / "sft") == whole("sft")


def test_a_signal_that_comes_while_the_processes_agree_that_there_was_none_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage.__new__(Stage)
    stage._gate = SignalGate()

    def agree(own: torch.Tensor) -> torch.Tensor:
        stage._gate.waiting = signal.SIGTERM
        return own

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_max", agree)
    stage._stop_where_asked()
    with pytest.raises(Interrupted):
        stage._stop_where_asked()
    monkeypatch.setattr(SignalGate, "raised", signal.SIGHUP)  # and one that a library swallowed is agreed upon too
    with pytest.raises(Interrupted) as caught:
        stage._stop_where_asked()
    assert caught.value.number == signal.SIGHUP


def test_signals_wait_while_they_are_held() -> None:
    done = []
    with pytest.raises(Interrupted) as caught, interruptible():
        with held_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append("held")
        done.append("never")
    assert done == ["held"] and caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_while_a_signal_waits_a_second_leaves_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    def work() -> None:
        gate = SignalGate("stopping after this step")
        gate.close()
        os.kill(os.getpid(), signal.SIGTERM)
        gate.close()  # closed already
        (tmp_path / "here").touch()
        time.sleep(60)

    process = forked(work, tmp_path / "errors")
    wait_for(tmp_path / "here")
    os.kill(process, signal.SIGHUP)
    assert exit_code(process) == 128 + signal.SIGHUP
    assert capfd.readouterr().err == "\nstopping after this step\n"


def test_signals_that_are_ignored_stay_ignored() -> None:
    """`nohup` lets a run go on without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(), held_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    def work() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(9)
            finally:
                (tmp_path / "here").touch()
                time.sleep(9)
                (tmp_path / "too late").touch()

    process = forked(work, tmp_path / "errors")
    wait_for(tmp_path / "here")
    os.kill(process, signal.SIGINT)
    assert exit_code(process, 5.0) == 130 and not (tmp_path / "too late").exists()


# ---------------------------------------------------------------------------------------------------- not finite, full
def poison(patch: pytest.MonkeyPatch, name: str, value: float) -> str:
    """From the third optimizer step on, the loss of a stage is `value`; returns the tensor that is to be named."""
    module, function = {
        "sft": (train_sft, "masked_mean"),
        "reward": (train_reward, "bradley_terry_loss"),
        "dpo": (train_dpo, "dpo_loss"),
        "ppo": (ppo, "policy_loss"),
    }[name]
    original, state = getattr(module, function), []
    step = MODULES[name].train_step

    def counted(*args: object, **kwargs: object) -> object:
        state.append(None)
        return step(*args, **kwargs)

    def poisoned(*args: object, **kwargs: object) -> object:
        loss = original(*args, **kwargs)
        return loss * value if len(state) >= 3 else loss

    patch.setattr(MODULES[name], "train_step", counted)
    patch.setattr(module, function, poisoned)
    return "policy loss" if name == "ppo" else "loss"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", MODULES)
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(
    name: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run(name, tmp_path)
    tensor = poison(monkeypatch, name, value)
    done = 0 if name == "ppo" else 2
    with pytest.raises(DivergenceError, match=f"^{name}, step {done}: {tensor} is"):
        run(name, folder)
    if done:
        saved = load_file(checkpoint.latest(folder / name / "checkpoints") / "state.safetensors")
        assert all(torch.isfinite(t).all() for t in saved.values()) and len(read_rows(folder / name)) == done


@pytest.mark.parametrize("what", ["scores", "advantages"])
def test_scores_and_advantages_that_are_not_finite_stop_ppo(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run("ppo", tmp_path)
    if what == "scores":
        monkeypatch.setattr(
            reward_functions, "reward_function", lambda _: lambda b: torch.full((len(b),), float("nan"))
        )
        changes = {"missing_eos_score": None}
    else:
        monkeypatch.setattr(ops, "whiten", lambda x, mask: x / 0)
        changes = {}
    with pytest.raises(DivergenceError, match=f"^ppo, step 0: {what} "):
        run("ppo", folder, **changes)


def test_gradients_that_are_not_finite_are_named_with_stage_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run("dpo", tmp_path)
    clip = train_dpo.clip_gradients

    def broken(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
        model.wpe.weight.grad[0, 0] = float("inf")
        return clip(model, max_norm)

    monkeypatch.setattr(train_dpo, "clip_gradients", broken)
    with pytest.raises(DivergenceError, match=r"^dpo, step 0: gradient norm is inf \(first in wpe.weight\)"):
        run("dpo", folder)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run("dpo", tmp_path)
    finish = Stage.finish

    def breaking(self: Stage, step: int, *args: object, **kwargs: object) -> None:
        if step == 3:
            self.state.policy.wte.weight.data[0, 0] = float("nan")
        finish(self, step, *args, **kwargs)

    monkeypatch.setattr(Stage, "finish", breaking)
    with pytest.raises(UserError, match="policy.wte.weight is not finite after step 4"):
        run("dpo", folder)
    checkpoint.verify(checkpoint.latest(folder / "dpo" / "checkpoints"))
    assert checkpoint.latest(folder / "dpo" / "checkpoints").name == "00000002"


def test_out_of_memory_names_batch_peak_and_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run("sft", tmp_path)
    message = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"

    def full(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "held_out", full)
        pattern = r"sft, step 4: out of memory with --micro-batch-tokens 128 --batch-size 8; the peak was [\d.]+ GiB"
        advice = ". Try --micro-batch-tokens 64, then --gradient-checkpointing, then --batch-size 4;"
        with pytest.raises(UserError, match=pattern + advice):
            run("sft", folder)
    run("sft", folder, resume=True, micro_batch_tokens=64)  # what the message says to try
    assert len(read_rows(folder / "sft")) == 12

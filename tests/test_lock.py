"""One process writes a folder at a time, and a lock ends with the process that held it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import tiny
from test_resume import exit_code, forked, new_run, wait_for

import train_dpo
from minirlhf import __main__ as pipeline
from minirlhf.runs import checkpoint, lock
from minirlhf.runs.lock import lock_file
from minirlhf.runtime import UserError


def hold(folder: Path, signs: Path) -> int:
    """A process that writes `folder` until it is killed; returns its id once it does."""

    def work() -> None:
        with lock.only_writer(folder):
            (signs / "held").touch()
            time.sleep(20)

    process = forked(work, signs / "errors")
    wait_for(signs / "held")
    return process


def test_another_process_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    run = new_run("dpo", tmp_path / "run")
    tiny.run_stage("dpo", run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    holder = hold(run / "dpo", tmp_path)
    for resume in (False, True):
        (run / "dpo" / "stage.json").write_text('{"finished": false}')
        with pytest.raises(UserError, match=f"dpo: process {holder} is writing there; wait .* another --run"):
            tiny.run_stage("dpo", run, resume=resume)
    with pytest.raises(UserError, match=f"process {holder} is writing there"):
        pipeline.main(pipeline.Config(run=run, device="cpu"))  # would move the whole run aside
    changed = {path for path, content in files.items() if path.read_bytes() != content}
    assert changed == {run / "dpo" / "stage.json"} and not list(tmp_path.glob("run.*"))
    # Killed, not ended in order: its lock goes with it.
    os.kill(holder, signal.SIGKILL)
    assert exit_code(holder) is None and lock_file(run / "dpo").exists()
    tiny.run_stage("dpo", run, resume=True)
    assert not lock_file(run / "dpo").exists()


def test_a_stage_gives_its_lock_back_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("dpo", tmp_path)
    held = []

    def look(*args: object, **kwargs: object) -> None:
        held.append(lock_file(run / "dpo").read_text())
        raise RuntimeError("stop here")

    with monkeypatch.context() as patch:
        patch.setattr(train_dpo, "train_step", look)
        with pytest.raises(RuntimeError, match="stop here"):
            tiny.run_stage("dpo", run)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "require_space", look)  # while it begins, with the lock already taken
        with pytest.raises(RuntimeError, match="stop here"):
            tiny.run_stage("dpo", run)
    assert held == [str(os.getpid())] * 2
    with lock.only_writer(run / "dpo"):
        assert lock_file(run / "dpo").exists()


def test_other_stages_of_the_run_may_go_on(tmp_path: Path) -> None:
    run = new_run("dpo", tmp_path / "run")
    holder = hold(run / "ppo", tmp_path)
    tiny.run_stage("dpo", run)
    os.kill(holder, signal.SIGKILL)
    exit_code(holder)


def test_a_lock_file_that_its_holder_removed_meanwhile_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening the file and our locking it the last holder removes it: a third process makes a new one."""
    opened, folder = os.open, tmp_path / "stage"
    removed = []

    def late(path: Path, *args: object) -> int:
        number = opened(path, *args)
        if not removed:
            removed.append(path)
            Path(path).unlink()
        return number

    monkeypatch.setattr(os, "open", late)
    with lock.only_writer(folder):
        assert removed == [lock_file(folder)] and lock_file(folder).exists()

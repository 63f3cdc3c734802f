"""One process writes a folder at a time, and a lock ends with the process that held it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
from test_resume import exit_code, forked, new_run, wait_for

import train_dpo
from minirlhf import __main__ as pipeline
from minirlhf.runs import checkpoint
from minirlhf.runtime import UserError


def lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def lock_files(folder: Path) -> list[str]:
    """Names of what a writer of `folder` has put beside it."""
    return sorted(path.name for path in folder.parent.glob(f".{folder.name}*"))


def hold(folder: Path, signs: Path) -> int:
    """A process that writes `folder` until it is killed; returns its id once it does."""

    def work() -> None:
        with checkpoint.only_writer(folder):
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
        with pytest.raises(
            UserError, match=f"dpo: process {holder} is writing there; wait for its end .* another --run"
        ):
            tiny.run_stage("dpo", run, resume=resume)
    with pytest.raises(UserError, match=f"process {holder} is writing there"):
        pipeline.main(pipeline.Config(run=run, device="cpu"))  # would move the whole run aside
    changed = {path for path, content in files.items() if path.read_bytes() != content}
    assert changed == {run / "dpo" / "stage.json"} and not list(tmp_path.glob("run.*"))
    # Killed, not ended in order: its lock goes with it.
    os.kill(holder, signal.SIGKILL)
    assert exit_code(holder) is None and lock_files(run / "dpo") == [".dpo.lock", ".dpo.pid"]
    tiny.run_stage("dpo", run, resume=True)
    assert not lock_files(run / "dpo")


def test_a_stage_gives_its_lock_back_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("dpo", tmp_path)
    held = []

    def look(*args: object, **kwargs: object) -> None:
        held.append(lock_file(run / "dpo").with_suffix(".pid").read_text())
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
    with checkpoint.only_writer(run / "dpo"):
        assert lock_file(run / "dpo").exists()
    assert not lock_files(run / "dpo")


def test_other_stages_of_the_run_may_go_on(tmp_path: Path) -> None:
    run = new_run("dpo", tmp_path / "run")
    holder = hold(run / "ppo", tmp_path)
    tiny.run_stage("dpo", run)
    os.kill(holder, signal.SIGKILL)
    exit_code(holder)


def test_a_lock_that_its_holder_removes_while_others_take_it_never_has_two_holders(tmp_path: Path) -> None:
    """Three processes take it and give it back as fast as they can; each would meet another's mark inside."""
    folder, mark = tmp_path / "stage", tmp_path / "mark"

    def work() -> None:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            with contextlib.suppress(UserError), checkpoint.only_writer(folder):
                mark.mkdir()  # fails where another is inside
                mark.rmdir()

    processes = [forked(work, tmp_path / f"errors{number}") for number in range(3)]
    assert [exit_code(process) for process in processes] == [0] * 3
    assert not lock_files(folder)


def test_links_in_place_of_its_files_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("victim")
    (tmp_path / ".stage.pid").symlink_to(victim)
    with checkpoint.only_writer(tmp_path / "stage"):
        pass
    (tmp_path / ".stage.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), checkpoint.only_writer(tmp_path / "stage"):
        pass
    assert victim.read_text() == "victim"

"""`--track`: what a tracker is given, that nobody is asked for an account, and what is said where it is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import train_dpo
from minirlhf.config import run_script
from minirlhf.model import GPT
from minirlhf.runs.log import read_rows, require_tracker
from minirlhf.runtime import UserError

# A package that writes down what it is told.
WANDB = """
import json, pathlib

class Run:
    def __init__(self, settings):
        self.told = {"settings": settings, "rows": [], "finished": False}
        self.file = pathlib.Path(settings["dir"]) / "told.json"
    def log(self, values, step):
        self.told["rows"].append({"step": step, **values})
    def finish(self):
        self.told["finished"] = True
        self.file.write_text(json.dumps(self.told))

def init(**settings):
    return Run(settings)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "feedback")


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def without_rate(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    assert all(row["tokens_per_second"] > 0 for row in rows)
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_wandb_is_given_every_row_and_stays_offline(run: Path, wandb: None) -> None:
    tiny.run_stage("dpo", run, track="wandb")
    told = json.loads((run / "dpo" / "tracked" / "told.json").read_text())
    settings = told["settings"]
    assert settings["mode"] == "offline" and settings["project"] == "minirlhf" and settings["name"] == "run/dpo"
    assert settings["config"]["beta"] == tiny.dpo_config(run).beta and settings["config"]["run"] == str(run)
    assert without_rate(told["rows"]) == read_rows(run / "dpo") and told["finished"]
    assert read_rows(run / "dpo") == read_rows(tiny.finished_run() / "dpo")  # looking on changes nothing


def test_wandb_goes_online_where_the_user_says_so(run: Path, wandb: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    tiny.run_stage("dpo", run, track="wandb")
    assert json.loads((run / "dpo" / "tracked" / "told.json").read_text())["settings"]["mode"] == "online"


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    made: list[Writer] = []

    def __init__(self, folder: str, *, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.rows, self.closed = folder, purge_step, {}, False
        self.made.append(self)
        (Path(folder) / "events").write_text("")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.setdefault(step, {"step": step})[name] = value

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))


def test_tensorboard_goes_on_where_the_run_does(run: Path, tensorboard: None) -> None:
    step, calls = train_dpo.train_step, []

    def stopping(*args: object, **kwargs: object) -> dict:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            tiny.run_stage("dpo", run, track="tensorboard", checkpoint_every=2)
    tiny.run_stage("dpo", run, track="tensorboard", resume=True)
    first, second = Writer.made
    assert first.closed and second.closed and first.folder == second.folder == str(run / "dpo" / "tracked")
    assert first.purge_step is None and second.purge_step == 3  # steps 0, 1 and 2 are done
    rows = [*first.rows.values(), *second.rows.values()]
    assert without_rate(rows) == read_rows(run / "dpo")


def test_a_tracker_may_come_and_go(run: Path, tensorboard: None) -> None:
    tiny.run_stage("dpo", run, track="tensorboard")
    tiny.run_stage("dpo", run, resume=True)  # finished: no tracker is part of what it must be the same in
    (run / "dpo" / "tracked" / "events").unlink()
    tiny.run_stage("dpo", run, resume=True)
    assert len(Writer.made) == 1


def test_tensorboard_itself_reads_the_rows(run: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tiny.run_stage("dpo", run, track="tensorboard")
    seen = events.EventAccumulator(str(run / "dpo" / "tracked"))
    seen.Reload()
    rows = read_rows(run / "dpo")
    assert [event.step for event in seen.Scalars("loss")] == [row["step"] for row in rows]
    assert [event.value for event in seen.Scalars("loss")] == [row["loss"] for row in rows]  # both are float32
    assert len(seen.Scalars("validation_loss")) == sum("validation_loss" in row for row in rows)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_any_weights(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(GPT, "from_pretrained", loaded)
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--run", str(run), "--device", "cpu", "--track", name])
    with pytest.raises(SystemExit) as stop:
        run_script(train_dpo.main, train_dpo.PRESETS)
    assert stop.value.code == 2 and not (run / "dpo").exists()
    error = f"error: --track {name}: this package is not installed; install it with `pip install {name}`\n"
    assert capsys.readouterr().err == error


def test_a_folder_that_wandb_left_behind_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(UserError, match="--track wandb: this package is not installed"):
        require_tracker("wandb")
    require_tracker(None)


def test_an_unknown_tracker_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--track", "mlflow"])
    with pytest.raises(SystemExit) as stop:
        run_script(train_dpo.main, {"tiny": replace(train_dpo.PRESETS["tiny"])})
    assert stop.value.code == 2 and "tensorboard" in capsys.readouterr().err

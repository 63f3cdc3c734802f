"""The log of a stage: what is written, and that nothing is overwritten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minirlhf.files import file_hash, fresh_folder, source_hash
from minirlhf.runs.log import RunLog, read_rows


@dataclass
class Config:
    run: Path = Path("here")
    beta: float = 0.1
    stop: float | None = None


def test_rows_are_written_in_order_without_clock_times(tmp_path: Path) -> None:
    began = time.perf_counter()
    log = RunLog(tmp_path / "sft", Config(), steps=2)
    time.sleep(0.02)
    log.row(0, {"loss": torch.tensor(0.5), "count": 3}, tokens=10)
    log.row(1, {"loss": 0.25}, tokens=20)
    log.close()
    seconds = time.perf_counter() - began
    expected = [{"step": 0, "loss": 0.5, "count": 3.0}, {"step": 1, "loss": 0.25}]
    assert read_rows(tmp_path / "sft") == expected
    times = [json.loads(line) for line in (tmp_path / "sft" / "timing.jsonl").read_text().splitlines()]
    assert [t["step"] for t in times] == [0, 1]
    assert 0.02 < sum(t["seconds"] for t in times) <= seconds  # a row's time is that since the row before
    for tokens, t in zip((10, 20), times, strict=True):
        assert t["seconds"] > 0 and t["tokens_per_second"] == pytest.approx(tokens / t["seconds"])


def test_a_float32_metric_keeps_its_digits(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "sft", Config())
    value = torch.tensor(0.1)
    log.row(0, {"loss": value}, tokens=1)
    log.close()
    assert torch.tensor(read_rows(tmp_path / "sft")[0]["loss"]) == value


def test_run_json_says_what_was_run(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("hello")
    RunLog(tmp_path / "sft", Config(run=tmp_path), inputs={str(data): source_hash(data)}).close()
    run = json.loads((tmp_path / "sft" / "run.json").read_text())
    assert run["config"] == {**dataclasses.asdict(Config()), "run": str(tmp_path)}
    assert run["inputs"] == {str(data): hashlib.sha256(b"hello").hexdigest()}
    assert run["versions"]["torch"] == torch.__version__
    assert file_hash(data) == hashlib.sha256(b"hello").hexdigest()


def test_an_earlier_run_moves_to_the_first_free_name_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert fresh_folder(folder) == folder and folder.is_dir()
    assert fresh_folder(folder) == folder  # an empty one is good as it is
    assert capsys.readouterr().out == ""
    for number in (1, 2):
        (folder / f"file{number}").write_text("kept")
        fresh_folder(folder)
        assert list(folder.iterdir()) == []
        old = tmp_path / f"run.{number}"
        assert [f.name for f in old.iterdir()] == [f"file{number}"]
        assert f"{folder} held an earlier run: it is now {old}" in capsys.readouterr().out

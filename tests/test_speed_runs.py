"""The speed benchmarks run, at a size that takes no time, and compare what they should. No test asserts a time."""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import padding
import speed
import speed_all
import speed_dpo
import speed_gains
import speed_generate
import speed_ppo
import speed_reward
import speed_scaling
import speed_sft
import worker
import workloads

from minirlhf import model, rollout
from minirlhf.batch import Example
from minirlhf.comparisons import Comparison

BENCHMARKS = Path(speed.__file__).parent
SMOKE = workloads.SIZES["smoke"]


class Here:
    """A channel to nobody: a worker's step runs in the test's own process."""

    def __init__(self) -> None:
        self.state = -1
        self.now = iter(range(10**6)).__next__

    def ready(self, state: int) -> None:
        self.state = state


def settings(**more: Any) -> argparse.Namespace:
    known = {"size": "smoke", "dtype": "float32", "device": "cpu", "threads": 1, "clock": "cpu", "peer": None}
    return argparse.Namespace(**known | {"rounds": 4, "seconds": 60.0} | more)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PPO benchmark puts a clock into `rollout.sample`; take it out again."""
    monkeypatch.setattr(rollout, "sample", rollout.sample)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("script", "models"), [(speed_sft, 1), (speed_reward, 1), (speed_dpo, 1), (speed_ppo, 2), (speed_generate, 0)]
)
def test_each_stage_makes_steps(script: Any, models: int, dtype: str, untouched: None) -> None:
    channel = Here()
    step = script.prepare(settings(dtype=dtype), channel)
    parts = [step(number) for number in range(3)]  # one more than there are batches
    weights = 4 * workloads.parameters(SMOKE)
    assert channel.state == pytest.approx(3 * models * weights, rel=0.01)  # gradients and two moments, and small heads
    assert all(seconds > 0 for part in parts if part for seconds in part.values())


FAKE = """
import json, sys
print(json.dumps({"ready": True, "trl": "1.0"}), flush=True)
log = open(sys.argv[1], "a")
seconds = float(sys.argv[2])
for line in sys.stdin:
    for _ in range(int(line)):
        log.write(sys.argv[3]); log.flush()
        if seconds < 0: raise RuntimeError("no more memory here")
        print(json.dumps({"seconds": seconds, "scoring_s": seconds / 2, "wall": 1.0, "others": 0.25,
                          "peak_mib": 90, "above_floor_mib": 10 * seconds}), flush=True)
"""


def fake_sides(monkeypatch: pytest.MonkeyPatch, log: Path, **seconds: float) -> None:
    sides = {name: [sys.executable, "-c", FAKE, str(log), str(value), name[0]] for name, value in seconds.items()}
    monkeypatch.setattr(speed, "commands", lambda stage, given: sides)


def test_sides_take_turns_and_their_medians_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sides(monkeypatch, tmp_path / "log", ours=2.0, trl=6.0)
    results = speed.compare("dpo", settings(), {"float32": 50.0})
    assert (tmp_path / "log").read_text() == "ot" + 4 * "ot"  # a warm-up each, then turns
    mine, peer = results
    assert (mine["median_s"], peer["median_s"], mine["n"], mine["parts"]) == (2.0, 6.0, 4, {"scoring_s": 1.0})
    assert (mine["rate"], mine["unit"], mine["others"]) == (SMOKE.pairs / 2.0, "pairs/s", 0.25)
    page = "\n".join(speed_all.against_peers([r | {"size": "4x128"} for r in results]))
    assert "| 3.00 | 4.0 | missed by 25% | 0.33 | 0.4 | met |" in page


def test_a_worker_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sides(monkeypatch, tmp_path / "log", ours=-1.0)
    with pytest.raises(SystemExit, match="(?s)ours: the worker ended.*no more memory here"):
        speed.compare("sft", settings(), {"float32": 50.0})


def test_the_table_of_a_real_worker(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    choice = ["--size", "smoke", "--stages", "generate", "--rounds", "3", "--matrix", "64", "--threads", "1"]
    results = speed_all.main([*choice, "--out", str(tmp_path)])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| generate | smoke"))
    assert "| 3 |" in row and "tokens/s" in row
    written = json.loads(next(tmp_path.glob("*-speed.json")).read_text())
    assert written["results"] == results and written["torch"] == torch.__version__


def test_a_worker_answers_step_by_step(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    stdout = os.dup(1)
    channel = worker.Channel(settings())
    os.system("echo a library says hello")
    channel.ready(2**20, trl="1.0")
    for _ in range(2):
        channel.wait()
        torch.ones(2**24).sum()
        channel.done(scoring_s=3.0)
    channel.answers.close()
    os.dup2(stdout, 1)
    out, error = capfd.readouterr()
    ready, *steps = map(json.loads, out.splitlines())
    assert ready["trl"] == "1.0" and "hello" in error  # what a library prints is no answer
    assert [step["scoring_s"] for step in steps] == [3.0, 3.0]
    assert all(0 < step["above_floor_mib"] < 70 for step in steps)  # 64 of the ones, 1 of them expected


def test_the_bound_of_decoding_reads_weights_and_cache_once_a_token() -> None:
    size = replace(SMOKE, rows=2, prompt_length=3, new_tokens=2)
    cache = 2 * 1 * 16 * 4 * 2  # keys and values, 1 layer of 16 channels, float32, 2 rows: bytes a position
    expected = 2 * 4 * workloads.parameters(size) + cache * (3 + 4)
    assert speed_all.decode_bound(size, 1e-9, "float32") == expected  # at one byte a second


def test_live_bytes_counts_what_is_alive_at_once() -> None:
    with speed_scaling.LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        a = b.view(10, 100)  # no storage of its own
        c = torch.zeros(1500)
    assert live.peak == 4 * 2500 and live.now == 4 * 2500
    del a, b, c
    assert live.now == 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaling benchmark at a size that takes no time, with logits in chunks as at the true one."""
    monkeypatch.setattr(speed_scaling, "SHAPE", workloads.Size(1, 2, 16, 64, 1024))
    monkeypatch.setattr(speed_scaling, "SCORED", replace(speed_scaling.SCORED, vocabulary=2048))
    monkeypatch.setattr(model, "MAX_LOGITS", 64 * 2048)


def test_memory_of_scoring_stops_growing_with_length(small: None) -> None:
    short, long = speed_scaling.scoring(64), speed_scaling.scoring(128)
    assert long.all_logits_mib == 2 * short.all_logits_mib
    assert long.mib < 1.1 * short.mib and long.mib < long.all_logits_mib  # hidden states alone grow


def test_the_scaling_plot_is_drawn(small: None, tmp_path: Path) -> None:
    series = speed_scaling.main(["--rounds", "1", "--points", "2", "--threads", "1", "--out", str(tmp_path)])
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png"}
    assert all(points[0].seconds > 0 for name, points in series.items() if name != "scoring")


def test_padding_is_what_the_longest_row_of_a_micro_batch_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "micro_batches", lambda lengths, budget: [torch.arange(len(lengths))])

    def example(prompt: int, response: int) -> Example:
        return Example([5] * prompt, [6] * response)

    lengths = [(1, 9), (2, 3)] * 16  # 32 rows, the batch of the small preset: 16 of 10 tokens and 16 of 5
    texts = {
        "demonstrations": [example(*n) for n in lengths],
        "comparisons": [Comparison([example(4, 2), example(4, 6)], [(0, 1)]) for _ in range(32)],
    }
    result = padding.measure("sft", "tiny", texts)
    assert (result["padding"], result["micro_batches_a_step"]) == (0.25, 1.0)  # 80 of 320 positions
    assert padding.measure("dpo", "tiny", texts)["apart"] == round(16 / 12, 2)  # a prompt of 4 twice, not once


def test_both_ways_of_everything_run() -> None:
    results = speed_gains.main(["--size", "smoke", "--rounds", "1", "--threads", "1"])
    assert [r["name"] for r in results] == list(speed_gains.WAYS)
    assert all(r["ours_ms"] > 0 and r["plain_ms"] > 0 for r in results)


def test_padding_of_real_dialogues(real_data: Path) -> None:
    results = padding.main(["--limit", "70"])
    assert len(results) == 8 and all(0 <= r["padding"] < 1 for r in results)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_peers_need_nothing_of_this_project() -> None:
    peers = [*(BENCHMARKS / "peers").glob("*.py"), BENCHMARKS / "workloads.py", BENCHMARKS / "worker.py"]
    assert len(peers) == 8
    for path in peers:
        assert not [name for name in imports(path) if name.split(".")[0] in ("minirlhf", "ours") or "train_" in name]

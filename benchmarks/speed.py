"""What the speed benchmarks share: two sides in alternation, the machine's peak, a line of JSON a result, a table.

A side is a worker (worker.py) in a process of its own, with an interpreter of its own: ours runs the stage's script
with --worker, a peer runs one of peers/*.py where its library is installed. Both stand ready with the same batches,
both are warmed, and then they make steps in turn, the other one waiting: what disturbs the machine disturbs both.

    python benchmarks/speed_dpo.py                                                       # ours at 4x128, float32
    python benchmarks/speed_dpo.py --size 124M --dtype bfloat16 --peer trl/bin/python     # beside TRL

Medians and quartiles are of single steps. `share` is that of the matrix peak measured at the start in the same number
format. `others` is the number of cores that other processes used meanwhile: above 0.1 the times mean little, and with
several threads a busy neighbour makes steps many times slower; --threads 1 --clock cpu is then the lesser evil.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worker
import workloads

HERE = Path(__file__).resolve().parent
LIMIT = 0.1  # cores that others may use
DEFAULT_MATRIX = {"cpu": 2048, "cuda": 8192}
PEERS = {  # the peer of a stage: name, its script
    "sft": {"trl": "sft", "transformers": "sft"},
    "reward": {"trl": "reward"},
    "dpo": {"trl": "dpo"},
    "ppo": {"trl": "ppo"},
    "generate": {"transformers": "generate"},
}
Prepare = Callable[[argparse.Namespace, worker.Channel], Callable[[int], dict[str, float] | None]]


# --------------------------------------------------------------------------------------------------------- the machine
def seconds_of(function: Callable[[], object], given: argparse.Namespace) -> float:
    """The median of seven calls, on the clock of the comparison."""
    clock, times = worker.clock_of(given), []
    for _ in range(9):
        start = clock()
        function()
        times.append(clock() - start)
    return float(np.median(times[2:]))


def matrix_peak(dtype: torch.dtype, given: argparse.Namespace) -> float:
    """GFLOP/s of a linear layer on large square matrices."""
    n = given.matrix or DEFAULT_MATRIX[given.device]
    x, weight = (torch.randn(n, n, dtype=dtype, device=given.device) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: torch.nn.functional.linear(x, weight), given) / 1e9


def memory_bandwidth(given: argparse.Namespace) -> float:
    """GB/s of a large copy, read and written: what bounds a decode step on a GPU."""
    x = torch.zeros(16 * (given.matrix or DEFAULT_MATRIX[given.device]) ** 2, device=given.device)
    y = torch.zeros_like(x)
    return 2 * x.numel() * 4 / seconds_of(lambda: y.copy_(x), given) / 1e9


# ------------------------------------------------------------------------------------------------------- the two sides
class Side:
    """A worker and what it has measured."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name, self.steps = name, []
        self.log = tempfile.TemporaryFile("w+")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def read(self) -> dict[str, Any]:
        """The next answer; ends the program with the worker's last words where there is none."""
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name}: the worker ended\n" + "".join(self.log.readlines()[-15:]))
        return json.loads(line)

    def run(self, count: int, *, keep: bool) -> None:
        """Let it make so many steps."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answers = [self.read() for _ in range(count)]
        self.steps += answers if keep else []

    def close(self) -> None:
        """End the worker."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def commands(stage: str, given: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of every side: ours, and the peers where an interpreter for them is given."""
    names = ("size", "dtype", "device", "threads", "clock")
    settings = [word for name in names for word in (f"--{name}", str(getattr(given, name)))]
    result = {"ours": [sys.executable, str(HERE / f"speed_{stage}.py"), "--worker", *settings]}
    if given.peer:
        for name, script in PEERS[stage].items():
            result[name] = [given.peer, str(HERE / "peers" / f"{script}.py"), "--variant", name, *settings]
    return result


def compare(stage: str, given: argparse.Namespace, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Measure all sides in alternation; one result a side, the first ours."""
    size = workloads.size_of(given.size, given.device)
    sides = [Side(name, command, given.threads) for name, command in commands(stage, given).items()]
    try:
        about = {side.name: side.read() for side in sides}
        for side in sides:
            side.run(2 if size.turn > 1 else 1, keep=False)
        start, rounds = time.perf_counter(), 0
        while rounds < given.rounds and (rounds < 3 or time.perf_counter() - start < given.seconds):
            for side in sides:
                side.run(size.turn, keep=True)
            rounds += 1
    finally:
        for side in sides:
            side.close()
    return [result(stage, given, side, about[side.name], peaks) for side in sides]


def result(
    stage: str, given: argparse.Namespace, side: Side, about: dict[str, Any], peaks: dict[str, float]
) -> dict[str, Any]:
    """One side's figures: seconds, rate, GFLOP/s of useful work, share of the peak, memory, disturbance."""
    size = workloads.size_of(given.size, given.device)
    lower, median, upper = np.percentile([step["seconds"] for step in side.steps], [25, 50, 75])
    count, unit = workloads.items(stage, size)
    gflops = workloads.useful_flops(stage, size) / median / 1e9
    parts = sorted(name for name in side.steps[0] if name.endswith("_s"))
    wall = sum(step["wall"] for step in side.steps)
    names = ("size", "dtype", "device", "threads", "clock")
    return {
        **{"stage": stage, "side": side.name, **{name: getattr(given, name) for name in names}},
        **{"median_s": round(median, 4), "lower_s": round(lower, 4), "upper_s": round(upper, 4), "n": len(side.steps)},
        "parts": {name: round(float(np.median([step[name] for step in side.steps])), 4) for name in parts},
        **{"rate": round(count / median, 2), "unit": f"{unit}/s", "gflops": round(gflops, 1)},
        "share": round(gflops / peaks[given.dtype], 3),
        "peak_mib": round(max(step["peak_mib"] for step in side.steps)),
        "above_floor_mib": round(max(step["above_floor_mib"] for step in side.steps), 1),
        "others": round(max(0.0, sum(step["others"] for step in side.steps)) / wall, 2) if wall else 0.0,
        "about": {name: value for name, value in about.items() if name != "ready"},
    }


# -------------------------------------------------------------------------------------------------------- the programs
def parser(description: str | None) -> argparse.ArgumentParser:
    """The settings of a comparison."""
    result = worker.parser(description)
    result.add_argument("--peer", help="Python interpreter with TRL; PPO's is found through TRL_PPO_PATH")
    result.add_argument("--matrix", type=int, help="side of the matrices of the peak; by default 2048, on a GPU 8192")
    result.add_argument("--rounds", type=int, default=8, help="turns of each side")
    result.add_argument(
        "--seconds", type=float, default=60, help="no new round after so long, but three rounds at least"
    )
    return result


def peaks_of(given: argparse.Namespace) -> dict[str, float]:
    """Matrix peaks in both formats with the threads of the comparison."""
    torch.set_num_threads(given.threads)
    return {name: matrix_peak(getattr(torch, name), given) for name in ("float32", "bfloat16")}


def main(stage: str, description: str | None, prepare: Prepare, arguments: list[str] | None = None) -> None:
    """A stage's script: the driver, or with --worker our side of it."""
    everything = parser(description)
    everything.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = everything.parse_args(arguments)
    if given.worker:
        torch.set_num_threads(given.threads)
        channel = worker.Channel(given)
        worker.serve(channel, prepare(given, channel))
    for line in compare(stage, given, peaks_of(given)):
        print(json.dumps(line), flush=True)

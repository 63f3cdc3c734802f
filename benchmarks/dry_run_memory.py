"""Does `--dry-run` say how much memory a stage takes? What it says, beside the peak of the stage's own process.

    python benchmarks/dry_run_memory.py                  # PPO and DPO at two sizes, float32, one thread, some minutes
    python benchmarks/dry_run_memory.py --tree HEAD~1    # another commit

The peak is VmHWM (Linux) of a process that runs the stage, less that of a process that runs the same command with a
model of one layer and eight channels and a micro-batch of 64 tokens: Python, torch, the data and the tokenizer are the
same in both. What the dry run says of that small model is taken off too. Every optimizer step has more tokens than a
micro-batch, so that the formula is tried, and not what a dry run knows of the tokens of a step. Nothing is learned.

Each tensor of 64 KiB or more is given back to the system when it is freed (MALLOC_MMAP_THRESHOLD_), so that the peak is
what the stage holds. glibc by itself keeps freed memory for the next tensor; that peak stands beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import children
from children import Order, Workshop

SIZES = {"4x128": "--n-layer 4 --n-head 4 --n-embd 128", "8x384": "--n-layer 8 --n-head 6 --n-embd 384"}
SMALL = "--n-layer 1 --n-head 1 --n-embd 8"
STAGES = {
    "ppo": "--iterations 1 --rollout-size 64 --epochs 1 --minibatches 2 --max-new-tokens 32 --micro-batch-tokens 1024",
    "dpo": "--epochs 1 --micro-batch-tokens 1024",
}
MIB = 2**20


def report(order: Order, *, planned: bool) -> int:
    """Work in this process; returns the bytes that a dry run plans, or the most that the process has held."""
    said: list[int] = []
    if planned:
        importlib.import_module("train_ppo")  # and with it the module that plans, wherever it is
        plan = next(m for n, m in sys.modules.items() if n.startswith("minirlhf.") and hasattr(m, "memory_bytes"))
        memory_bytes = plan.memory_bytes
        plan.memory_bytes = lambda *args: said.append(memory_bytes(*args)) or said[-1]
    children.work(replace(order, more=order.more + " --dry-run" * planned))
    status = Path("/proc/self/status").read_text()
    return said[0] if planned else int(status.split("VmHWM:")[1].split()[0]) * 1024


def bytes_of(order: Order, *flags: str, **environment: str) -> int:
    """What a fresh process reports."""
    words = [sys.executable, __file__, "--order", json.dumps(asdict(order)), *flags]
    environment |= {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)
    if ended.returncode:
        raise RuntimeError(ended.stderr[-600:])
    return int(ended.stdout.splitlines()[-1])


def peaks(folder: Path, stage: str, shape: str, more: str) -> dict[str, int]:
    """The bytes planned and held by a stage with models of a shape."""
    workshop = Workshop(folder, sft=f"{shape} --epochs 0.2", reward="--epochs 0.2", **{stage: more})
    order, result = workshop.order(stage), {}
    with workshop.trial(stage):
        result["planned"] = bytes_of(order, "--planned")
        result["held"] = bytes_of(order, MALLOC_MMAP_THRESHOLD_=str(2**16))
    with workshop.trial(stage):
        result["held_by_glibc"] = bytes_of(order)
    return result


def measure(workshop: Workshop) -> tuple[dict[str, Any], bool]:
    """Every stage and size, beyond the small model; all is well where planned and held differ by at most 15 %."""
    rows = []
    for stage, more in STAGES.items():
        floor = peaks(workshop.folder / "small", stage, SMALL, f"{more} --micro-batch-tokens 64")
        for size, shape in SIZES.items():
            most = peaks(workshop.folder / size, stage, shape, more)
            row = {f"{name}_mib": round((most[name] - floor[name]) / MIB, 1) for name in most}
            row["planned_by_held"] = round(row["planned_mib"] / row["held_mib"], 3)
            print(stage, size, row, flush=True)
            rows.append({"stage": stage, "size": size, **row})
    return {"rows": rows}, all(abs(row["planned_by_held"] - 1) <= 0.15 for row in rows)


def main() -> int:
    """Measure every stage and size, print the table and write it."""
    parser = children.parser(__doc__)
    parser.add_argument("--order", type=lambda text: Order(**json.loads(text)), help=argparse.SUPPRESS)
    parser.add_argument("--planned", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.order:
        sys.path.insert(0, str(children.TREE))
        print(report(given.order, planned=given.planned))
        return 0
    return children.benchmark(given, measure)


if __name__ == "__main__":
    sys.exit(main())

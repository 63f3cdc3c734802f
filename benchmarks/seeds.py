"""The whole pipeline over several seeds: quality beside best-of-n, time and memory, in one table.

    python benchmarks/seeds.py --seeds 0 1 2        # about four minutes a seed on two quiet cores

Runs `python -m minirlhf --seed N` once for each seed, one after the other, and writes <date>-tiny-seeds.json (the
summaries as they are) and .md (the table) to --out. Peak memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

PARTS = ("helpful", "honest", "harmless")


def run(folder: Path, seed: int) -> dict:
    """One run in a process of its own: its summary, seconds by stage, wall time and peak memory."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "minirlhf", "--run", str(folder), "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with status {os.waitstatus_to_exitcode(status)}")
    return {
        "seed": seed,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),  # kilobytes on Linux
        "seconds": json.loads((folder / "seconds.json").read_text()),
        "summary": json.loads((folder / "summary.json").read_text()),
    }


def table(runs: list[dict]) -> str:
    """One row a seed and model."""
    lines = [
        "| seed | model | judge | 95 % interval | helpful | honest | harmless | wins | 95 % interval | KL | length |",
        "| --- " * 11 + "|",
    ]
    for result in runs:
        for name, m in result["summary"]["models"].items():
            parts = " | ".join(f"{m[part]['mean']:.2f}" for part in PARTS)
            (low, high), (win_low, win_high) = m["total"]["interval"], m["win_rate"]["interval"]
            lines.append(
                f"| {result['seed']} | {name} | {m['total']['mean']:.2f} | {low:.2f} to {high:.2f} | {parts} "
                f"| {m['win_rate']['mean']:.0%} | {win_low:.0%} to {win_high:.0%} "
                f"| {'<= ' if m['kl_is_bound'] else ''}{m['kl']:.1f} | {m['length']:.1f} |"
            )
    lines += [
        "",
        "| seed | reward model agrees with the judge | wall seconds | peak GiB | seconds by stage |",
        "| --- " * 5 + "|",
    ]
    for result in runs:
        agreement = result["summary"]["reward_model_agreement"]
        stages = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
        agrees = f"{agreement['share']:.1%} of {agreement['pairs']} pairs"
        lines.append(
            f"| {result['seed']} | {agrees} | {result['wall_seconds']:.0f} | {result['peak_gib']:.2f} | {stages} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs, <runs>/seed-N")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [run(arguments.runs / f"seed-{seed}", seed) for seed in arguments.seeds]
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }
    stem = arguments.out / f"{datetime.date.today()}-tiny-seeds"
    stem.with_suffix(".json").write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")
    prompts = runs[0]["summary"]["prompts"]
    command = f"`python benchmarks/seeds.py --seeds {' '.join(map(str, arguments.seeds))}`"
    head = f"{command}; {machine}; {prompts} held-out prompts."
    stem.with_suffix(".md").write_text(f"# The demo over seeds\n\n{head}\n\n{table(runs)}\n")
    print(table(runs))


if __name__ == "__main__":
    main()

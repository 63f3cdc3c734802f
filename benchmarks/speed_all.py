"""The speed of every stage in one table, beside the peers' where they are installed, and beside the targets.

    make bench                                                       # ours at 4x128, under two minutes
    python benchmarks/speed_all.py --size 4x128 124M --dtype float32 bfloat16 --peer trl/bin/python --out results
    python benchmarks/speed_all.py --device cuda --size 124M 355M 1.5B --dtype bfloat16 --out results      # a GPU, ours

The second command measures everything on a CPU, in about 20 minutes on two quiet cores; TRL_PPO_PATH names the folder
of TRL 1.12, docs/speed.md says how to install the peers. Nothing else may run meanwhile: a result during which others
used more than 0.1 cores is marked.

With --out writes <date>-speed.json and .md there: all figures, then each target and by how much it is met or missed.
A ratio is the peer's median over ours; memory is ours above the floor over the peer's (worker.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import ours  # noqa: F401  first, because it finds the scripts where they are not installed
import real
import speed
import workloads

STAGES = ("sft", "reward", "dpo", "ppo", "generate")
# How many times as fast as the peer: (stage, peer) -> size -> number format; then the share of its memory.
BOTH = ("float32", "bfloat16")
RATIOS: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("sft", "trl"): {"4x128": dict.fromkeys(BOTH, 2.3), "124M": {"float32": 2.5, "bfloat16": 3.0}},
    ("sft", "transformers"): {"4x128": dict.fromkeys(BOTH, 1.7), "124M": {"float32": 1.7, "bfloat16": 1.2}},
    ("reward", "trl"): {"4x128": dict.fromkeys(BOTH, 2.5), "124M": dict.fromkeys(BOTH, 3.0)},
    ("dpo", "trl"): {"4x128": dict.fromkeys(BOTH, 4.0), "124M": dict.fromkeys(BOTH, 6.0)},
    ("ppo", "trl"): {"4x128": dict.fromkeys(BOTH, 2.3), "124M": dict.fromkeys(BOTH, 3.0)},
    ("generate", "transformers"): {"4x128": dict.fromkeys(BOTH, 2.0), "124M": dict.fromkeys(BOTH, 1.3)},
}
MEMORY = {"sft": 0.6, "reward": 0.5, "dpo": 0.4, "ppo": 0.5, "generate": 0.8}
GPU_SHARES = {"sft": 0.40, "reward": 0.30, "dpo": 0.30}  # of the matrix peak, 124M in bfloat16
GPU_BANDWIDTH = 0.40  # decode of 256 rows, of the bound: weights and cache read once a step


def figures(results: list[dict[str, Any]]) -> list[str]:
    """A table of all results."""
    lines = [
        "| stage | size | format | side | median s (quartiles) | n | rate | GFLOP/s | of peak | peak MiB "
        "| above floor MiB |",
        "| --- " * 11 + "|",
    ]
    for r in results:
        busy = " (disturbed)" if r["others"] > speed.LIMIT and r["clock"] == "wall" else ""
        parts = "".join(f"; {name[:-2]} {seconds:.3g}" for name, seconds in r["parts"].items())
        lines.append(
            f"| {r['stage']} | {r['size']} | {r['dtype']} | {r['side']}{busy} "
            f"| {r['median_s']:.4g} ({r['lower_s']:.4g} to {r['upper_s']:.4g}){parts} | {r['n']} "
            f"| {r['rate']:,.4g} {r['unit']} | {r['gflops']:.0f} | {r['share']:.0%} "
            f"| {r['peak_mib']} | {r['above_floor_mib']:.0f} |"
        )
    return lines


def verdict(value: float, target: float, *, at_least: bool) -> str:
    """Whether a target is met, and by how much it is missed."""
    met = value >= target if at_least else value <= target
    return "met" if met else f"missed by {abs(value / target - 1):.0%}"


def against_peers(results: list[dict[str, Any]]) -> list[str]:
    """Ratios of time and memory to every peer, each next to its target."""
    lines = [
        "| stage | size | format | against | times as fast | target | | share of its memory | target | |",
        "| --- " * 10 + "|",
    ]
    own = {(r["stage"], r["size"], r["dtype"]): r for r in results if r["side"] == "ours"}
    for r in results:
        if r["side"] == "ours":
            continue
        mine = own[r["stage"], r["size"], r["dtype"]]
        ratio = r["median_s"] / mine["median_s"]
        memory = mine["above_floor_mib"] / r["above_floor_mib"]
        target = RATIOS[r["stage"], r["side"]].get(r["size"], {}).get(r["dtype"])
        aim = MEMORY[r["stage"]]
        lines.append(
            f"| {r['stage']} | {r['size']} | {r['dtype']} | {r['side']} {r['about'].get(r['side'], '')} | {ratio:.2f} "
            f"| {target or ''} | {verdict(ratio, target, at_least=True) if target else ''} "
            f"| {memory:.2f} | {aim} | {verdict(memory, aim, at_least=False)} |"
        )
    return lines


def decode_bound(size: workloads.Size, bandwidth: float, dtype: str) -> float:
    """Seconds in which a GPU could at best generate: weights and the cache so far, read once for each token."""
    width = 2 if dtype == "bfloat16" else 4
    cache = 2 * size.layers * size.width * width * size.rows
    lengths = range(size.prompt_length, size.prompt_length + size.new_tokens)
    return sum(width * workloads.parameters(size) + cache * length for length in lengths) / bandwidth / 1e9


def on_a_gpu(results: list[dict[str, Any]], bandwidth: float) -> list[str]:
    """The targets of a GPU: shares of the matrix peak, and of the bandwidth bound when decoding."""
    lines = ["| stage | size | format | share | of | target | |", "| --- " * 7 + "|"]
    for r in (r for r in results if r["side"] == "ours"):
        share, of, target = r["share"], "matrix peak", GPU_SHARES.get(r["stage"])
        if r["stage"] == "generate":
            bound = decode_bound(workloads.size_of(r["size"], "cuda"), bandwidth, r["dtype"])
            share, of, target = bound / r["median_s"], "bandwidth bound", GPU_BANDWIDTH
        target = target if (r["size"], r["dtype"]) == ("124M", "bfloat16") else None
        lines.append(
            f"| {r['stage']} | {r['size']} | {r['dtype']} | {share:.0%} | {of} | {f'{target:.0%}' if target else ''} "
            f"| {verdict(share, target, at_least=True) if target else ''} |"
        )
    return lines


def measure(given: argparse.Namespace, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Every stage at every size in every format, one after the other; prints each result as it comes."""
    results = []
    for size in given.size:
        for dtype in given.dtype:
            for stage in given.stages:
                one = argparse.Namespace(**{**vars(given), "size": size, "dtype": dtype})
                results += speed.compare(stage, one, peaks)
                print("\n".join(figures(results)[-len(speed.commands(stage, one)) :]), flush=True)
    return results


def report(given: argparse.Namespace, peaks: dict[str, float], bandwidth: float, results: list[dict]) -> str:
    """The results as a page."""
    machine = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in peaks.items())
    lines = [
        f"Measured {datetime.date.today()} on {given.device}, {given.threads} threads, {given.clock} clock. "
        f"The machine: matrix products {machine}; copies {bandwidth:,.0f} GB/s.",
        "",
        *figures(results),
    ]
    if given.peer:
        lines += ["", "Against the peers, side by side:", "", *against_peers(results)]
    if given.device == "cuda":
        lines += ["", *on_a_gpu(results, bandwidth)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = speed.parser(__doc__)
    parser.set_defaults(seconds=45.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--out", type=Path, help="folder of the results; by default nothing is written")
    for action in parser._actions:
        if action.dest in ("size", "dtype"):
            action.nargs, action.default = "+", [action.default]
    given = parser.parse_args(arguments)
    if given.peer and "ppo" in given.stages and not os.environ.get("TRL_PPO_PATH"):
        parser.error("TRL_PPO_PATH must name the folder of TRL 1.12 (docs/speed.md); or leave ppo out of --stages")
    peaks, bandwidth = speed.peaks_of(given), speed.memory_bandwidth(given)
    results = measure(given, peaks)
    page = report(given, peaks, bandwidth, results)
    print("\n" + page)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        stem = given.out / f"{datetime.date.today()}-speed"
        whole = {**real.circumstances(), "matrix_gflops": peaks, "copy_gb_per_s": bandwidth, "results": results}
        stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(page, encoding="utf-8")
    return results


if __name__ == "__main__":
    main()

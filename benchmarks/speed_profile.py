"""Where a step's time goes, by kind of operation: what is left to gain, and what is not.

    python benchmarks/speed_profile.py [--size 4x128] [--dtype float32] [--stages sft reward dpo ppo generate]

Times are each operator's own on one thread, without those it calls, from torch's profiler, over --steps steps after
two. The profiler itself lengthens small operators, so shares lean towards "the rest". Prints a table.
"""

from __future__ import annotations

import argparse
import importlib
import time
import types
from collections import Counter

import ours  # noqa: F401  first, because it finds the scripts where they are not installed
import torch
import workloads
from torch.profiler import ProfilerActivity, profile

STAGES = ("sft", "reward", "dpo", "ppo", "generate")
KINDS = {  # the beginning of an operator's name, the longest that fits; what fits none is "the rest"
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "mkldnn",
        "aten::mkldnn",
    ),
    "attention": ("aten::_scaled_dot_product",),
    "GELU": ("aten::gelu",),
    "LayerNorm": ("aten::native_layer_norm",),
    "log-softmax, softmax": ("aten::_log_softmax", "aten::_softmax"),
    "copies, casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::_to_copy"),
    "AdamW, clipping": ("aten::_fused_adamw", "aten::_foreach", "aten::linalg_vector_norm", "aten::clamp_"),
    "gather, index, embedding": (
        "aten::index",
        "aten::gather",
        "aten::scatter",
        "aten::embedding",
        "aten::_index",
        "aten::masked",
    ),
    "sums, products by element": (
        "aten::add",
        "aten::mul",
        "aten::sum",
        "aten::fill",
        "aten::zero",
        "aten::exp",
        "aten::cumsum",
    ),
}


def kind_of(name: str) -> str:
    """The kind of an operator."""
    found = [(len(start), kind) for kind, starts in KINDS.items() for start in starts if name.startswith(start)]
    return max(found)[1] if found else "the rest"


def shares(stage: str, given: argparse.Namespace) -> Counter[str]:
    """Seconds of each kind over the profiled steps."""
    quiet = types.SimpleNamespace(ready=lambda *_, **__: None, now=time.process_time)
    step = importlib.import_module(f"speed_{stage}").prepare(given, quiet)
    for number in range(2):
        step(number)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for number in range(given.steps):
            step(number)
    seconds: Counter[str] = Counter()
    for event in seen.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def main(arguments: list[str] | None = None) -> dict[str, Counter[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=workloads.SIZES, default="4x128")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=3, help="steps profiled")
    parser.set_defaults(device="cpu", clock="cpu", threads=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {stage: shares(stage, given) for stage in given.stages}
    print(f"| {given.size}, {given.dtype} | " + " | ".join(found) + " |\n" + "| --- " * (len(found) + 1) + "|")
    for kind in (*KINDS, "the rest"):
        cells = (f"{seconds[kind] / seconds.total():.0%}" for seconds in found.values())
        print(f"| {kind} | " + " | ".join(cells) + " |")
    return found


if __name__ == "__main__":
    main()

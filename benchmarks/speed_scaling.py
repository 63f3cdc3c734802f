"""What a step costs as its work grows: linear in tokens, and scoring that needs no memory of the size of all logits.

    python benchmarks/speed_scaling.py --out results      # about three minutes; writes <date>-scaling.csv and .png

4 layers, 128 channels, 2,048 tokens of vocabulary, on a CPU:
- length: an SFT step on 8 rows of T tokens
- batch: an SFT step on B rows of 64 tokens
- responses: a DPO step on 8 comparisons, K responses of 32 tokens to a prompt of 32, one pair each
- scoring: `GPT.logprobs` without gradient on 4 rows of T tokens at a vocabulary of 50,257. Its memory is the largest
  sum of tensors that were alive at once, counted by a dispatch mode at every operation; all logits, (B, T, V) in
  float32, would be 4 B T V bytes.

Times are medians. The points of one series are measured in turns, so that what disturbs the machine disturbs all.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ours
import torch
import worker
import workloads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_dpo
import train_sft
from minirlhf.batch import Example, pad
from minirlhf.comparisons import ReferencedComparison
from minirlhf.model import GPT
from minirlhf.optim import adamw

LENGTHS = (32, 64, 128, 256, 512)
BATCHES = (4, 8, 16, 32, 64)
RESPONSES = (2, 4, 8, 16)
SCORED_LENGTHS = (64, 128, 256, 512, 1024)
SHAPE = workloads.Size(4, 4, 128, 2048, 1024)
SCORED = workloads.Size(1, 2, 64, 50257, 1024)  # GPT-2's vocabulary; a small trunk, since the head is what matters
BUDGET = 2048  # of a micro-batch, as in the tiny preset
MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive, after every operation; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@dataclass
class Point:
    """One point of a series: how much work, in tokens, and what it cost."""

    series: str
    x: int
    tokens: int
    seconds: float = 0.0
    mib: float = 0.0
    all_logits_mib: float = 0.0


def sft_step(count: int, length: int) -> Callable[[], object]:
    """A step on `count` rows of `length` tokens."""
    model = ours.model(SHAPE)
    state = train_sft.State(model, adamw(model, learning_rate=ours.LEARNING_RATE))
    rows = workloads.rows(SHAPE, count, length).tolist()
    batch = pad([Example(row[:1], row[1:]) for row in rows])
    return lambda: train_sft.train_step(state, batch, train_sft.Config(), max_tokens=BUDGET)


def dpo_step(count: int, responses: int, length: int = 32) -> Callable[[], object]:
    """A step on `count` comparisons of so many responses of `length` tokens to a prompt of that length."""
    model = ours.model(SHAPE)
    state = train_dpo.State(model, adamw(model, learning_rate=ours.LEARNING_RATE))
    texts = workloads.rows(SHAPE, count * (responses + 1), length).reshape(count, responses + 1, length).tolist()
    pairs = [(k, k + 1) for k in range(0, responses, 2)]
    comparisons = [
        ReferencedComparison([Example(prompt, answer) for answer in answers], pairs, ref_seq_logprobs=[0.0] * responses)
        for prompt, *answers in texts
    ]
    config, device = train_dpo.Config(), torch.device("cpu")
    return lambda: train_dpo.train_step(state, comparisons, config, device, max_tokens=BUDGET)


def timed(points: list[tuple[Point, Callable[[], object]]], given: argparse.Namespace) -> list[Point]:
    """The median seconds of each point, measured in turns."""
    clock = worker.clock_of(given)
    times: list[list[float]] = [[] for _ in points]
    for turn in range(given.rounds + 1):
        for (_, step), seconds in zip(points, times, strict=True):
            start = clock()
            step()
            if turn:  # the first is the warm-up
                seconds.append(clock() - start)
    for (point, _), seconds in zip(points, times, strict=True):
        point.seconds = float(np.median(seconds))
    return [point for point, _ in points]


@torch.no_grad()
def scoring(length: int, count: int = 4) -> Point:
    """Peak memory of scoring all positions of `count` rows at GPT-2's vocabulary."""
    model: GPT = ours.model(SCORED)
    tokens = torch.from_numpy(workloads.rows(SCORED, count, length))
    mask = torch.ones(count, length - 1, dtype=torch.bool)
    with LiveBytes() as live:
        model.logprobs(tokens, mask)
    all_logits = 4 * count * length * SCORED.vocabulary
    return Point("scoring", length, count * length, mib=live.peak / MIB, all_logits_mib=all_logits / MIB)


def linearity(points: list[Point]) -> float:
    """R squared of seconds = a + b tokens."""
    x, y = (np.array([getattr(p, name) for p in points]) for name in ("tokens", "seconds"))
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def plot(series: dict[str, list[Point]], path: Path) -> None:
    """Four panels: seconds against tokens, and memory of scoring against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "length": "SFT, 8 rows of T tokens",
        "batch": "SFT, B rows of 64 tokens",
        "responses": "DPO, 8 prompts, K responses each",
    }
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        points = series[name]
        axis.plot([p.tokens for p in points], [1e3 * p.seconds for p in points], "o-")
        axis.set(title=f"{title}; R² {linearity(points):.3f}", xlabel="tokens a step", ylabel="ms a step")
        axis.set(xlim=(0, None), ylim=(0, None))
    points = series["scoring"]
    axes[3].plot([p.x for p in points], [p.all_logits_mib for p in points], "--", label="all logits (B, T, V)")
    axes[3].plot([p.x for p in points], [p.mib for p in points], "o-", label="GPT.logprobs, peak")
    axes[3].set(title="scoring 4 rows, V 50,257", xlabel="T", ylabel="MiB", xlim=(0, None), ylim=(0, None))
    axes[3].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, list[Point]]:
    parser = worker.machine_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times each point is measured")
    parser.add_argument("--points", type=int, default=5, help="points of each series, the smallest first")
    parser.add_argument("--out", type=Path, help="folder of the results; by default nothing is written")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    n = given.points
    series = {
        "length": timed([(Point("length", t, 8 * t), sft_step(8, t)) for t in LENGTHS[:n]], given),
        "batch": timed([(Point("batch", b, 64 * b), sft_step(b, 64)) for b in BATCHES[:n]], given),
        "responses": timed([(Point("responses", k, 8 * 32 * (1 + k)), dpo_step(8, k)) for k in RESPONSES[:n]], given),
        "scoring": [scoring(t) for t in SCORED_LENGTHS[:n]],
    }
    for name, points in series.items():
        fit = "" if name == "scoring" else f"   (R squared of a line: {linearity(points):.4f})"
        print(f"{name}{fit}")
        for p in points:
            cost = f"{p.mib:8.1f} MiB of {p.all_logits_mib:.1f}" if name == "scoring" else f"{1e3 * p.seconds:8.1f} ms"
            print(f"  {p.x:5d} {p.tokens:6d} tokens {cost}")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        stem = given.out / f"{datetime.date.today()}-scaling"
        with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Point.__dataclass_fields__)
            writer.writerows(vars(p).values() for points in series.values() for p in points)
        plot(series, stem.with_suffix(".png"))
    return series


if __name__ == "__main__":
    main()

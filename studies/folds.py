"""The human comparisons of the real data, and how they are divided: by first human turn, never by pair."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import project  # noqa: F401  first: it finds the package

from minirlhf import data
from minirlhf.encode import Record

FILES = {
    "helpful": ("hh-helpful-base.train.jsonl.gz", "hh-helpful-base.test.jsonl.gz"),
    "harmless": ("hh-harmless-base.train.jsonl.gz", "hh-harmless-base.test.jsonl.gz"),
    "polite": ("polite-instructions.json",),
}
FOLDS = 5


def read_pairs(folder: Path) -> dict[str, list[Record]]:
    """All pairs of each kind that the reader keeps."""
    return {
        kind: [record for name in names for record in data.load(folder / "preference" / name, "pairs")]
        for kind, names in FILES.items()
    }


def first_turn(record: Record) -> str:
    """The first thing that the human says."""
    return record["prompt"].split("\n\nAssistant:")[0].strip()


def fold_of(turns: Iterable[str], folds: int, *, seed: int) -> dict[str, int]:
    """A fold for every distinct text, of nearly equal numbers of texts."""
    distinct = sorted(set(turns))
    order = np.random.default_rng(seed).permutation(len(distinct))
    return {distinct[i]: place % folds for place, i in enumerate(order)}

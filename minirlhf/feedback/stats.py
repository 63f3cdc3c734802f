"""The worth of labels, before anything trains on them.

    python -m minirlhf.feedback stats                          # of <run>/labels/labels.jsonl
    python -m minirlhf.feedback stats --labels anna.jsonl ben.jsonl

Counts, position bias, agreement with oneself and between labellers, and how strong the sources of the answers are.
Intervals hold 95 %. Of an item's labels by one labeller the first counts, and the later ones tell self-agreement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minirlhf.config import Settings
from minirlhf.evaluate.tables import Column, rows
from minirlhf.feedback import agreement
from minirlhf.feedback.labels import VERDICTS, Label, read_labels
from minirlhf.feedback.strengths import NoStrengths, strengths
from minirlhf.files import write_json

STRENGTHS = (
    Column("compared", "comparisons", "{}"),
    Column("wins", "wins", "{:g}"),
    Column("strength", "strength"),
    Column("95 % interval", "interval"),
    Column("Elo", "elo", "{:.0f}"),
    Column("95 %", "elo_interval", "{:.0f}"),
)


@dataclass
class Config(Settings):
    run: Path = Path("runs/tiny")
    """Folder of the run."""
    labels: tuple[Path, ...] = ()
    """Files of labels, by default `<run>/labels/labels.jsonl`; rankings and pairs of other origin can be among them."""
    output: Path | None = None
    """JSON file for the numbers, written anew each time; by default they are printed only."""


def main(config: Config) -> dict[str, Any]:
    """Print the statistics; returns them."""
    files = config.labels or (config.run / "labels" / "labels.jsonl",)
    labels = [label for file in files for label in read_labels(file)]
    summary = summarise(labels)
    if config.output is not None:
        write_json(config.output, summary)
    print(table(summary))
    return summary


def summarise(labels: Sequence[Label]) -> dict[str, Any]:
    """All statistics as plain values."""
    counts = Counter((label.labeller, label.verdict) for label in labels)
    names = sorted({label.labeller for label in labels})
    seconds = [label.seconds for label in labels if label.seconds is not None]
    try:
        ratings, reason = strengths(labels), ""
    except NoStrengths as error:
        ratings, reason = [], str(error)
    return {
        "labels": len(labels),
        "prompts": len({label.prompt for label in labels}),
        "items": len({label.item for label in labels}),
        "repeats": sum(label.repeat for label in labels),
        "notes": sum(bool(label.note) for label in labels),
        "median_seconds": float(np.median(seconds)) if seconds else None,
        "verdicts": {name: {verdict: counts[name, verdict] for verdict in VERDICTS} for name in names},
        "shown_first": {str(k): {**row, "chance": 1 / k} for k, row in agreement.position_bias(labels).items()},
        "order_bias": agreement.order_bias(labels),
        "self_agreement": agreement.self_agreement(labels),
        "agreement": agreement.between_labellers(labels),
        "strengths": ratings,
        "no_strengths_because": reason,
    }


def table(summary: dict[str, Any]) -> str:
    """The statistics as text."""
    about = f"{summary['labels']} labels of {summary['items']} items on {summary['prompts']} prompts"
    lines = [f"{about}, {summary['repeats']} of them repeats, {summary['notes']} with a note"]
    if summary["median_seconds"] is not None:
        lines.append(f"median time for a label: {summary['median_seconds']:.1f} s")
    verdicts = [Column(verdict, verdict, "{}") for verdict in VERDICTS]
    lines += ["", rows(summary["verdicts"], verdicts, title="labeller"), ""]
    for k, row in summary["shown_first"].items():
        share = agreement.share_text(row)
        lines.append(f"the one shown first was best of {k}: {share}; {row['chance']:.1%} without a bias")
    lines += [agreement.order_sentence(name, row) for name, row in summary["order_bias"].items()]
    for name, row in summary["self_agreement"].items():
        lines.append(f"{name} agrees with their own earlier label: {agreement.share_text(row)}")
    for row in summary["agreement"]:
        names = " and ".join(row["labellers"])
        kappa = "not defined" if row["kappa"] is None else f"{row['kappa']:.2f}"
        lines.append(f"{names} agree: {agreement.share_text(row)}, Cohen's kappa {kappa}")
    sources = {row["source"]: row for row in summary["strengths"]}
    none = f"no Bradley-Terry strengths of the sources: {summary['no_strengths_because']}"
    return "\n".join([*lines, "", rows(sources, STRENGTHS, title="source") if sources else none])

"""Does a reward model know how sure it may be? Predicted probabilities beside what people chose.

    python -m minirlhf.evaluate.calibration                      # the comparisons that train_reward.py held out
    python -m minirlhf.evaluate.calibration --comparisons other.jsonl --model runs/tiny/reward/model

The model predicts that the better-scored of two answers is preferred with probability sigmoid(|r_1 - r_2|), between 1/2
and 1. In each of ten bins of that confidence this is compared with how often it was:

    ECE = sum_b (n_b / N) |accuracy_b - confidence_b|            the expected calibration error; Guo et al. 2017, eq. 3

Also accuracy by margin, by difference in length and by the sources of the answers. Writes <run>/calibration.json and
.png. Trap: scores are saved with mean 0 and deviation 1, while the probability is that of the scores as trained; their
deviation from `normalisation.json` beside the model undoes it. Pairs of one prompt are not independent, so the
differences between bins are less sure than their counts suggest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minirlhf import data
from minirlhf.batch import pad
from minirlhf.comparisons import pair_numbers
from minirlhf.config import Count, Positive, Settings, run_script
from minirlhf.encode import Record, encode_comparison, split_by_prompt
from minirlhf.evaluate.judges import ModelFolder, RewardScorer
from minirlhf.evaluate.statistics import wins
from minirlhf.evaluate.tables import Column, rows
from minirlhf.files import atomic, read_json, write_json
from minirlhf.reward import RewardModel
from minirlhf.runtime import require, resolve_device

BINS = 10
LENGTHS = ("shorter by 6 or more", "shorter by 1 to 5", "equally long", "longer by 1 to 5", "longer by 6 or more")
LENGTH_STARTS = (-5, 0, 1, 6)  # of all but the first: tokens by which the better answer is longer
COLUMNS = [
    Column("pairs", "pairs", "{}"),
    Column("predicted", "confidence", "{:.1%}"),
    Column("accuracy", "accuracy", "{:.1%}"),
]


@dataclass
class Config(Settings):
    run: Path = Path("runs/tiny")
    """Folder of the run; writes `<run>/calibration.json` and `.png`."""
    model: str | None = None
    """Folder or hub name of the reward model, by default `<run>/reward/model`."""
    comparisons: str | None = None
    """Rankings or pairs to measure on, all of them; by default those that training `<run>/reward` held out."""
    split: str = ""
    """Part of `comparisons`."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs."""
    scale: Positive | None = None
    """Deviation of the scores as trained; by default from `normalisation.json` beside the model's folder."""
    micro_batch_tokens: Count = 8192
    """Padded tokens per forward pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


PRESETS = {"calibration": Config()}


@dataclass(frozen=True)
class Pairs:
    """N pairs of which people preferred the first.

    margins  (N,) its score less the other's, in nats: sigmoid of it is the predicted probability
    longer   (N,) tokens by which it is longer
    sources  the sources of the two, in alphabetical order, "" where they are not known
    """

    margins: np.ndarray
    longer: np.ndarray
    sources: np.ndarray


def score_pairs(scorer: RewardScorer, records: Sequence[Record], *, scale: float) -> Pairs:
    """All pairs of the records, scored. Responses that do not fit the model are left out with their pairs."""
    folder = scorer.folder
    encoded = [encode_comparison(folder.encoding, record, max_length=folder.positions) for record in records]
    comparisons = [c for c in encoded if c is not None]
    require(len(comparisons) > 0, "no pair of these comparisons can be compared by this model")
    names: list[str] = []  # of every response's source
    for record, comparison in zip(records, encoded, strict=True):
        count, sources = len(comparison.examples) if comparison else 0, record.get("sources", [])
        names += sources if len(sources) == count else [""] * count
    examples = [example for c in comparisons for example in c.examples]
    scores = scorer.scores(pad(examples)).astype(np.float64)
    lengths = np.array([len(example.response_ids) for example in examples])
    better, worse = pair_numbers(comparisons).T.numpy()
    both = [
        " and ".join(sorted((names[i], names[j]))).removeprefix(" and ") for i, j in zip(better, worse, strict=True)
    ]
    return Pairs(scale * (scores[better] - scores[worse]), lengths[better] - lengths[worse], np.array(both))


def accuracies(margins: np.ndarray, groups: Mapping[Any, np.ndarray]) -> dict[Any, dict[str, float]]:
    """How many `pairs` are in each group, rows of `margins`, and the `accuracy` on them; empty groups are left out.

    Right is a margin above 0; one of 0 is half right.
    """
    parts = {name: wins(margins[rows], 0.0) for name, rows in groups.items()}
    return {name: {"pairs": len(part), "accuracy": float(part.mean())} for name, part in parts.items() if len(part)}


def bins_of(margins: np.ndarray) -> list[dict[str, float]]:
    """Bins of equal width of the confidence, from 1/2 to 1; empty ones are left out."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))  # the probability of the side that the model takes
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {"from": 0.5 + number / (2 * BINS), "confidence": float(confidence[place == number].mean())} | row
        for number, row in accuracies(margins, {number: place == number for number in range(BINS)}).items()
    ]


def expected_calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """sum_b (n_b / N) |accuracy_b - confidence_b| over the bins of `bins_of`; 0 is perfect, 1/2 the worst."""
    total = sum(b["pairs"] for b in bins)
    return sum(b["pairs"] / total * abs(b["accuracy"] - b["confidence"]) for b in bins)


def summarise(pairs: Pairs) -> dict[str, Any]:
    """All figures as plain values."""
    margins, bins, sources = pairs.margins, bins_of(pairs.margins), sorted({*pairs.sources.tolist()} - {""})
    thirds = np.array_split(np.argsort(np.abs(margins), kind="stable"), 3)
    lengths = np.digitize(pairs.longer, LENGTH_STARTS)
    return {
        "pairs": len(margins),
        "accuracy": float(wins(margins, 0.0).mean()),
        "loss": float(np.logaddexp(0, -margins).mean()),
        "expected_calibration_error": expected_calibration_error(bins),
        "bins": bins,
        "by_margin": accuracies(margins, dict(zip(("small", "medium", "large"), thirds, strict=True))),
        "by_length_of_the_better": accuracies(margins, {name: lengths == i for i, name in enumerate(LENGTHS)}),
        "by_sources": accuracies(margins, {name: pairs.sources == name for name in sources}),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    head = f"{summary['pairs']} pairs: accuracy {summary['accuracy']:.1%}, loss {summary['loss']:.3f}, "
    head += f"expected calibration error {summary['expected_calibration_error']:.3f}"
    bins = {f"{b['from']:.2f} to {b['from'] + 0.5 / BINS:.2f}": b for b in summary["bins"]}
    groups = {"confidence": bins, "margin": summary["by_margin"]}
    groups |= {"the better answer is": summary["by_length_of_the_better"], "answers from": summary["by_sources"]}
    return "\n\n".join([head, *(rows(group, COLUMNS, title) for title, group in groups.items() if group)])


def plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy against confidence, with the diagonal of a calibrated model, and how many pairs each bin has."""
    from matplotlib import pyplot

    width, bins = 0.5 / BINS, summary["bins"]
    figure, (above, below) = pyplot.subplots(2, figsize=(4.6, 5.4), sharex=True, height_ratios=(3, 1))
    above.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="calibrated")
    above.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o")
    above.set(ylabel="accuracy", title=f"expected calibration error {summary['expected_calibration_error']:.3f}")
    above.legend()
    below.bar([b["from"] + width / 2 for b in bins], [b["pairs"] for b in bins], width=width * 0.9)
    below.set(xlabel="predicted probability of the side that the model takes", ylabel="pairs")
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def records_of(config: Config) -> list[Record]:
    """The comparisons that are named, or those that training <run>/reward held out, as its run.json says."""
    if config.comparisons:
        return data.load(config.comparisons, "pairs", split=config.split, columns=config.columns)
    path = config.run / "reward" / "run.json"
    require(path.is_file(), f"{path}: no such file; train with train_reward.py, or give --comparisons")
    trained = read_json(path)["config"]
    source = trained["comparisons"] or config.run / "feedback" / "rankings.jsonl"
    records = data.load(source, "pairs", split=trained["split"], columns=trained["columns"])
    return split_by_prompt(records, share=trained["validation_share"], seed=trained["seed"])[1]


def scale_of(folder: Path) -> float:
    """Deviation of a saved reward model's scores as trained; raises UserError where nothing says it."""
    path = folder.parent / "normalisation.json"
    require(path.is_file(), f"{path}: no such file; give --scale, the deviation of the scores as trained")
    return read_json(path)["before"]["std"]


def measure(config: Config) -> dict[str, Any]:
    """Measure and write <run>/calibration.json; returns the summary."""
    folder = ModelFolder.find(config.model or str(config.run / "reward" / "model"), RewardModel)
    scale = config.scale or scale_of(folder.path)
    scorer = RewardScorer(folder, resolve_device(config.device), config.micro_batch_tokens)
    summary = summarise(score_pairs(scorer, records_of(config), scale=scale))
    write_json(config.run / "calibration.json", summary)
    return summary


def main(config: Config) -> dict[str, Any]:
    """Measure, draw and print; returns the summary."""
    summary = measure(config)
    plot(summary, config.run / "calibration.png")
    print(table(summary))
    return summary


if __name__ == "__main__":
    run_script(main, PRESETS)

"""How many labels does a reward model need, how good must they be, and are rankings worth more than pairs?

    python studies/label_count.py --runs runs/seed-0 runs/seed-1 runs/seed-2     # after benchmarks/seeds.py

About ten minutes a run on one core; interrupted, the same command goes on. In each run the simulated people label
answers of its SFT model, and every set of labels trains a reward model from that SFT model: --steps optimizer steps, or
two passes where these are more, a tenth of the labels held out, the weights of the lowest held-out loss kept.

labels    100 to 6,400 pairs, one to a prompt as long as there are prompts (2,960), then three
noise     1,600 pairs, of which a share is reversed
rankings  so many prompts with all answers ranked (Plackett-Luce on rankings, Bradley-Terry on all their pairs), or with
          one pair compared; all without weighing pairs by contrast, which Plackett-Luce has no place for

Measured is how often the reward model orders two answers to held-out prompts as the embedded world's judge does. Run
number i has seed i: of labels, training and sampling.
Writes <date>-label-count.csv and .png to --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import project  # noqa: F401  first: it finds the package
from held_out import HeldOut
from real import circumstances
from trials import Trial, run_trials

import train_reward
from minirlhf import data
from minirlhf.feedback import machine
from minirlhf.feedback.tasks import Mode
from minirlhf.reward import RewardModel

COUNTS, NOISES, PROMPTS = (100, 400, 1600, 6400), (0.1, 0.2, 0.3), (100, 400, 1600)
NOISY = 1600  # labels, of which a share is reversed
MEASUREMENTS = 6  # of the held-out loss in a training run
FIELDS = ("experiment", "kind", "seed", "prompts", "labels", "noise", "agreement", "pairs", "steps", "held_out_loss")


@dataclass(frozen=True)
class Case:
    """One set of labels and what is learned from it: `count` labels of `mode`, `pairs` of them to a prompt."""

    experiment: str
    kind: str
    count: int
    mode: Mode = "pairs"
    pairs: int = 1
    noise: float = 0.0
    objective: Literal["pairs", "plackett-luce"] = "pairs"
    contrast: float = 2.0


def cases(counts: tuple[int, ...], noises: tuple[float, ...], prompts: tuple[int, ...], most: int) -> list[Case]:
    """All cases; `most` prompts have answers."""
    found = [Case("labels", "pairs", n, pairs=1 if n <= most else 3) for n in counts]
    found += [Case("noise", "pairs", NOISY, noise=noise) for noise in noises]
    for n in prompts:
        found.append(Case("rankings", "one pair", n, contrast=0.0))
        found.append(Case("rankings", "all pairs of a ranking", n, mode="rankings", contrast=0.0))
        found.append(Case("rankings", "Plackett-Luce", n, mode="rankings", objective="plackett-luce", contrast=0.0))
    return found


def agreement(run: Path, reward_model: Path, prompts: int, seed: int) -> dict[str, float]:
    """How often a reward model orders four answers of the run's SFT model to held-out prompts as the judge does."""
    model = RewardModel.from_pretrained(reward_model).eval().requires_grad_(False)
    return HeldOut(run, prompts, seed, reward_model=model).reward_model_agreement()


def learn(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Label, train, measure: a row of the table."""
    case, run, seed = Case(**settings["case"]), Path(settings["run"]), settings["seed"]
    labels = folder / "labels.jsonl"
    labels.unlink(missing_ok=True)
    machine.simulated(
        machine.Simulated(
            candidates=run / "feedback" / "rankings.jsonl",
            output=labels,
            mode=case.mode,
            pairs_per_prompt=case.pairs,
            noise=case.noise,
            max_items=case.count,
            seed=seed,
        )
    )
    model = train(case, folder, labels, settings)
    rows = [json.loads(line) for line in (folder / "reward" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = agreement(run, model, settings["test_prompts"], seed)
    return {
        "experiment": case.experiment,
        "kind": case.kind,
        "seed": seed,
        "prompts": len({record["prompt"] for record in data.load(labels, "pairs")}),
        "labels": case.count,
        "noise": case.noise,
        "agreement": round(found["share"], 4),
        "pairs": found["pairs"],
        "steps": len(rows),
        "held_out_loss": round(min(row["validation_loss"] for row in rows if "validation_loss" in row), 4),
    }


def train(case: Case, folder: Path, labels: Path, settings: Mapping[str, Any]) -> Path:
    """A reward model from a file of labels; returns its folder."""
    batches = math.ceil(0.9 * len(labels.read_text(encoding="utf-8").splitlines()) / settings["batch_size"])
    steps = max(settings["steps"], 2 * batches)
    return train_reward.main(
        train_reward.Config(
            run=folder,
            model=str(Path(settings["run"]) / "sft" / "model"),
            comparisons=str(labels),
            reference_samples=16,
            epochs=steps / batches,
            batch_size=settings["batch_size"],
            objective=case.objective,
            contrast=case.contrast,
            validation_every=max(1, steps // MEASUREMENTS),
            patience=MEASUREMENTS,
            checkpoint_every=10_000,
            seed=settings["seed"],
            device="cpu",
        )
    )


def curve(axis: Any, rows: list[dict], x: str, label: str | None = None) -> None:
    """Agreement against `x`: the mean of the seeds, and a bar from the lowest to the highest."""
    places = sorted({row[x] for row in rows})
    found = [np.array([row["agreement"] for row in rows if row[x] == place]) for place in places]
    means = np.array([values.mean() for values in found])
    spread = [means - [values.min() for values in found], [values.max() for values in found] - means]
    axis.errorbar(places, means, spread, marker="o", capsize=3, label=label)


def plot(rows: list[dict], path: Path) -> None:
    """Agreement against labels, noise, and labelled prompts."""
    from matplotlib import pyplot

    figure, (labels, noise, rankings) = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    mine = [row for row in rows if row["experiment"] == "labels"]
    curve(labels, mine, "labels")
    labels.set_xlabel("labelled pairs")
    labels.set_ylabel("agreement with the judge")
    reversed_ = [row for row in mine if row["labels"] == NOISY] + [r for r in rows if r["experiment"] == "noise"]
    curve(noise, reversed_, "noise")
    noise.set_xlabel(f"share of {NOISY} labels reversed")
    for kind in dict.fromkeys(row["kind"] for row in rows if row["experiment"] == "rankings"):
        own = [row for row in rows if row["experiment"] == "rankings" and row["kind"] == kind]
        curve(rankings, own, "labels", kind)
    rankings.set_xlabel("labelled prompts, no contrast")
    rankings.legend()
    for axis in (labels, rankings):
        axis.set_xscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows: list[dict]) -> str:
    """Mean agreement over the seeds, and each seed's."""
    lines = ["| experiment | kind | labels | noise | agreement | of each seed | steps |", "| --- " * 7 + "|"]
    for key in dict.fromkeys((r["experiment"], r["kind"], r["labels"], r["noise"]) for r in rows):
        own = [r for r in rows if (r["experiment"], r["kind"], r["labels"], r["noise"]) == key]
        each = ", ".join(f"{r['agreement']:.1%}" for r in own)
        mean = np.mean([r["agreement"] for r in own])
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {key[3]:.0%} | {mean:.1%} | {each} | {own[0]['steps']} |")
    return "\n".join(lines)


def trials(settings: argparse.Namespace) -> list[Trial]:
    """Every case in every run."""
    found = []
    for seed, run in enumerate(settings.runs):
        most = len(data.load(run / "feedback" / "rankings.jsonl", "pairs"))
        for case in cases(settings.counts, settings.noises, settings.prompts, most):
            name = f"{case.experiment}-{case.kind}-{case.count}-{case.noise}-{seed}".replace(" ", "-").lower()
            common = {key: getattr(settings, key) for key in ("steps", "batch_size", "test_prompts")}
            found.append(Trial(name, {"case": asdict(case), "run": str(run), "seed": seed, **common}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[Path("runs/tiny")], help="finished runs, seed 0, 1, ..."
    )
    parser.add_argument("--work", type=Path, default=Path("runs/label-count"), help="folder of what is made on the way")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each reward model")
    parser.add_argument("--batch-size", type=int, default=16, help="comparisons a step")
    parser.add_argument("--test-prompts", type=int, default=300, help="held-out prompts")
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help="numbers of labelled pairs")
    parser.add_argument("--noises", type=float, nargs="*", default=NOISES, help="shares of reversed labels")
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS, help="numbers of labelled prompts")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, with one thread each")
    parser.add_argument("--minutes", type=float, help="start no training after so many; the same command goes on")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    figures = run_trials(learn, trials(settings), settings.work, jobs=settings.jobs, minutes=settings.minutes)
    rows = list(figures.values())
    stem = settings.out / f"{datetime.date.today()}-label-count"
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, stem.with_suffix(".png"))
    print(f"{table(rows)}\n{stem}.csv and .png; {circumstances()}")


if __name__ == "__main__":
    main()

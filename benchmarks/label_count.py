"""How many labels does a reward model need, how good must they be, and are rankings worth more than pairs?

    python benchmarks/label_count.py --run runs/tiny      # after `python -m minirlhf`, about ten minutes on one core

The simulated people label answers of the run's SFT model, and every set of labels trains a reward model from that SFT
model: --steps optimizer steps, or two passes where these are more, a tenth of the labels held out, the weights of the
lowest held-out loss kept.

labels    100 to 6,400 pairs, one to a prompt as long as there are prompts (2,960), then three
noise     1,600 pairs, of which a share is reversed
rankings  so many prompts with all answers ranked (Plackett-Luce on rankings, Bradley-Terry on all their pairs), or with
          one pair compared; all without weighing pairs by contrast, which Plackett-Luce has no place for

Measured is how often the reward model orders two answers to held-out prompts as the embedded world's judge does.
Writes <date>-label-count.csv and .png to --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from real import circumstances

import train_reward
from minirlhf import data, evaluate, tokenizer
from minirlhf.feedback import simulated
from minirlhf.feedback.tasks import Mode
from minirlhf.model import GPT
from minirlhf.objective import Form
from minirlhf.reward import RewardModel

COUNTS, NOISES, PROMPTS = (100, 400, 1600, 6400), (0.1, 0.2, 0.3), (100, 400, 1600)
NOISY = 1600  # labels, of which a share is reversed
MEASUREMENTS = 6  # of the held-out loss in a training run
FIELDS = ("experiment", "kind", "prompts", "labels", "noise", "agreement", "pairs", "steps", "held_out_loss")


@dataclass(frozen=True)
class Case:
    """One set of labels and what is learned from it: `count` labels of `mode`, `pairs` of them to a prompt."""

    experiment: str
    kind: str
    count: int
    mode: Mode = "pairs"
    pairs: int = 1
    noise: float = 0.0
    objective: Form = "pairs"
    contrast: float = 2.0


def cases(counts: tuple[int, ...], noises: tuple[float, ...], prompts: tuple[int, ...], most: int) -> list[Case]:
    """All cases; `most` prompts have answers."""
    found = [Case("labels", "pairs", n, pairs=1 if n <= most else 3) for n in counts]
    found += [Case("noise", "pairs", NOISY, noise=noise) for noise in noises]
    for n in prompts:
        found.append(Case("rankings", "one pair", n, contrast=0.0))
        found.append(Case("rankings", "all pairs of a ranking", n, mode="rankings", contrast=0.0))
        plackett_luce: Form = "plackett-luce"
        found.append(
            Case("rankings", "Plackett-Luce", n, mode="rankings", objective=plackett_luce, contrast=0.0),
        )
    return found


class Measure:
    """Held-out prompts with four answers each from the SFT model, for every reward model alike."""

    def __init__(self, run: Path, prompts: int, seed: int) -> None:
        config = evaluate.Config(run=run, max_prompts=prompts, seed=seed, device="cpu")
        texts = [record["prompt"] for record in data.load(config.prompts, "prompts")][:prompts]
        folder = run / "sft" / "model"
        sft = GPT.from_pretrained(folder).eval().requires_grad_(False)
        unused = RewardModel.from_gpt(sft, generator=torch.Generator().manual_seed(0))
        encoding = tokenizer.load(folder)
        self.evaluator = evaluate.Evaluator(sft, unused, encoding, texts, config, evaluate.judge_parts)
        self.samples = self.evaluator.sample(sft, candidates=4)

    def agreement(self, folder: Path) -> dict:
        """Of the reward model in a folder."""
        self.evaluator.reward_model = RewardModel.from_pretrained(folder).eval().requires_grad_(False)
        return self.evaluator.agreement(self.samples, self.evaluator.reward(self.samples), candidates=4)


def learn(case: Case, number: int, settings: argparse.Namespace, measure: Measure) -> dict:
    """Label, train, measure: a row of the table."""
    run = settings.work / f"{number:02}"
    labels = run / "labels.jsonl"
    labels.unlink(missing_ok=True)
    simulated.main(
        simulated.Config(
            candidates=settings.run / "feedback" / "rankings.jsonl",
            output=labels,
            mode=case.mode,
            pairs_per_prompt=case.pairs,
            noise=case.noise,
            max_items=case.count,
            seed=settings.seed,
        )
    )
    model = train(case, run, labels, settings)
    rows = [json.loads(line) for line in (run / "reward" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = measure.agreement(model)
    return {
        "experiment": case.experiment,
        "kind": case.kind,
        "prompts": len({record["prompt"] for record in data.load(labels, "pairs")}),
        "labels": case.count,
        "noise": case.noise,
        "agreement": round(found["share"], 4),
        "pairs": found["pairs"],
        "steps": len(rows),
        "held_out_loss": round(min(row["validation_loss"] for row in rows if "validation_loss" in row), 4),
    }


def train(case: Case, run: Path, labels: Path, settings: argparse.Namespace) -> Path:
    """A reward model from a file of labels; returns its folder."""
    batches = math.ceil(0.9 * len(labels.read_text(encoding="utf-8").splitlines()) / settings.batch_size)
    steps = max(settings.steps, 2 * batches)
    return train_reward.main(
        train_reward.Config(
            run=run,
            model=str(settings.run / "sft" / "model"),
            comparisons=str(labels),
            reference_samples=16,
            epochs=steps / batches,
            batch_size=settings.batch_size,
            objective=case.objective,
            contrast=case.contrast,
            validation_every=max(1, steps // MEASUREMENTS),
            patience=MEASUREMENTS,
            checkpoint_every=10_000,
            seed=settings.seed,
            device="cpu",
        )
    )


def plot(rows: list[dict], path: Path) -> None:
    """Agreement against labels, noise, and labelled prompts."""
    from matplotlib import pyplot

    figure, (labels, noise, rankings) = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    mine = [row for row in rows if row["experiment"] == "labels"]
    labels.semilogx([row["labels"] for row in mine], [row["agreement"] for row in mine], marker="o")
    labels.set_xlabel("labelled pairs")
    labels.set_ylabel("agreement with the judge")
    reversed_ = [row for row in mine if row["labels"] == NOISY] + [r for r in rows if r["experiment"] == "noise"]
    noise.plot([row["noise"] for row in reversed_], [row["agreement"] for row in reversed_], marker="o")
    noise.set_xlabel(f"share of {NOISY} labels reversed")
    for kind in dict.fromkeys(row["kind"] for row in rows if row["experiment"] == "rankings"):
        own = [row for row in rows if row["experiment"] == "rankings" and row["kind"] == kind]
        rankings.semilogx([row["labels"] for row in own], [row["agreement"] for row in own], marker="o", label=kind)
    rankings.set_xlabel("labelled prompts, no contrast")
    if rankings.lines:
        rankings.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="a finished run")
    parser.add_argument("--work", type=Path, default=Path("runs/label-count"), help="folder of what is made on the way")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each reward model")
    parser.add_argument("--batch-size", type=int, default=16, help="comparisons a step")
    parser.add_argument("--test-prompts", type=int, default=300, help="held-out prompts")
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help="numbers of labelled pairs")
    parser.add_argument("--noises", type=float, nargs="*", default=NOISES, help="shares of reversed labels")
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS, help="numbers of labelled prompts")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    measure = Measure(settings.run, settings.test_prompts, settings.seed)
    most = len(data.load(settings.run / "feedback" / "rankings.jsonl", "pairs"))
    rows = []
    for number, case in enumerate(cases(settings.counts, settings.noises, settings.prompts, most)):
        rows.append(learn(case, number, settings, measure))
        print(rows[-1], flush=True)
    stem = settings.out / f"{datetime.date.today()}-label-count"
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, stem.with_suffix(".png"))
    print(f"{stem}.csv and .png; {circumstances(seed=settings.seed)}")


if __name__ == "__main__":
    main()

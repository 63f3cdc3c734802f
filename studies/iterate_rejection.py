"""Iterated rejection sampling against its control: fine-tuning on the best of n answers, and on a random one of the n.

    python studies/iterate_rejection.py --runs runs/seed-0 runs/seed-1 runs/seed-2    # of `python -m minirlhf`

Each iteration samples n answers to every prompt from the current model, chooses one (the best by the reward model, or
any), and fine-tunes the current model on the chosen ones; then held-out prompts are answered and judged. Fine-tuning
goes on from the current model, as in RAFT (Dong et al. 2023, arXiv 2304.06767, algorithm 1) and in the Improve steps of
ReST (Gulcehre et al. 2023, arXiv 2308.08998); STaR (Zelikman et al. 2022, arXiv 2203.14465) starts anew from the first
model each time, which keeps nearer to it and forgets what only earlier winners held. As in RAFT each iteration has
prompts of its own, here a third of the training prompts.
The control sees as much of its own text, as many steps and the same learning rate: what it gains is not the reward's.
Writes <date>-rejection.csv, .md and .png to --out. What is finished in --work is not run again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import project  # noqa: F401  first: it finds the package
import torch
from held_out import HeldOut
from trials import Trial, run_trials

import train_sft
from minirlhf import data, rejection
from minirlhf.evaluate import bootstrap_interval
from minirlhf.evaluate.judges import PARTS
from minirlhf.model import GPT

CHOICES = ("best", "random")
FIELDS = (
    "seed",
    "choice",
    "iteration",
    "judge",
    "low",
    "high",
    "helpful",
    "honest",
    "harmless",
    "kl",
    "length",
    "reward",
)


def iterate(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One seed and choice: a row before the first iteration and after each, and what the judge gave each answer."""
    base, seed, choice = Path(settings["run"]), settings["seed"], settings["choice"]
    evaluator = HeldOut(base, settings["held_out"], seed)
    prompts = len(data.load(rejection.Config.prompts, "prompts"))
    third = -(-prompts // settings["iterations"])
    policy, rows, judged = base / "sft" / "model", [], []
    for iteration in range(settings["iterations"] + 1):
        if iteration:
            part = f"[{(iteration - 1) * third}:{min(iteration * third, prompts)}]"
            policy = improve(folder, iteration, policy, part, settings)
        answers = evaluator.measured(GPT.from_pretrained(policy).eval().requires_grad_(False))
        low, high = bootstrap_interval(answers["total"], seed=seed)
        total, *rest = (answers[name].mean() for name in (*PARTS, "kl", "length", "reward"))
        measured = (total, low, high, *rest)
        numbers = [round(float(number), 4) for number in measured]
        rows.append(dict(zip(FIELDS, (seed, choice, iteration, *numbers), strict=True)))
        judged.append([round(float(value), 6) for value in answers["total"]])
    return {"rows": rows, "judged": judged}


def improve(folder: Path, iteration: int, policy: Path, part: str, settings: Mapping[str, Any]) -> Path:
    """Sample from the model, choose, and fine-tune the model on what was chosen; returns the folder of the new one."""
    seed = 100 * settings["seed"] + iteration  # other answers and another choice in each iteration
    sampling = rejection.Config(
        run=folder,
        stage=f"rejection-{iteration}",
        policy=str(policy),
        reward_model=str(Path(settings["run"]) / "reward" / "model"),
        candidates=settings["candidates"],
        split=part,
        seed=seed,
        device="cpu",
        resume=True,
    )
    rejection.main(sampling)
    learning = train_sft.Config(
        run=folder / f"tuned-{iteration}",
        model=str(policy),
        train=str(folder / sampling.stage / f"{settings['choice']}.jsonl"),
        learning_rate=settings["learning_rate"],
        epochs=settings["epochs"],
        seed=seed,
        device="cpu",
        resume=True,
    )
    return train_sft.main(learning)


def over_seeds(figures: Mapping[str, Mapping[str, Any]], iterations: int) -> list[dict[str, float]]:
    """Each choice and iteration over all seeds: the judge's mean with its interval, and the gap between the choices.

    The prompts are the same for all seeds, so prompts are drawn and each brings its mean over the seeds.
    """
    found = []
    for iteration in range(iterations + 1):
        mean = {}
        for choice in CHOICES:
            mine = [f for f in figures.values() if f["rows"][0]["choice"] == choice]
            mean[choice] = np.mean([f["judged"][iteration] for f in mine], axis=0)  # (P,)
            low, high = bootstrap_interval(mean[choice], seed=0)
            kl = float(np.mean([f["rows"][iteration]["kl"] for f in mine]))
            row = {"choice": choice, "iteration": iteration, "judge": float(mean[choice].mean())}
            found.append(row | {"low": low, "high": high, "kl": kl})
        gap = mean["best"] - mean["random"]
        low, high = bootstrap_interval(gap, seed=0)
        row = {"choice": "best - random", "iteration": iteration, "judge": float(gap.mean()), "low": low, "high": high}
        found.append(row)
    return found


def table(rows: list[dict[str, Any]], together: list[dict[str, float]]) -> str:
    """Both tables as Markdown: over all seeds, then a row a seed, choice and iteration."""
    lines = ["| choice | iteration | judge, all seeds | 95 % interval | KL |", "| --- " * 5 + "|"]
    for row in together:
        kl = f"{row['kl']:.2f}" if "kl" in row else ""
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(f"| {row['choice']} | {row['iteration']} | {row['judge']:.2f} | {interval} | {kl} |")
    lines += ["", "| " + " | ".join(FIELDS) + " |", "| --- " * len(FIELDS) + "|"]
    lines += ["| " + " | ".join(format_of(row[name]) for name in FIELDS) + " |" for row in rows]
    return "\n".join(lines)


def format_of(value: object) -> str:
    """A number with two decimals, anything else as it is."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def plot(rows: list[dict[str, Any]], together: list[dict[str, float]], path: Path) -> None:
    """The judge over iterations with intervals on the left, against the KL on the right; thin lines are seeds."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    names = {"best": "best of n by the reward model", "random": "a random one (control)"}
    for (choice, name), colour in zip(names.items(), ("tab:blue", "tab:orange"), strict=True):
        mine = [row for row in together if row["choice"] == choice]
        judge = [row["judge"] for row in mine]
        errors = [[row["judge"] - row["low"] for row in mine], [row["high"] - row["judge"] for row in mine]]
        left.errorbar([row["iteration"] for row in mine], judge, errors, color=colour, capsize=3, label=name)
        right.plot([row["kl"] for row in mine], judge, "o-", color=colour, label=name)
        for seed in sorted({row["seed"] for row in rows}):
            one = [row for row in rows if row["choice"] == choice and row["seed"] == seed]
            left.plot([row["iteration"] for row in one], [row["judge"] for row in one], color=colour, linewidth=0.5)
            right.plot([row["kl"] for row in one], [row["judge"] for row in one], color=colour, linewidth=0.5)
    left.set_xticks(sorted({row["iteration"] for row in rows}))
    left.set_xlabel("iterations of sampling, choosing, fine-tuning")
    right.set_xlabel("KL to the SFT model, nats an answer")
    left.set_ylabel("judge, mean over held-out prompts")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished runs, one a seed")
    parser.add_argument("--work", type=Path, default=Path("runs/iterate-rejection"), help="folder of the trials")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--iterations", type=int, default=3, help="rounds of sampling, choosing, fine-tuning")
    parser.add_argument("--candidates", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak, of the fine-tuning")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the fine-tuning")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts")
    parser.add_argument("--minutes", type=float, default=None, help="start no trial after so many")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = ("iterations", "candidates", "learning_rate", "epochs")
    shared = {name: getattr(arguments, name) for name in names} | {"held_out": arguments.prompts}
    trials = [
        Trial(f"seed-{seed}-{choice}", {"run": str(run.resolve()), "seed": seed, "choice": choice, **shared})
        for seed, run in enumerate(arguments.runs)
        for choice in CHOICES
    ]
    figures = run_trials(iterate, trials, arguments.work, minutes=arguments.minutes)
    if len(figures) < len(trials):
        return
    rows = [row for f in figures.values() for row in f["rows"]]
    together = over_seeds(figures, arguments.iterations)
    stem = arguments.out / f"{datetime.date.today()}-rejection"
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, together, stem.with_suffix(".png"))
    machine = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    head = f"`python studies/iterate_rejection.py`, {shared}; {len(arguments.runs)} seeds; {machine}, one thread."
    text = f"# Iterated rejection sampling and its control\n\n{head}\n\n{table(rows, together)}\n"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

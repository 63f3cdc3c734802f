"""Over-optimisation: proxy and judge against the distance from the SFT model, for reward models of many kinds.

    python studies/overoptimise.py --runs runs/seed-0 runs/seed-1 runs/seed-2       # of `python -m minirlhf --run`
    python studies/overoptimise.py --minutes 60 ...                                 # the same command goes on

From each run come the SFT model and its answers to the training prompts. The simulated people label pairs of these,
each set of labels trains a reward model, the proxy, and this is pressed in two ways, measured on held-out prompts:

best-of-n   from one set of samples of the SFT model, without bias for every n, at the KL log n - (n-1)/n
PPO         with a weak KL penalty, measured while it trains

The judge, which nothing was trained on, is gold. Labels: 100 to 6,400 pairs; at 1,600 one thing at a time changes: 20
or 40 % of the labels reversed, a labeller who likes length, three reward models of which the worst score counts.
Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760; the forms are in
peaks.py. Writes <date>-overoptimisation.csv, .png and .md to --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import held_out
import numpy as np
import project  # noqa: F401  first: it finds the package
import torch
from curves import FIELDS, PARTS, plot, rows_of, table
from real import circumstances
from trials import Trial, run_trials

import train_ppo
import train_reward
from minirlhf.evaluate import evaluation
from minirlhf.feedback import machine
from minirlhf.model import GPT
from minirlhf.reward import RewardEnsemble, RewardModel

SIZES = ("prompts", "samples", "reward_steps", "iterations", "every", "beta", "learning_rate")
MEASUREMENTS = 6  # of the held-out loss while a reward model trains; the weights of the lowest are kept
CLOSELY = 6  # PPO's first iterations are measured one by one: there the judge is highest


@dataclass(frozen=True)
class Case:
    """What a proxy is made of: so many labelled pairs, a share of them reversed, a liking for length, members."""

    name: str
    pairs: int = 1600
    noise: float = 0.0
    length_bias: float = 0.0
    members: int = 1


LABELS = tuple(Case(f"{n:,} pairs", pairs=n) for n in (100, 400, 1600, 6400))
CASES = (
    *LABELS,
    Case("20 % reversed", noise=0.2),
    Case("40 % reversed", noise=0.4),
    Case("likes length", length_bias=0.1),
    Case("worst of three", members=3),
)


# ------------------------------------------------------------------------------------------ one set of samples a seed
def sample(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Answers of the SFT model to the held-out prompts, judged; `samples.npz`."""
    drawn = held_out.draw(
        held_out.HeldOut(Path(settings["run"]), settings["prompts"], settings["seed"]), settings["samples"]
    )
    drawn.save(folder / "samples.npz")
    return {"distinct": len(drawn.batch)}


def best_of_n(drawn: held_out.Drawn, proxy: torch.nn.Module) -> dict[str, Any]:
    """Proxy, judge and length of the best of n by the proxy: n = 1, 2, 4, ... up to the samples of a prompt."""
    scores = drawn.scores(proxy)
    found = {
        what: [np.round(drawn.best_of(n, scores, values), 4).tolist() for n in drawn.sizes]
        for what, values in (("proxy", scores), ("gold", drawn.parts[:, 0]))
    }
    found["length"] = [round(float(drawn.best_of(n, scores, drawn.lengths).mean()), 2) for n in drawn.sizes]
    return {"n": drawn.sizes, "kl": [[evaluation.best_of_n_kl(n)] for n in drawn.sizes], **found}


# -------------------------------------------------------------------------------------------------- one proxy a trial
def learn(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Label, train the proxy, press it both ways: the figures of one case and seed."""
    case, run, seed = Case(**settings["case"]), Path(settings["run"]), settings["seed"]
    labels = folder / "labels.jsonl"
    if not labels.exists():
        machine.simulated(
            machine.Simulated(
                candidates=run / "feedback" / "rankings.jsonl",
                output=labels,
                pairs_per_prompt=1 if case.pairs <= 2000 else 3,  # there are 2,960 prompts, some with one answer alone
                noise=case.noise,
                length_bias=case.length_bias,
                max_items=case.pairs,
                seed=seed,
            )
        )
    folders = [train(folder / f"member-{k}", labels, run, settings, seed=seed + 100 * k) for k in range(case.members)]
    members = [RewardModel.from_pretrained(model).eval().requires_grad_(False) for model in folders]
    proxy = RewardEnsemble(members, aggregate="worst") if case.members > 1 else members[0]
    evaluator = held_out.HeldOut(run, settings["prompts"], seed, reward_model=proxy)
    drawn = held_out.Drawn.load(folder.parent / f"samples-seed-{seed}" / "samples.npz")
    return {
        "agreement": evaluator.reward_model_agreement()["share"],
        "best-of-n": best_of_n(drawn, proxy),
        "rl": trace(folder, folders, evaluator, settings),
    }


def train(folder: Path, labels: Path, run: Path, settings: Mapping[str, Any], *, seed: int) -> Path:
    """A reward model from a file of labels; returns its folder."""
    batches = math.ceil(0.9 * len(labels.read_text(encoding="utf-8").splitlines()) / 16)
    steps = max(settings["reward_steps"], 2 * batches)
    return train_reward.main(
        train_reward.Config(
            run=folder,
            model=str(run / "sft" / "model"),
            comparisons=str(labels),
            reference_samples=256,
            epochs=steps / batches,
            batch_size=16,
            validation_every=max(1, steps // MEASUREMENTS),
            patience=MEASUREMENTS,
            checkpoint_every=10_000,
            resume=True,
            seed=seed,
            device="cpu",
        )
    )


def trace(
    folder: Path, proxies: list[Path], evaluator: held_out.HeldOut, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """PPO against the proxy, measured before it, after each of the first iterations, and now and then."""
    rows: dict[str, list] = {name: [] for name in ("iteration", "kl", "proxy", "gold", *PARTS, "length", "answer")}

    def measure(policy: GPT, iteration: int) -> None:
        answers = evaluator.measured(policy)
        for name, figure in (("kl", "kl"), ("proxy", "reward"), ("gold", "total")):
            rows[name].append(np.round(answers[figure].astype(float), 4).tolist())
        for name in PARTS:
            rows[name].append(round(float(answers[name].mean()), 4))
        rows["iteration"].append(iteration)
        rows["length"].append(round(float(answers["length"].mean()), 2))
        rows["answer"].append(answers.texts[0])

    def observe(state: train_ppo.State, *_: object) -> None:
        if state.iteration <= CLOSELY or state.iteration % settings["every"] == 0:
            measure(state.policy, state.iteration)

    shutil.rmtree(folder / "ppo", ignore_errors=True)  # a trace has no gap: a trial that was cut off trains anew
    train_ppo.main(
        train_ppo.Config(
            run=folder,
            policy=str(Path(settings["run"]) / "sft" / "model"),
            reward_model=str(proxies[0]),
            ensemble=tuple(map(str, proxies[1:])),
            aggregate="worst",
            iterations=settings["iterations"],
            epochs=1,
            beta=settings["beta"],
            learning_rate=settings["learning_rate"],
            checkpoint_every=10_000,
            seed=settings["seed"],
            device="cpu",
        ),
        observe=observe,
    )
    return rows


# ---------------------------------------------------------------------------------------------------------- the study
def study(arguments: argparse.Namespace) -> tuple[list[Trial], list[Trial]]:
    """The trials that sample, and those that train: first the numbers of labels, then what else may change."""
    sizes = {name: getattr(arguments, name) for name in SIZES}
    cases = [case for case in CASES if arguments.cases is None or case.name in arguments.cases]
    bases = [{"run": str(run), "seed": seed} for seed, run in enumerate(arguments.runs)]
    few = {name: sizes[name] for name in ("prompts", "samples")}
    sampling = [Trial(f"samples-seed-{base['seed']}", {**base, **few}) for base in bases]
    training = []
    for part in ([case for case in cases if case in LABELS], [case for case in cases if case not in LABELS]):
        for base in bases:
            for case in part:
                name = "-".join(case.name.replace("%", "percent").replace(",", "").split())
                training.append(Trial(f"{name}-seed-{base['seed']}", {**base, **sizes, "case": asdict(case)}))
    return sampling, training


def write(figures: Mapping[str, Mapping[str, Any]], trials: list[Trial], arguments: argparse.Namespace) -> None:
    """CSV, figure and table of the finished trials."""
    done: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        if trial.name in figures:
            done.setdefault(trial.settings["case"]["name"], []).append(figures[trial.name])
    stem = arguments.out / f"{arguments.date}-overoptimisation"
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows_of(done))
    plot(done, stem.with_suffix(".png"))
    sizes = {name: getattr(arguments, name) for name in SIZES}
    facts = circumstances(seeds=len(arguments.runs), **sizes)
    command = facts.pop("command")
    head = f"`{command}`; " + "; ".join(f"{name} {value}" for name, value in facts.items())
    stem.with_suffix(".md").write_text(f"# Over-optimisation\n\n{head}\n\n{table(done)}\n", encoding="utf-8")
    print(table(done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished runs, one a seed: 0, 1, ...")
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimise"), help="folder of the trials")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--date", default=str(datetime.date.today()), help="in the names of the results")
    parser.add_argument("--cases", nargs="+", help="names of some reward models; by default all")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=256, help="answers of the SFT model to each")
    parser.add_argument("--reward-steps", type=int, default=150, help="optimizer steps of a reward model at least")
    parser.add_argument("--iterations", type=int, default=16, help="of PPO, each of 128 answers")
    parser.add_argument("--every", type=int, default=2, help="iterations between two measurements")
    parser.add_argument("--beta", type=float, default=0.01, help="PPO's KL penalty")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of PPO's policy")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--minutes", type=float, help="start no trial after so many")
    arguments = parser.parse_args()
    if arguments.iterations < 2:
        parser.error("--iterations: two coefficients need two points, so at least 2")
    arguments.out.mkdir(parents=True, exist_ok=True)
    sampling, training = study(arguments)
    run_trials(sample, sampling, arguments.work, jobs=arguments.jobs)
    figures = run_trials(learn, training, arguments.work, jobs=arguments.jobs, minutes=arguments.minutes)
    if figures:
        write(figures, training, arguments)


if __name__ == "__main__":
    main()

"""The frontier: how far each method raises the judge's score, and what it costs in KL to the SFT model.

    python studies/frontier.py --runs runs/seed-0 runs/seed-1 runs/seed-2       # of `python -m minirlhf --run`
    python studies/frontier.py --runs runs/seed-0 --tune                        # settings of PPO, RLOO, GRPO tried

PPO, RLOO, GRPO, DPO, online DPO, best-of-n and iterated rejection sampling, each at several strengths: beta, n, or
rounds. All start from the run's SFT model and learn from its reward model, DPO from the rankings behind this. The RL
methods and online DPO sample 128 answers in each of --iterations iterations. One answer to each held-out prompt is
judged; best-of-n is the unbiased estimate from one set of samples, with log n - (n-1)/n as its KL. Nothing learns from
the judge. `--tune` tries learning rates and sizes of groups on the first run, on prompts of their own.
The same command goes on where it was stopped. Writes <date>-frontier.csv, .png and .md to --out; with --tune
<date>-frontier-tuning.md alone.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import held_out
import numpy as np
import project  # noqa: F401  first: it finds the package
from leaders import FIELDS, plot, report, rows_of, tuning_report
from real import circumstances
from trials import Trial, run_trials

import train_dpo
import train_ppo
import train_sft
from minirlhf import online_dpo, rejection
from minirlhf.evaluate import evaluation
from minirlhf.model import GPT

BETAS = (0.3, 0.1, 0.03)
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {  # settings, and the strengths, which are betas
    "PPO": ({"advantages": "gae", "learning_rate": 2e-4}, BETAS),
    "RLOO": ({"advantages": "rloo", "group_size": 4, "learning_rate": 4e-4}, BETAS),
    "GRPO": ({"advantages": "grpo", "group_size": 4, "learning_rate": 4e-4}, BETAS),
    "DPO": ({}, (1.0, 0.5, 0.2)),
    "online DPO": ({"learning_rate": 2e-4}, (1.0, 0.3, 0.1)),
}
ONCE = ("best-of-n", "rejection sampling")  # one trial a seed gives all strengths
ROUNDS, CANDIDATES = 3, 8  # of rejection sampling
TUNED = {  # group sizes and learning rates that --tune tries, at beta 0.1
    "PPO": ((1, 2e-4), (1, 4e-4)),
    "RLOO": ((4, 2e-4), (4, 4e-4), (4, 8e-4), (8, 4e-4)),
    "GRPO": ((4, 2e-4), (4, 4e-4), (4, 8e-4), (8, 4e-4)),
}


# ------------------------------------------------------------------------------------------------- a trial: one method
def learn(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a method at one strength, or at all of `ONCE`'s, and measure: `points`, with figures of every prompt."""
    run, method = Path(settings["run"]), settings["method"]
    known = held_out.HeldOut(run, settings["prompts"], settings["seed"], part=settings["part"])
    if method == "best-of-n":
        return {"points": best_of_n(known, settings["samples"])}
    if method == "rejection sampling":
        return {"points": [measure(known, str(k + 1), model) for k, model in enumerate(rounds(folder, settings))]}
    return {"points": [measure(known, str(settings["beta"]), train(folder, settings))]}


def measure(known: held_out.HeldOut, strength: str, model: Path) -> dict[str, Any]:
    """One answer of the model to each held-out prompt."""
    answers = known.measured(GPT.from_pretrained(model).eval().requires_grad_(False))
    parts = np.stack([answers[part] for part in evaluation.PARTS], axis=1)
    return point(strength, answers["kl"], parts, reward=answers["reward"], length=answers["length"])


def best_of_n(known: held_out.HeldOut, samples: int) -> list[dict[str, Any]]:
    """n = 1 (the SFT model), 2, 4, ... up to `samples`, all from one set of samples."""
    drawn = held_out.draw(known, samples)
    scores = drawn.scores(known.reward_model)
    found = []
    for n in drawn.sizes:
        parts = np.stack([drawn.best_of(n, scores, values) for values in drawn.parts.T], axis=1)
        more = {name: drawn.best_of(n, scores, x) for name, x in (("reward", scores), ("length", drawn.lengths))}
        found.append(point(str(n), np.array([evaluation.best_of_n_kl(n)]), parts, **more))
    return found


def point(strength: str, kl: np.ndarray, parts: np.ndarray, **more: np.ndarray) -> dict[str, Any]:
    """KL (P,) or known, (1,); the judge (P, 4); means of the judge's parts and of what else there is."""
    means = {name: values for name, values in zip(evaluation.PARTS[1:], parts[:, 1:].T, strict=True)}
    return {
        "strength": strength,
        "kl": np.round(kl.astype(float), 4).tolist(),
        "gold": np.round(parts[:, 0].astype(float), 4).tolist(),
        **{name: round(float(np.mean(values)), 4) for name, values in (means | more).items()},
    }


def train(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The policy of a method that has a beta; returns its folder. An unfinished stage goes on."""
    run = Path(settings["run"])
    common = {"run": folder, "policy": str(run / "sft" / "model"), "seed": settings["seed"], "beta": settings["beta"]}
    common |= {"checkpoint_every": 1000, "device": "cpu", "resume": True}
    if settings["method"] == "DPO":
        rankings = str(run / "feedback" / "rankings.jsonl")
        return train_dpo.main(train_dpo.Config(**common, comparisons=rankings, **settings["config"]))
    common |= {"reward_model": str(run / "reward" / "model"), "iterations": settings["iterations"]}
    if settings["method"] == "online DPO":
        return online_dpo.main(online_dpo.Config(**common, **settings["config"]))
    return train_ppo.main(train_ppo.Config(**common, **settings["config"]))


def rounds(folder: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The policies of iterated rejection sampling: each learns from the best answers of the one before."""
    run, seed = Path(settings["run"]), settings["seed"]
    model = run / "sft" / "model"
    for number in range(1, ROUNDS + 1):
        best = rejection.main(
            rejection.Config(
                run=folder,
                stage=f"round-{number}",
                policy=str(model),
                reward_model=str(run / "reward" / "model"),
                candidates=CANDIDATES,
                resume=True,
                seed=seed + 100 * number,  # another round, other random numbers
                device="cpu",
            )
        )
        model = train_sft.main(
            train_sft.Config(
                run=folder / f"learned-{number}",
                model=str(model),
                train=str(best),
                learning_rate=3e-4,
                epochs=2.0,
                checkpoint_every=1000,
                resume=True,
                seed=seed,
                device="cpu",
            )
        )
        yield model


# ---------------------------------------------------------------------------------------------------------- the study
def trials(arguments: argparse.Namespace) -> list[Trial]:
    """Every method at every strength, seed by seed: an unfinished study has whole seeds."""
    found = []
    for seed, run in enumerate(arguments.runs):
        base = {"run": str(run), "seed": seed, "prompts": arguments.prompts, "part": "test"}
        for method in ONCE:
            own = {"samples": arguments.samples} if method == "best-of-n" else {}
            found.append(Trial(f"{name_of(method)}-seed-{seed}", {**base, "method": method, **own}))
        for method, (config, betas) in METHODS.items():
            for beta in betas:
                own = {"method": method, "beta": beta, "config": config, "iterations": arguments.iterations}
                found.append(Trial(f"{name_of(method)}-{beta}-seed-{seed}", {**base, **own}))
    wanted = {"best-of-n", *(arguments.methods or (*ONCE, *METHODS))}  # its n = 1 is the SFT model, where all begin
    return [trial for trial in found if trial.settings["method"] in wanted]


def tuning(arguments: argparse.Namespace) -> list[Trial]:
    """Learning rates and sizes of groups, on the first run and the world's validation prompts."""
    base = {"run": str(arguments.runs[0]), "seed": 0, "prompts": arguments.prompts, "part": "validation", "beta": 0.1}
    found = []
    for method, tried in TUNED.items():
        for size, rate in tried:
            config = {**METHODS[method][0], "group_size": size, "learning_rate": rate}
            own = {"method": method, "config": config, "iterations": arguments.iterations}
            found.append(Trial(f"tuning-{name_of(method)}-{size}-{rate}", {**base, **own}))
    return found


def name_of(method: str) -> str:
    """Fit for a folder."""
    return method.lower().replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished runs, one a seed: 0, 1, ...")
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="folder of the trials")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--date", default=str(datetime.date.today()), help="in the names of the results")
    parser.add_argument("--methods", nargs="+", help="names of some methods; by default all")
    parser.add_argument("--tune", action="store_true", help="try settings of PPO, RLOO and GRPO on the first run alone")
    parser.add_argument("--prompts", type=int, default=250, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=64, help="answers to each for best-of-n")
    parser.add_argument("--iterations", type=int, default=20, help="of PPO, RLOO, GRPO and online DPO")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--minutes", type=float, help="start no trial after so many")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = tuning(arguments) if arguments.tune else trials(arguments)
    figures = run_trials(learn, chosen, arguments.work, jobs=arguments.jobs, minutes=arguments.minutes)
    done = [(trial.settings, figures[trial.name]) for trial in chosen if trial.name in figures]
    if not done:
        return
    facts = circumstances(seeds=len(arguments.runs), prompts=arguments.prompts, iterations=arguments.iterations)
    command = facts.pop("command")
    head = f"`{command}`; " + "; ".join(f"{name} {value}" for name, value in facts.items())
    stem = arguments.out / f"{arguments.date}-frontier"
    if arguments.tune:
        text = f"# Settings tried for the frontier\n\n{head}\n\n{tuning_report(done)}\n"
        stem.with_name(f"{stem.name}-tuning.md").write_text(text, encoding="utf-8")
        print(tuning_report(done))
        return
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows_of(done))
    plot(done, stem.with_suffix(".png"))
    stem.with_suffix(".md").write_text(f"# The frontier\n\n{head}\n\n{report(done)}\n", encoding="utf-8")
    print(report(done))


if __name__ == "__main__":
    main()

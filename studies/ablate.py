"""Which details of PPO matter here? Each is switched off alone, over several seeds, beside the whole recipe.

    python studies/ablate.py                                        # the run of `python -m minirlhf`, 40 minutes
    python studies/ablate.py --details ratio-clip kl --seeds 0      # two of them and the recipe, 4 minutes
    python studies/ablate.py --runs runs/seed-0 runs/seed-1 runs/seed-2       # SFT and reward model of each seed's own
    python studies/ablate.py --minutes 60                           # the same command goes on where it stopped

From a run come the SFT and the reward model alone. A trial is one training by PPO; every few iterations its policy
answers held-out prompts, and the embedded world's judge marks them. Writes tables (.md), curves (.csv) and a figure.
studies/ablation_report.py says how the intervals are made; studies/ablations.md what a study showed.
The model of such a study: Engstrom et al. 2020, arXiv 2005.12729; the details: Huang et al. 2024, arXiv 2403.17031.
"""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import project  # noqa: F401  first: it finds the package
from ablation_report import CURVES, HELD_OUT, WHOLE, Done, Figures, plot, report, write_csv
from trials import Trial, run_trials

import train_ppo
from minirlhf import data, tokenizer
from minirlhf.config import Count, Positive, Seed, Settings, run_script
from minirlhf.evaluate import evaluation
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runs.log import read_rows, versions
from minirlhf.runtime import require

AS_TRAINED = "as trained"  # stands for the reward model without its normalisation, which every trial makes itself
# What is switched off, and train_ppo.py's settings for it.
DETAILS: dict[str, dict[str, Any]] = {
    "kl": {"beta": 0.0},
    "whitening": {"whiten_advantages": False},
    "value-clip": {"value_clip": None},
    "ratio-clip": {"clip": None},
    "eos-score": {"missing_eos_score": None},
    "reward-normalisation": {"reward_model": AS_TRAINED},
    "value-init": {"value_init": "policy"},
    "epochs": {"epochs": 1},
    "lr-decay": {"schedule": "constant"},
    "adam-eps": {"adam_eps": 1e-8},
}
ANSWERS = 5  # kept of the last measurement, to be read


@dataclass
class Config(Settings):
    preset: Literal["tiny", "smoke"] = "tiny"
    """Set of defaults: `tiny` is the study; `smoke` goes through it in seconds and says nothing."""
    runs: tuple[Path, ...] = (Path("runs/tiny"),)
    """Finished runs, whose SFT and reward model are used: one for all seeds, or the run of seed 0, of seed 1, ..."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of PPO and of the answers to held-out prompts."""
    details: tuple[
        Literal["kl", "whitening", "value-clip", "ratio-clip", "eos-score", "reward-normalisation", "value-init"]
        | Literal["epochs", "lr-decay", "adam-eps"],
        ...,
    ] = tuple(DETAILS)
    """Which to switch off; the whole recipe is always run too."""
    work: Path = Path("runs/ablate")
    """Folder of the trials. What has a result there is not run again."""
    out: Path = Path("runs/ablate")
    """Folder of the results, `<date>-ablations.md`, `.csv` and `.png`."""
    iterations: Count = 16
    """Rollouts of PPO."""
    rollout_size: Count = 128
    """Responses a rollout."""
    learning_rate: Positive = 2e-4
    """Of the policy; the larger the steps, the more the clips have to hold."""
    prompts: Count = 200
    """Held-out prompts."""
    every: Count = 4
    """Iterations between two measurements on held-out prompts."""
    jobs: Count = 1
    """Trials at a time, each with one thread."""
    minutes: Positive | None = None
    """Start no trial after so many; by default all are run."""


SMALL = Path("runs/ablate-smoke")
SMOKE = {"iterations": 2, "rollout_size": 8, "prompts": 4, "every": 1, "seeds": (0,)}
PRESETS = {
    "tiny": Config(),
    "smoke": Config("smoke", runs=(Path("runs/smoke"),), work=SMALL, out=SMALL, **SMOKE),
}


# ---------------------------------------------------------------------------------------------------------- one trial
def learn(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train with the changed settings: the curves, the means on held-out prompts, and at the end every prompt's."""
    run, changes = Path(settings["run"]), dict(settings["changes"])
    scale = {"mean": 0.0, "std": 1.0}
    if changes.get("reward_model") == AS_TRAINED:
        changes["reward_model"], scale = unnormalised(run, folder / "reward-as-trained")
    evaluator = held_out(run, settings["prompts"], settings["seed"])
    start = evaluator.measure(evaluator.sample(evaluator.sft))
    measured = {0: each_prompt(start, start)}
    answers: list[str] = []

    def observe(state: train_ppo.State, *_: object) -> None:
        due = state.iteration % settings["every"] == 0 or state.iteration == settings["iterations"]
        if state.iteration and due:
            now = evaluator.measure(evaluator.sample(state.policy))
            measured[state.iteration] = each_prompt(now, start)
            answers[:] = now.texts[:ANSWERS]

    shutil.rmtree(folder / "ppo", ignore_errors=True)  # a curve has no gap: a trial that was cut off trains anew
    whole = {"run": folder, "policy": str(run / "sft" / "model"), "reward_model": str(run / "reward" / "model")}
    sizes = {name: settings[name] for name in ("iterations", "rollout_size", "learning_rate", "seed")}
    train_ppo.main(
        train_ppo.Config(**{**whole, **sizes, **changes}, checkpoint_every=10_000, device="cpu"), observe=observe
    )
    rows = read_rows(folder / "ppo")
    curves = {name: [row[name] for row in rows] for name in CURVES}
    curves["score"] = [(score - scale["mean"]) / scale["std"] for score in curves["score"]]  # as of the normalised
    means = {i: {name: float(np.mean(found[name])) for name in HELD_OUT} for i, found in measured.items()}
    return {"curves": curves, "held_out": means, "end": measured[settings["iterations"]], "answers": answers}


def held_out(run: Path, prompts: int, seed: int) -> evaluation.Evaluator:
    """The run's SFT model and its normalised reward model on the first held-out prompts."""
    config = evaluation.Config(run=run, max_prompts=prompts, seed=seed, device="cpu")
    texts = [record["prompt"] for record in data.load(config.prompts, "prompts")][:prompts]
    sft = GPT.from_pretrained(run / "sft" / "model").eval().requires_grad_(False)
    reward_model = RewardModel.from_pretrained(run / "reward" / "model").eval().requires_grad_(False)
    encoding = tokenizer.load(run / "sft" / "model")
    return evaluation.Evaluator(sft, reward_model, encoding, texts, config, evaluation.judge_parts)


def each_prompt(answers: evaluation.Answers, start: evaluation.Answers) -> dict[str, list[float]]:
    """What was measured of the answer to each prompt; a win is one over the SFT model's answer, ties half."""
    judge = answers.parts[:, 0]
    wins = evaluation.wins(judge, start.parts[:, 0])
    each = (judge, wins, answers.kl, answers.reward, answers.lengths)
    return {name: values.astype(float).round(4).tolist() for name, values in zip(HELD_OUT, each, strict=True)}


def unnormalised(run: Path, folder: Path) -> tuple[str, dict[str, float]]:
    """The reward model with the scores that it was trained to give, saved in `folder`; and their mean and deviation."""
    path = run / "reward" / "normalisation.json"
    require(path.is_file(), f"{path}: no such file; give --runs whose reward model was trained by train_reward.py")
    before = json.loads(path.read_text(encoding="utf-8"))["before"]
    model = RewardModel.from_pretrained(run / "reward" / "model")
    model.normalise(-before["mean"] / before["std"], 1 / before["std"])  # the inverse of (old - mean) / std
    model.save_pretrained(folder)
    return str(folder), before


# ---------------------------------------------------------------------------------------------------------- the study
def study(config: Config) -> list[Trial]:
    """The trials, seed by seed, so that an unfinished study has whole seeds."""
    count = len(config.runs)
    last = max(config.seeds, default=0)
    require(len(config.seeds) > 0, "--seeds: give at least one")
    require(count == 1 or last < count, f"--seeds {last}: --runs has {count}, of seed 0 to {count - 1}; give one more")
    sizes = {
        name: getattr(config, name) for name in ("iterations", "rollout_size", "learning_rate", "prompts", "every")
    }
    trials = []
    for seed in config.seeds:
        run = config.runs[0 if count == 1 else seed]
        for stage in ("sft", "reward"):
            require(
                (run / stage / "model").is_dir(), f"{run}: no {stage}/model; run `python -m minirlhf --run {run}` first"
            )
        for name in (WHOLE, *config.details):
            settings = {"run": str(run), "seed": seed, **sizes, "changes": DETAILS.get(name, {})}
            trials.append(Trial(f"{name}-seed-{seed}", settings))
    return trials


def by_detail(figures: Mapping[str, Figures], config: Config) -> Done:
    """What is finished, by what is switched off and by seed; rows without any are left out."""
    names = {name: {seed: f"{name}-seed-{seed}" for seed in config.seeds} for name in (WHOLE, *config.details)}
    found = {name: {s: figures[key] for s, key in each.items() if key in figures} for name, each in names.items()}
    return {name: each for name, each in found.items() if each}


def main(config: Config) -> Done:
    """Run what has no result yet, and write what there is; returns the figures."""
    figures = run_trials(learn, study(config), config.work, jobs=config.jobs, minutes=config.minutes)
    done = by_detail(figures, config)
    if done:
        config.out.mkdir(parents=True, exist_ok=True)
        stem = config.out / f"{datetime.date.today()}-ablations"
        facts = {"command": " ".join(["python studies/ablate.py", *sys.argv[1:]]), **versions()}
        facts |= {name: value for name, value in asdict(config).items() if name in ("seeds", *SMOKE, "learning_rate")}
        text = report(done, "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
        write_csv(done, stem.with_suffix(".csv"))
        plot(done, stem.with_suffix(".png"))
        print(text)
    return done


if __name__ == "__main__":
    run_script(main, PRESETS)

"""Over-optimisation in one figure: the proxy goes up and the judge goes down.

    python benchmarks/overoptimise.py --run runs/tiny        # after `python -m minirlhf`, about five minutes

Trains PPO twice from the run's SFT and reward models: with the demo's settings, and with a KL penalty that is too
small and a learning rate that is too high. Every few iterations held-out prompts are answered and scored by the
reward model (the proxy that PPO sees) and by the judge (which nothing in training sees).
Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760.
Writes <date>-overoptimisation.csv and .png to --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from dataclasses import replace
from pathlib import Path

import torch

import train_ppo
from minirlhf import data, evaluate, tokenizer
from minirlhf.model import GPT
from minirlhf.reward import RewardModel

SETTINGS = {
    "the demo's": {},
    "beta 0.005, rate 1e-3": {"beta": 0.005, "learning_rate": 1e-3, "value_learning_rate": 1e-3},
}
FIELDS = ("settings", "iteration", "kl", "reward", "judge", "helpful", "honest", "harmless", "length", "answer")


def held_out(run: Path, prompts: int, seed: int) -> evaluate.Evaluator:
    """The evaluation of a run on the first `prompts` held-out prompts."""
    config = evaluate.Config(run=run, max_prompts=prompts, seed=seed)
    texts = [record["prompt"] for record in data.load(config.prompts, "prompts")][:prompts]
    sft = GPT.from_pretrained(run / "sft" / "model").eval().requires_grad_(False)
    reward_model = RewardModel.from_pretrained(run / "reward" / "model").eval().requires_grad_(False)
    encoding = tokenizer.load(run / "sft" / "model")
    return evaluate.Evaluator(sft, reward_model, encoding, texts, config, evaluate.judge_parts)


def trace(name: str, config: train_ppo.Config, evaluator: evaluate.Evaluator, every: int) -> list[dict]:
    """Train, and measure the policy before the first iteration and after each `every`."""
    rows: list[dict] = []

    def measure(policy: GPT, iteration: int) -> None:
        answers = evaluator.measure(evaluator.sample(policy))
        total, *parts = answers.parts.mean(axis=0)
        numbers = (iteration, answers.kl.mean(), answers.reward.mean(), total, *parts, answers.lengths.mean())
        rows.append(dict(zip(FIELDS, (name, *(round(float(n), 4) for n in numbers), answers.texts[0]), strict=True)))

    def observe(state: train_ppo.State) -> None:
        if state.iteration % every == 0:
            measure(state.policy, state.iteration)

    measure(evaluator.sft, 0)
    train_ppo.main(config, observe=observe)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Reward and judge against iterations, one panel for each setting."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SETTINGS), figsize=(9, 3.6), sharey=True)
    for panel, name in zip(panels, SETTINGS, strict=True):
        mine = [row for row in rows if row["settings"] == name]
        iterations = [row["iteration"] for row in mine]
        panel.plot(iterations, [row["reward"] for row in mine], label="reward model (proxy)")
        panel.plot(iterations, [row["judge"] for row in mine], label="judge")
        panel.set_title(f"{name}: KL {mine[-1]['kl']:.1f} nats at the end")
        panel.set_xlabel("PPO iterations")
    panels[0].set_ylabel("mean over held-out prompts")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="a finished run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--iterations", type=int, default=100, help="PPO iterations")
    parser.add_argument("--every", type=int, default=5, help="iterations between two measurements")
    parser.add_argument("--prompts", type=int, default=250, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of PPO and of the measurements")
    arguments = parser.parse_args()
    evaluator = held_out(arguments.run, arguments.prompts, arguments.seed)
    base = train_ppo.Config(run=arguments.run, iterations=arguments.iterations, seed=arguments.seed, device="cpu")
    rows = []
    for number, (name, settings) in enumerate(SETTINGS.items()):
        config = replace(base, stage=f"overoptimise-{number}", **settings)
        rows += trace(name, config, evaluator, arguments.every)
    stem = arguments.out / f"{datetime.date.today()}-overoptimisation"
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, stem.with_suffix(".png"))
    print(f"{stem}.csv and .png; torch {torch.__version__}, Python {platform.python_version()}, seed {arguments.seed}")


if __name__ == "__main__":
    main()

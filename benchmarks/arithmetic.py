"""ReFT on small arithmetic: SFT on worked answers, then RL on whether the final answer is right.

    python benchmarks/arithmetic.py                      # minutes; the gain is small so far, see docs/log.md
    python benchmarks/arithmetic.py --seed 1 --advantages grpo

Held-out problems are answered once at temperature 1 (the policy that was trained) and once greedily; right is what
`minirlhf.rewards.arithmetic` says. Intervals: 95 %, by bootstrap over the problems. RL sees no worked answer.
Luong et al. 2024, "ReFT: Reasoning with Reinforced Fine-Tuning", arXiv 2401.08967. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import real

import train_ppo
import train_sft
from minirlhf import data, evaluate, rewards, tokenizer
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.runtime import Stream, project_file

sys.path.insert(0, str(project_file()))
import make_arithmetic  # a script of data/, not a module of the package

LONGEST = 48  # tokens of an answer, which are bytes


def accuracy(folder: Path, problems: Path, *, temperature: float, seed: int) -> dict[str, object]:
    """The share of held-out problems that a model gets right, with its interval."""
    model, encoding = GPT.from_pretrained(folder).eval().requires_grad_(False), tokenizer.load(folder)
    prompts = [record["prompt"] for record in data.load(problems, "prompts")]
    samples = generate(
        model,
        [data.encode_prompt(encoding, prompt) for prompt in prompts],
        max_new_tokens=LONGEST,
        eos_id=encoding.eot_token,
        temperature=temperature,
        seed=seed,
        keys=[(Stream.EVALUATION, i) for i in range(len(prompts))],
        slots=512,
    )
    right = np.array(rewards.arithmetic(prompts, rewards.texts(encoding, samples)[1]))
    interval = evaluate.bootstrap_interval(right, seed=seed)
    return {"right": round(float(right.mean()), 4), "interval": [round(end, 4) for end in interval]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/arithmetic"), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights, sampling")
    parser.add_argument("--advantages", default="rloo", help="as of train_ppo.py")
    parser.add_argument("--sft-epochs", type=float, default=4.0, help="passes over the worked answers")
    parser.add_argument("--iterations", type=int, default=60, help="of RL")
    arguments = parser.parse_args()
    seed, run = arguments.seed, arguments.run / f"seed-{arguments.seed}"
    files = make_arithmetic.write(run / "problems", seed)
    common = {"run": run, "seed": seed, "device": "cpu", "resume": True}
    seconds = {}
    start = time.perf_counter()
    sft = train_sft.main(
        train_sft.Config(
            train=str(files["demonstrations"]),
            tokenizer="bytes",
            n_positions=96,
            epochs=arguments.sft_epochs,
            **common,
        )
    )
    seconds["sft"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    trained = train_ppo.main(
        train_ppo.Config(
            stage=f"ppo-{arguments.advantages}",
            prompts=str(files["problems"]),
            reward=("minirlhf.rewards:arithmetic",),
            advantages=arguments.advantages,
            group_size=1 if arguments.advantages in ("gae", "reinforce") else 8,
            rollout_size=256,
            iterations=arguments.iterations,
            epochs=2,
            max_new_tokens=LONGEST,
            missing_eos_score=0.0,
            beta=0.01,
            learning_rate=1e-4,
            **common,
        )
    )
    seconds["rl"] = round(time.perf_counter() - start, 1)
    results = {
        name: {
            "sampled": accuracy(folder, files["test"], temperature=1.0, seed=seed),
            "greedy": accuracy(folder, files["test"], temperature=0.0, seed=seed),
        }
        for name, folder in (("sft", sft), ("rl", trained))
    }
    print(json.dumps({**results, "seconds": seconds, **real.circumstances(seed=seed)}, indent=1))


if __name__ == "__main__":
    main()

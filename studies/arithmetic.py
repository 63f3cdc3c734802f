"""ReFT on small arithmetic: SFT on few worked answers, then RL on whether the final answer is right.

    python studies/arithmetic.py                    # three seeds; goes on where it was stopped
    python studies/arithmetic.py --smoke            # everything once, in seconds; its figures mean nothing

    sft        a new small GPT-2 on 350 worked answers, of which a tenth is held out, to the end of what they teach
    ppo        train_ppo.py from there on 8,000 other problems; of an answer it sees only 1 where it ends right
    rloo       the same without a value model: as many answers, in groups of 8, whose mean is the baseline
    longer     control: at least as many more optimizer steps of SFT on the same worked answers as PPO takes
    rejection  SFT once more, on the worked answers and the right ones among 8 of its own to 2,000 of RL's problems

Held-out problems, which are in no other file, are answered 8 times at temperature 1 (the policy that RL trains) and
once greedily. Right is what `minirlhf.reward_functions.arithmetic` says, the reward itself. Intervals: 95 %, by
bootstrap over problems. RL's settings were chosen by the score on its own problems of seed 0. Luong et al. 2024, "ReFT:
Reasoning with Reinforced Fine-Tuning", arXiv 2401.08967. Writes <date>-arithmetic.json and .md to --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import project  # noqa: F401  first: it finds the package
import real
import torch

import train_ppo
import train_sft
from minirlhf import data, rejection, reward_functions, tokenizer
from minirlhf.encode import encode_prompt
from minirlhf.evaluate.statistics import bootstrap_interval, estimate
from minirlhf.files import write_records
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.runtime import Stream, project_file

sys.path.insert(0, str(project_file()))
import make_arithmetic  # a script of data/, not a module of the package

REWARD = ("minirlhf.reward_functions:arithmetic",)
LONGEST = 36  # tokens of an answer; the longest worked answer has 32
SAMPLES = 8
BATCH = 32


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. The small model is so that minutes on a CPU are enough."""

    n_layer: int = 3
    n_embd: int = 64
    sft_epochs: float = 150.0
    sft_rate: float = 4e-3
    iterations: int = 300
    rollout_size: int = 512
    warmup: int = 10
    rate: float = 3e-4  # of the policy, with a value model and without
    value_rate: float = 1e-3
    rejection_prompts: int = 2000
    rejection_epochs: float = 8.0
    tests: int = 500


SMOKE = Settings(
    1, 32, 0.3, iterations=2, rollout_size=16, warmup=1, rejection_prompts=24, rejection_epochs=1.0, tests=20
)
PASSES = 2  # over a rollout, in as many minibatches: four optimizer steps an iteration


def reinforce(run: Path, files: Mapping[str, Path], settings: Settings, **others: object) -> Path:
    """RL from the SFT model on whether the answer is right; returns the policy's folder."""
    return train_ppo.main(
        train_ppo.Config(
            run=run,
            prompts=str(files["problems"]),
            reward=REWARD,
            rollout_size=settings.rollout_size,
            iterations=settings.iterations,
            warmup_iterations=settings.warmup,
            max_new_tokens=LONGEST,
            missing_eos_score=0.0,
            beta=0.0,
            epochs=PASSES,
            minibatches=PASSES,
            learning_rate=settings.rate,
            checkpoint_every=50,
            micro_batch_tokens=4096,
            **others,
        )
    )


def both_ways(
    run: Path, files: Mapping[str, Path], settings: Settings, common: Mapping[str, object]
) -> dict[str, Path]:
    """RL with a value model, which gives each token an advantage of its own, and without, which gives them all one."""
    ppo = reinforce(run, files, settings, **common, value_learning_rate=settings.value_rate)
    rloo = reinforce(run, files, settings, **common, stage="rloo", advantages="rloo", group_size=SAMPLES)
    return {"ppo": ppo, "rloo": rloo}


def train(run: Path, settings: Settings, seed: int) -> dict[str, Path]:
    """All stages by the scripts' own `main`; finished ones are kept. Returns the folder of each model."""
    files = make_arithmetic.write(run / "problems", seed)
    common = {"seed": seed, "device": "cpu", "resume": True}
    sft = train_sft.main(
        train_sft.Config(
            **common,
            run=run,
            train=str(files["demonstrations"]),
            n_layer=settings.n_layer,
            n_embd=settings.n_embd,
            n_positions=64,
            epochs=settings.sft_epochs,
            batch_size=BATCH,
            learning_rate=settings.sft_rate,
        )
    )
    policies = both_ways(run, files, settings, common)
    more = {**common, "model": str(sft), "batch_size": BATCH}
    steps = settings.iterations * PASSES**2
    learned = len(data.load(files["demonstrations"], "demonstrations")) * 0.9
    longer = train_sft.main(
        train_sft.Config(
            **more,
            run=run / "longer",
            train=str(files["demonstrations"]),
            epochs=steps * BATCH / learned,
            learning_rate=settings.sft_rate,
        )
    )
    right = right_answers(run, files, settings, seed)
    rejected = train_sft.main(
        train_sft.Config(
            **more,
            run=run / "rejection-sft",
            train=str(right),
            epochs=settings.rejection_epochs,
            learning_rate=settings.sft_rate / 2,
        )
    )
    return {"sft": sft, **policies, "longer": longer, "rejection": rejected}


def right_answers(run: Path, files: dict[str, Path], settings: Settings, seed: int) -> Path:
    """The worked answers, and a right answer of the SFT model to each of RL's problems where one of eight was right."""
    best = rejection.main(
        rejection.Config(
            run=run,
            prompts=str(files["problems"]),
            split=f"[:{settings.rejection_prompts}]",
            reward=REWARD,
            candidates=SAMPLES,
            max_new_tokens=LONGEST,
            seed=seed,
            device="cpu",
            resume=True,
        )
    )
    own = [record for record in data.load(best, "demonstrations") if record["score"] == 1]
    path = run / "right.jsonl"
    records = [*data.load(files["demonstrations"], "demonstrations"), *own]
    write_records(path, [{name: record[name] for name in ("prompt", "response")} for record in records])
    return path


def answers(folder: Path, prompts: list[str], *, samples: int, temperature: float, seed: int) -> np.ndarray:
    """(P, samples) 1 where a model's answer is right, 0 where it is not."""
    model, encoding = GPT.from_pretrained(folder).eval().requires_grad_(False), tokenizer.load(folder)
    rows = [(i, k) for i in range(len(prompts)) for k in range(samples)]
    ids = [encode_prompt(encoding, prompt) for prompt in prompts]
    given = generate(
        model,
        [ids[i] for i, _ in rows],
        max_new_tokens=LONGEST,
        eos_id=encoding.eot_token,
        temperature=temperature,
        seed=seed,
        keys=[(Stream.EVALUATION, i, k) for i, k in rows],
        slots=512,
    )
    right = reward_functions.arithmetic([prompts[i] for i, _ in rows], reward_functions.texts(encoding, given)[1])
    return np.array(right).reshape(len(prompts), samples)


def measure(folders: dict[str, Path], prompts: list[str], seed: int) -> dict[str, dict]:
    """Each model on the held-out problems: sampled, greedy, at least one of eight right, and sampled less SFT's."""
    result, start = {}, None
    for name, folder in folders.items():
        sampled = answers(folder, prompts, samples=SAMPLES, temperature=1.0, seed=seed)
        greedy = answers(folder, prompts, samples=1, temperature=0.0, seed=seed)
        start = sampled if start is None else start
        gain = (sampled - start).mean(axis=1)
        result[name] = {
            "sampled": estimate(sampled, seed=seed),
            "greedy": estimate(greedy, seed=seed),
            f"pass_at_{SAMPLES}": estimate(sampled.max(axis=1, keepdims=True), seed=seed),
            "gain": {"mean": float(gain.mean()), "interval": bootstrap_interval(gain, seed=seed)},
        }
    return result


def table(seeds: dict[str, dict]) -> str:
    """The figures as Markdown, a row for each model of each seed."""

    def cell(found: dict, sign: str = "") -> str:
        low, high = found["interval"]
        return f"{100 * found['mean']:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"

    lines = [
        f"| seed | model | sampled, % right | greedy | one of {SAMPLES} | sampled less SFT's |",
        "| --- " * 6 + "|",
    ]
    for seed, models in seeds.items():
        for name, m in models.items():
            figures = [cell(m["sampled"]), cell(m["greedy"]), cell(m[f"pass_at_{SAMPLES}"])]
            lines.append(" | ".join([f"| {seed}", name, *figures, cell(m["gain"], "+") + " |"]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of the runs (default: runs/arithmetic, or -smoke)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; smoke: --run)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of problems, weights, sampling")
    parser.add_argument("--smoke", action="store_true", help="everything once and small; its figures mean nothing")
    arguments = parser.parse_args()
    settings = SMOKE if arguments.smoke else Settings()
    work = arguments.run or Path("runs/arithmetic-smoke" if arguments.smoke else "runs/arithmetic")
    out = arguments.out or (work if arguments.smoke else Path("benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so small that a second thread gains nothing, and figures do not depend on the number
    seeds = {}
    for seed in arguments.seeds:
        run = work / f"seed-{seed}"
        real.begin(run, asdict(settings))
        folders = train(run, settings, seed)
        prompts = [record["prompt"] for record in data.load(run / "problems" / "test.jsonl", "prompts")]
        seeds[str(seed)] = measure(folders, prompts[: settings.tests], seed)
        print(table({str(seed): seeds[str(seed)]}), flush=True)
    known = real.circumstances(settings=asdict(settings))
    result = {**known, "problems": settings.tests, "seeds": seeds, "training_seconds": real.stage_seconds(work)}
    stem = out / f"{datetime.date.today()}-arithmetic"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    said = f"{settings.tests} held-out problems; 95 % intervals by bootstrap over problems, gains paired by problem."
    text = f"# Answers that can be checked\n\n{real.heading(known, work)}\n\n{table(seeds)}\n\n{said}\n"
    stem.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()

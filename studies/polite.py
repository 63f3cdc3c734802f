"""SFT, PPO and DPO on real pairs of polite and rude answers, judged by a reward model that training never met.

    python studies/polite.py            # about ten minutes on one busy core; goes on where it was stopped
    python studies/polite.py --smoke    # everything once, in seconds; its figures mean nothing

The 890 pairs are divided by prompt into ten folds: four for training, four for the judge, two for evaluation.

    pretraining    a small GPT-2 on dialogues of another data set; policy and judge both start from it
    SFT            on both sides of the training pairs, so that the model writes as the people of the data do, politely
                   and rudely; `sft-chosen` learns from the chosen sides alone
    reward model   on the training pairs; PPO sees this one, and DPO the same pairs
    judge          another trunk (SFT on the judge's pairs) with a reward model trained on the judge's pairs

Every model answers the prompts of the evaluation folds; a win is a higher score by the judge than the SFT model's
answer with the same random numbers, ties count half, and intervals are by bootstrap over prompts.
Writes <date>-polite.json and .md to --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import project  # noqa: F401  first: it finds the package
import real
import torch

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data
from minirlhf.batch import permutation
from minirlhf.encode import Record, encode_comparisons
from minirlhf.evaluate import Answers, Evaluator, bootstrap_interval, evaluation
from minirlhf.evaluate.judges import ModelFolder
from minirlhf.evaluate.statistics import wins
from minirlhf.files import write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel

NEW_TOKENS = 40
FOLDS = 10
PARTS = {"train": range(0, 4), "judge": range(4, 8), "test": range(8, 10)}
COMPARED = ("sft-chosen", "dpo", "ppo")


@dataclass(frozen=True)
class Settings:
    """Sizes of a run."""

    pairs: int = 890
    dialogues: int = 1000
    vocabulary: int = 1024
    n_layer: int = 4
    n_embd: int = 128
    pretraining_epochs: float = 2.0
    sft_epochs: float = 5.0
    reward_epochs: float = 5.0
    dpo_epochs: float = 4.0
    dpo_beta: float = 0.1
    ppo_iterations: int = 30
    ppo_beta: float = 0.05
    samples: int = 4
    seed: int = 0


SMOKE = Settings(180, 40, 400, 1, 32, 1.0, 1.0, 1.0, 1.0, 0.1, 2, 0.1, 1)


def divide(records: Sequence[Record], seed: int) -> dict[str, list[Record]]:
    """The pairs of each part; all pairs of a prompt fall into the same fold."""
    prompts = sorted({record["prompt"] for record in records})
    fold = {prompts[i]: place % FOLDS for place, i in enumerate(permutation(len(prompts), seed))}
    return {name: [r for r in records if fold[r["prompt"]] in folds] for name, folds in PARTS.items()}


def last_exchange(record: Record) -> str:
    """The last question of a dialogue with its answer, as one text."""
    start = record["prompt"].rfind("\n\nHuman:")
    return record["prompt"][start:] + record["response"]


def prepare(work: Path, settings: Settings) -> None:
    """Write the files of the run: dialogues, and of each part its pairs, both sides, chosen sides and prompts."""
    folder = real.data_folder() / "preference"
    dialogues = data.load(folder / "hh-helpful-base.train.jsonl.gz", "demonstrations")[: settings.dialogues]
    texts = [last_exchange(record) for record in dialogues]
    write_records(work / "dialogues.jsonl", [{"prompt": "", "response": text} for text in texts])
    records = data.load(folder / "polite-instructions.json", "pairs")[: settings.pairs]
    parts = divide(records, settings.seed)
    for name, pairs in parts.items():
        sides = {side: [{"prompt": r["prompt"], "response": r[side]} for r in pairs] for side in ("chosen", "rejected")}
        write_records(work / f"{name}.pairs.jsonl", pairs)
        write_records(work / f"{name}.both.jsonl", sides["chosen"] + sides["rejected"])
        write_records(work / f"{name}.chosen.jsonl", sides["chosen"])
    training = [r["prompt"] + r[side] for r in parts["train"] for side in ("chosen", "rejected")]
    real.vocabulary(texts + training, settings.vocabulary, work / "vocabulary")


def train(work: Path, settings: Settings) -> None:
    """All stages by the scripts' own `main`; finished ones are kept."""
    common = {"seed": settings.seed, "resume": True, "device": "cpu"}
    base, judge, chosen = (work / name for name in ("pretraining", "judge", "sft-chosen"))
    sizes = {"n_layer": settings.n_layer, "n_embd": settings.n_embd, "n_positions": 128}
    many_steps = {"batch_size": 8, "learning_rate": 2e-3, "checkpoint_every": 250, "validation_every": 250}
    train_sft.main(
        train_sft.Config(
            **common,
            **sizes,
            **many_steps,
            run=base,
            train=str(work / "dialogues.jsonl"),
            tokenizer=str(work / "vocabulary"),
            epochs=settings.pretraining_epochs,
        )
    )
    tuning = {"model": str(base / "sft" / "model"), "epochs": settings.sft_epochs, "batch_size": 16}
    tuning |= {"learning_rate": 1e-3}
    for run, file in ((work, "train.both"), (chosen, "train.chosen"), (judge, "judge.both")):
        train_sft.main(train_sft.Config(**common, **tuning, run=run, train=str(work / f"{file}.jsonl")))
    for run, part in ((work, "train"), (judge, "judge")):
        train_reward.main(
            train_reward.Config(
                **common,
                run=run,
                comparisons=str(work / f"{part}.pairs.jsonl"),
                epochs=settings.reward_epochs,
                batch_size=8,
                max_new_tokens=NEW_TOKENS,
            )
        )
    train_dpo.main(
        train_dpo.Config(
            **common,
            run=work,
            comparisons=str(work / "train.pairs.jsonl"),
            epochs=settings.dpo_epochs,
            batch_size=16,
            beta=settings.dpo_beta,
        )
    )
    train_ppo.main(
        train_ppo.Config(
            **common,
            run=work,
            prompts=str(work / "train.pairs.jsonl"),
            iterations=settings.ppo_iterations,
            rollout_size=64,
            epochs=2,
            minibatches=2,
            max_new_tokens=NEW_TOKENS,
            beta=settings.ppo_beta,
            learning_rate=5e-4,
            value_learning_rate=1e-3,
        )
    )


def pair_accuracy(folder: ModelFolder, work: Path) -> dict[str, float]:
    """How often the model prefers the chosen side of the pairs of the evaluation folds."""
    records = data.load(work / "test.pairs.jsonl", "pairs")
    pairs = encode_comparisons(folder.encoding, records, max_length=folder.positions)
    model = folder.load(RewardModel, torch.device("cpu"))
    found = train_reward.held_out(model, pairs, torch.device("cpu"), max_tokens=8192)
    return {"share": float(found["validation_accuracy"]), "pairs": len(pairs)}


def measure(work: Path, settings: Settings) -> dict:
    """Every model on the prompts of the evaluation folds, `samples` answers a prompt."""
    judge, proxy = (ModelFolder.find(str(run / "reward"), RewardModel) for run in (work / "judge", work))
    prompts = [record["prompt"] for record in data.load(work / "test.pairs.jsonl", "prompts")]
    places = {"sft": work / "sft", "sft-chosen": work / "sft-chosen" / "sft", "dpo": work / "dpo", "ppo": work / "ppo"}
    folders = {name: ModelFolder.find(str(place), GPT) for name, place in places.items()}
    models = {name: folder.load(GPT, torch.device("cpu")) for name, folder in folders.items()}
    config = evaluation.Config(run=work, max_new_tokens=NEW_TOKENS, seed=settings.seed, device="cpu")
    # One prompt in the evaluator for each answer: it measures one answer a prompt.
    repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
    sft, every = folders["sft"], list(folders.values())
    evaluator = Evaluator(config, repeated, every, judge=None, reward_model=judge, reference=sft)  # no parts beside it
    answers = {name: evaluator.measure(evaluator.sample(model, sft.encoding)) for name, model in models.items()}
    result = {name: summarise(a, answers["sft"], settings) for name, a in answers.items()}
    for name, row in result.items():
        row["answers"] = dict(
            zip(repeated[:: settings.samples][:3], answers[name].texts[:: settings.samples], strict=False)
        )
    agreement = {"judge": pair_accuracy(judge, work), "reward model of PPO": pair_accuracy(proxy, work)}
    return {"prompts": len(prompts), "pair_accuracy": agreement, "models": result}


def summarise(answers: Answers, baseline: Answers, settings: Settings) -> dict:
    """Win rate against the baseline, the judge's score, KL and lengths; intervals over prompts, not answers."""

    def by_prompt(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, settings.samples).mean(axis=1)

    won, judged = by_prompt(wins(answers["reward"], baseline["reward"])), by_prompt(answers["reward"])
    return {
        "win_rate": {"mean": float(won.mean()), "interval": bootstrap_interval(won, seed=settings.seed)},
        "judge": {"mean": float(judged.mean()), "interval": bootstrap_interval(judged, seed=settings.seed)},
        "kl": float(answers["kl"].mean()),
        "length": float(answers["length"].mean()),
        "eos_rate": float(answers["finished"].mean()),
    }


def table(result: dict, settings: Settings) -> str:
    """The figures as Markdown."""
    lines = ["| model | wins against SFT | 95 % interval | judge | 95 % interval | KL to SFT | length | EOS |"]
    lines.append("| --- " * 8 + "|")
    for name, m in result["models"].items():
        (win_low, win_high), (low, high) = m["win_rate"]["interval"], m["judge"]["interval"]
        lines.append(
            f"| {name} | {m['win_rate']['mean']:.1%} | {win_low:.1%} to {win_high:.1%} | {m['judge']['mean']:.2f} "
            f"| {low:.2f} to {high:.2f} | {m['kl']:.1f} | {m['length']:.1f} | {m['eos_rate']:.0%} |"
        )
    accuracies = [f"{name} {a['share']:.1%} of {a['pairs']}" for name, a in result["pair_accuracy"].items()]
    lines += ["", f"Pairs of the evaluation folds ordered as people did: {', '.join(accuracies)}."]
    lines.append(
        f"{result['prompts']} prompts, {settings.samples} answers each, temperature 1; KL in nats an answer on these "
        "fresh samples, length in tokens. The judge's score has mean 0 and deviation 1 over its own SFT model's."
    )
    for name, m in result["models"].items():
        for prompt, answer in m["answers"].items():
            asked = prompt.removeprefix("\n\nHuman:").removesuffix("\n\nAssistant:").strip()
            lines += ["", f"- {name}: `{asked!r}` → `{answer.strip()!r}`"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the run (default: runs/polite, or runs/polite-smoke)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; smoke: --work)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds and of every stage")
    parser.add_argument("--smoke", action="store_true", help="everything once and small; its figures mean nothing")
    arguments = parser.parse_args()
    settings = replace(SMOKE if arguments.smoke else Settings(), seed=arguments.seed)
    work = arguments.work or Path("runs/polite-smoke" if arguments.smoke else "runs/polite")
    out = arguments.out or (work if arguments.smoke else Path("benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    real.data_folder()
    torch.set_num_threads(1)  # so small that a second thread gains nothing, and figures do not depend on the number
    real.begin(work, asdict(settings))
    prepare(work, settings)
    train(work, settings)
    known = real.circumstances(settings=asdict(settings))
    result = {**known, **measure(work, settings), "training_seconds": real.stage_seconds(work)}
    stem = out / f"{datetime.date.today()}-polite"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = f"# Polite answers\n\n{real.heading(known, work)}\n\n{table(result, settings)}\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""AI feedback beside human feedback: a small judge learns from people, labels new prompts, and PPO learns from both.

    python studies/rlaif.py --run runs/tiny       # after `python -m minirlhf`; a quarter of an hour on one core

1. The run's rankings are divided by prompt. On one half a judge learns to give verdicts: `train_sft.py` on worked
   comparisons "prompt, answer A, answer B -> verdict" made from what the simulated people said.
2. On the other half, which it never saw, the judge ranks the answers that the people ranked.
3. Both sets of labels, on the same prompts and answers, each train a reward model and PPO, with equal settings.

Measured: agreement with the embedded world's judge (on pairs that it does not think equal), the liking for a place, and
what PPO gains. Bai et al. 2022, arXiv 2212.08073; Lee et al. 2023, arXiv 2309.00267.
Writes <date>-rlaif.json and .md to --out; the models stay in --work.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import project  # noqa: F401  first: it finds the package
import torch
from real import circumstances

import train_ppo
import train_reward
import train_sft
from minirlhf import data, tokenizer
from minirlhf.encode import split_by_prompt
from minirlhf.evaluate import evaluation
from minirlhf.feedback import machine, pairs
from minirlhf.feedback.agreement import order_bias, share
from minirlhf.feedback.labels import Label, read_labels
from minirlhf.files import write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.world import judge

EQUAL = 1e-9  # totals of the judge that differ by less are equal


@dataclass
class Settings:
    """What is run, and where."""

    run: Path
    work: Path
    judge_epochs: float
    reward_epochs: float
    iterations: int
    prompts: int
    seed: int

    @property
    def sft(self) -> Path:
        return self.run / "sft" / "model"


def divide(settings: Settings) -> tuple[Path, Path]:
    """The run's rankings as two files without a prompt in common: for the judge to learn from, and to label."""
    records = data.load(settings.run / "feedback" / "rankings.jsonl", "pairs")
    sides = split_by_prompt(records, share=0.5, seed=settings.seed)
    files = settings.work / "worked.jsonl", settings.work / "people.jsonl"
    for file, side in zip(files, sides, strict=True):
        write_records(file, side)
    return files


def train_judge(settings: Settings, worked: Path) -> Path:
    """A judge from the run's SFT model; returns its folder."""
    verdicts = settings.work / "verdicts.jsonl"
    pairs.main(
        pairs.Config(labels=(worked,), form="verdicts", held_out_share=0.05, output=verdicts, seed=settings.seed)
    )
    return train_sft.main(
        train_sft.Config(
            run=settings.work / "judge",
            train=str(verdicts),
            validation=str(verdicts.with_name("held-out.jsonl")),
            model=str(settings.sft),
            epochs=settings.judge_epochs,
            batch_size=64,
            learning_rate=1e-3,
            micro_batch_tokens=4096,
            checkpoint_every=10_000,
            seed=settings.seed,
            device="cpu",
        )
    )


def label(settings: Settings, model: Path, people: Path, name: str, **choices: object) -> list[Label]:
    """What the judge in a folder says about the answers that people ranked."""
    output = settings.work / f"{name}.jsonl"
    output.unlink(missing_ok=True)
    config = machine.ByJudge(
        candidates=people, output=output, labeller=name, model=str(model), seed=settings.seed, device="cpu", **choices
    )
    return read_labels(machine.judge_model(config))


def against_the_world(labels: list[Label], prefers: Callable[[Label, int, int], float]) -> dict:
    """How often `prefers` (1 the first, 0 the second, 1/2 neither) orders two responses as the world's judge does."""
    points, count = 0.0, 0
    for found in labels:
        totals = [judge(found.prompt, text).total for text in found.responses]
        for i, j in itertools.combinations(range(len(totals)), 2):
            if abs(totals[i] - totals[j]) > EQUAL:
                said = prefers(found, i, j)
                points += said if totals[i] > totals[j] else 1 - said
                count += 1
    return {"share": points / count, "interval": share(round(points), count)["interval"], "pairs": count}


def by_ranks(found: Label, i: int, j: int) -> float:
    """What a label says of two responses."""
    return 0.5 + 0.5 * ((found.ranks[i] < found.ranks[j]) - (found.ranks[i] > found.ranks[j]))


def in_one_order(found: Label, i: int, j: int) -> float:
    """What the judge said of a pair in the order of display alone, before the other order was averaged in."""
    first = float(found.orders[0] > 0.5)
    return first if found.shown[0] == i else 1 - first


def judged(labels: list[Label]) -> dict:
    """Agreement and position bias of pairs that a judge was asked in both orders."""
    (bias,) = order_bias(labels).values()
    return {
        "agreement": against_the_world(labels, by_ranks),
        "agreement_in_one_order": against_the_world(labels, in_one_order),
        "first": bias["first"],
        "contradictions": {name: bias["contradictions"][name] for name in ("share", "interval")},
    }


def learn(settings: Settings, name: str, comparisons: Path) -> dict:
    """A reward model and PPO from one set of labels, evaluated on held-out prompts."""
    run = settings.work / name
    reward = train_reward.main(
        train_reward.Config(
            run=run,
            model=str(settings.sft),
            comparisons=str(comparisons),
            epochs=settings.reward_epochs,
            seed=settings.seed,
            device="cpu",
        )
    )
    policy = train_ppo.main(
        train_ppo.Config(
            run=run,
            policy=str(settings.sft),
            reward_model=str(reward),
            iterations=settings.iterations,
            seed=settings.seed,
            device="cpu",
        )
    )
    config = evaluation.Config(run=run, max_prompts=settings.prompts, seed=settings.seed, device="cpu")
    prompts = [record["prompt"] for record in data.load(config.prompts, "prompts")][: settings.prompts]
    sft, ppo = (GPT.from_pretrained(folder).eval().requires_grad_(False) for folder in (settings.sft, policy))
    model = RewardModel.from_pretrained(reward).eval().requires_grad_(False)
    encoding = tokenizer.load(settings.sft)
    evaluator = evaluation.Evaluator(sft, model, encoding, prompts, config, evaluation.judge_parts)
    samples = evaluator.sample(sft, candidates=4)
    baseline = evaluator.measure(samples.rows(torch.arange(0, len(samples), 4)))
    return {
        "reward_model_agreement": evaluator.agreement(samples, evaluator.reward(samples), candidates=4),
        "sft": evaluator.summarise(baseline, baseline),
        "ppo": evaluator.summarise(evaluator.measure(evaluator.sample(ppo)), baseline),
    }


def measure(settings: Settings) -> dict:
    """The whole experiment."""
    worked, people = divide(settings)
    folder = train_judge(settings, worked)
    said = read_labels(people)
    untrained = label(settings, settings.sft, people, "untrained", max_items=300)
    as_pairs = label(settings, folder, people, "judge-pairs")
    ranked = label(settings, folder, people, "judge", mode="rankings")
    theirs = {found.item: found for found in said}
    same = [
        by_ranks(found, i, j) == by_ranks(theirs[found.item], i, j)
        for found in ranked
        for i, j in itertools.combinations(range(len(found.ranks)), 2)
        if theirs[found.item].ranks[i] != theirs[found.item].ranks[j]
    ]
    return {
        "prompts": {"worked": len(read_labels(worked)), "labelled": len(said)},
        "people": {"agreement": against_the_world(said, by_ranks)},
        "untrained judge": judged(untrained),
        "judge": {**judged(as_pairs), "agreement_of_rankings": against_the_world(ranked, by_ranks)},
        "judge_and_people": {"share": sum(same) / len(same), "pairs": len(same)},
        "learned from": {
            "people": learn(settings, "from-people", people),
            "judge": learn(settings, "from-judge", settings.work / "judge.jsonl"),
        },
    }


def table(result: dict) -> str:
    """The result as Markdown."""

    def share(row: dict) -> str:
        low, high = row["interval"]
        return f"{row['share']:.1%} ({low:.1%} to {high:.1%})"

    lines = ["| labels by | agree with the world's judge | in one order alone | gives the first | orders contradict |"]
    lines += ["| --- " * 5 + "|", f"| simulated people | {share(result['people']['agreement'])} | | | |"]
    for name in ("untrained judge", "judge"):
        row = result[name]
        cells = (row["agreement"], row["agreement_in_one_order"], row["contradictions"])
        agree, single, against = map(share, cells)
        lines.append(f"| {name} | {agree} | {single} | {row['first']:.3f} | {against} |")
    rankings = share(result["judge"]["agreement_of_rankings"])
    both = result["judge_and_people"]
    lines += ["", f"The judge's rankings agree with the world's judge on {rankings} of pairs, and with the people on"]
    lines += [f"{both['share']:.1%} of {both['pairs']} pairs that these rank apart.", ""]
    lines += ["| PPO learned from | reward model agrees | judge | 95 % interval | win rate | 95 % interval | KL |"]
    lines += ["| --- " * 7 + "|"]
    for name, row in result["learned from"].items():
        (low, high), (win_low, win_high) = row["ppo"]["total"]["interval"], row["ppo"]["win_rate"]["interval"]
        lines.append(
            f"| {name} | {row['reward_model_agreement']['share']:.1%} | {row['ppo']['total']['mean']:.2f} "
            f"| {low:.2f} to {high:.2f} | {row['ppo']['win_rate']['mean']:.0%} | {win_low:.0%} to {win_high:.0%} "
            f"| {row['ppo']['kl']:.1f} |"
        )
    sft = result["learned from"]["people"]["sft"]["total"]
    return "\n".join([*lines, "", f"The SFT model that both start from is judged {sft['mean']:.2f}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="a finished run")
    parser.add_argument("--work", type=Path, default=Path("runs/rlaif"), help="folder of what is made on the way")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--judge-epochs", type=float, default=4.0, help="passes over the worked comparisons")
    parser.add_argument("--reward-epochs", type=float, default=5.0, help="passes over the labelled prompts")
    parser.add_argument("--iterations", type=int, default=50, help="PPO iterations")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = Settings(**{name: value for name, value in vars(arguments).items() if name != "out"})
    result = measure(settings)
    about = circumstances(date=str(datetime.date.today()), seed=settings.seed)
    stem = arguments.out / f"{datetime.date.today()}-rlaif"
    stem.with_suffix(".json").write_text(json.dumps({"about": about, **result}, indent=1) + "\n", encoding="utf-8")
    head = "\n".join(f"- {name}: {value}" for name, value in about.items())
    counts = "{worked} prompts to learn to judge from, {labelled} others labelled".format(**result["prompts"])
    text = f"# Feedback from a judge beside feedback from people\n\n{head}\n- {counts}\n\n{table(result)}\n"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()

"""Controlled sentiment on real data: how far PPO, DPO and best-of-n move a language model, and what it costs in KL.

    python studies/sentiment.py            # about half an hour on one busy core; goes on where it was stopped
    python studies/sentiment.py --smoke    # everything once, in seconds; its figures mean nothing

The task of Ziegler et al. 2019 (arXiv 1909.08593) and Rafailov et al. 2023 (arXiv 2305.18290, section 6.1) on rated
film reviews (Hutto and Gilbert 2014). A GPT-2 is trained on the snippets of one part. A second part gives openings of
2 to 8 tokens; continuations sampled to them are ranked by a linear scorer that was fitted to the human ratings of the
first part; reward model, PPO and DPO learn from the rankings. On openings of the third part the judge, VADER, reads
opening and continuation. It is a lexicon with rules and no stage learns from it;
the betas and the second round of DPO were chosen with a look at it on openings of the second part.
DPO has a second round, `dpo2`: it starts from the DPO model of one beta, which is also its reference, and learns from
pairs sampled from that model to every second opening.
KL is that of the continuation to the SFT model; best-of-n has the bound log n - (n-1)/n.
Writes <date>-sentiment.csv, .md and .png to --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import project  # noqa: F401  first: it finds the package
import real
import torch
from sentiment_figure import plot, table
from snippets import LinearScorer, cut, openings

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data, tokenizer
from minirlhf.batch import permutation
from minirlhf.encode import Record
from minirlhf.evaluate import Answers, Evaluator, best_of_n_kl, bootstrap_interval, evaluation
from minirlhf.evaluate.judges import Judge, Marks, ModelFolder
from minirlhf.feedback.collect import collect, load_sources
from minirlhf.files import write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel

NEW_TOKENS = 32  # length limit of a continuation; most end here, so a missing EOS is no fault
FIELDS = ("method", "beta", "n", "kl", "judge", "low", "high", "gain", "gain_low", "gain_high")
FIELDS += ("scorer", "reward", "length", "distinct", "answer")


@dataclass(frozen=True)
class Settings:
    """Sizes of a run."""

    snippets: int = 8000
    test: int = 800
    openings: int = 1600
    cuts: int = 2
    vocabulary: int = 2048
    n_layer: int = 4
    n_embd: int = 128
    sft_epochs: float = 5.0
    candidates: int = 8
    reward_epochs: float = 2.0
    ppo_iterations: int = 50
    ppo_betas: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    dpo_epochs: float = 1.0
    dpo_betas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    first_round: float = 0.5
    second_betas: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0)
    best_of: tuple[int, ...] = (2, 4, 8, 16)
    seed: int = 0


SMOKE = Settings(300, 40, 100, 1, 400, 1, 32, 1.0, 2, 1.0, 2, (0.1,), 1.0, (0.5,), 0.5, (0.5,), (2,))


def prepare(work: Path, settings: Settings) -> tuple[list[Record], list[Record]]:
    """Write the files of the run; returns the rated snippets of the language model's part and of the test part."""
    source = real.data_folder() / "sentiment" / "movie-snippets-rated.tsv"
    records = data.load(source, "demonstrations")
    records = [records[i] for i in permutation(len(records), settings.seed)][: settings.snippets]
    held = settings.test + settings.openings
    test, prompts, language = records[: settings.test], records[settings.test : held], records[held:]
    texts = [record["response"] for record in language]
    encoding = tokenizer.load(real.vocabulary(texts, settings.vocabulary, work / "vocabulary"))
    pairs = [pair for text in texts if (pair := cut(encoding, text, 2))]
    demonstrations = [{"prompt": prompt, "response": rest} for prompt, rest in pairs]
    write_records(work / "demonstrations.jsonl", demonstrations)
    for name, part, cuts in (("train", prompts, settings.cuts), ("test", test, 1)):
        found = openings(encoding, [record["response"] for record in part], cuts=cuts, seed=settings.seed)
        write_records(work / f"prompts.{name}.jsonl", found)
    return language, test


def prompts_of(work: Path, name: str) -> list[str]:
    return [record["prompt"] for record in data.load(work / f"prompts.{name}.jsonl", "prompts")]


def pair(
    work: Path, settings: Settings, scorer: LinearScorer, *, stage: str, prompts: Sequence[str], file: Path
) -> None:
    """Sample continuations from a stage's model; of each opening's the scorer's best and worst make a pair.

    A file made earlier is kept.
    """
    if file.exists():
        return
    encoding, sources = load_sources((str(work / stage / "model"),), (1.0,), device="cpu")
    sampling = {"count": settings.candidates, "rounds": 1, "max_new_tokens": NEW_TOKENS}
    pairs = []
    for record in collect(sources, encoding, prompts, seed=settings.seed, **sampling):
        scores = scorer([record["prompt"] + response for response in record["responses"]])
        ends = [int(scores.argmax()), int(scores.argmin())]
        if scores[ends[0]] > scores[ends[1]]:
            sides = {key: [record[key][i] for i in ends] for key in ("responses", "response_ids")}
            pairs.append({"prompt": record["prompt"], **sides, "ranks": [0, 1]})
    write_records(file, pairs)


def stages(work: Path, settings: Settings) -> dict[str, Callable[[], Path]]:
    """The scripts' own `main` for each stage."""
    common = {"run": work, "seed": settings.seed, "resume": True, "device": "cpu"}
    pairs, prompts = str(work / "pairs.jsonl"), str(work / "prompts.train.jsonl")
    limit = {"max_new_tokens": NEW_TOKENS}
    sft = train_sft.Config(
        **common,
        train=str(work / "demonstrations.jsonl"),
        tokenizer=str(work / "vocabulary"),
        n_layer=settings.n_layer,
        n_embd=settings.n_embd,
        epochs=settings.sft_epochs,
        batch_size=8,  # of little text: many small steps
        learning_rate=2e-3,
        validation_share=0.05,
        validation_every=500,
        checkpoint_every=500,
    )
    reward = train_reward.Config(
        **common,
        **limit,
        comparisons=pairs,
        reference_prompts=prompts,
        epochs=settings.reward_epochs,
        batch_size=8,
        contrast=0.0,
    )
    ppo = train_ppo.Config(
        **common,
        **limit,
        prompts=prompts,
        iterations=settings.ppo_iterations,
        rollout_size=64,
        epochs=2,
        minibatches=2,
        learning_rate=5e-4,
        value_learning_rate=1e-3,
        missing_eos_score=None,
    )
    dpo = train_dpo.Config(**common, comparisons=pairs, epochs=settings.dpo_epochs, batch_size=16, learning_rate=5e-4)
    runs = {"sft": lambda: train_sft.main(sft), "reward": lambda: train_reward.main(reward)}
    for beta in settings.ppo_betas:
        runs[f"ppo-{beta}"] = lambda beta=beta: train_ppo.main(replace(ppo, stage=f"ppo-{beta}", beta=beta))
    for beta in settings.dpo_betas:
        runs[f"dpo-{beta}"] = lambda beta=beta: train_dpo.main(replace(dpo, stage=f"dpo-{beta}", beta=beta))
    first = f"dpo-{settings.first_round}"
    again = replace(dpo, comparisons=str(work / "pairs.second.jsonl"), policy=str(work / first / "model"))
    for beta in settings.second_betas:
        runs[f"dpo2-{beta}"] = lambda beta=beta: train_dpo.main(replace(again, stage=f"dpo2-{beta}", beta=beta))
    return runs


def train(work: Path, settings: Settings, scorer: LinearScorer) -> None:
    """All stages; finished ones are kept, and so are the pairs."""
    runs = stages(work, settings)
    prompts, first = prompts_of(work, "train"), f"dpo-{settings.first_round}"
    runs.pop("sft")()
    pair(work, settings, scorer, stage="sft", prompts=prompts, file=work / "pairs.jsonl")
    runs.pop(first)()
    pair(work, settings, scorer, stage=first, prompts=prompts[1::2], file=work / "pairs.second.jsonl")
    for run in runs.values():
        run()


def judge(scorer: LinearScorer) -> Judge:
    """VADER's compound of openings with their continuations, and the scorer's rating."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def marks(answers: Answers) -> Marks:
        texts = [prompt + text for prompt, text in zip(answers.prompts, answers.texts, strict=True)]
        compound = np.array([analyzer.polarity_scores(text)["compound"] for text in texts])
        return {"total": compound, "scorer": np.array([float(scorer([text])[0]) for text in texts])}

    return marks


def distinct(texts: Sequence[str]) -> float:
    """Share of pairs of words over all texts that are distinct: falls where all continuations become alike."""
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / max(1, len(pairs))


def measure(work: Path, settings: Settings, scorer: LinearScorer) -> list[dict]:
    """One row a model: the judge on test openings, the gain over SFT with its interval, and the KL."""
    config = evaluation.Config(run=work, max_new_tokens=NEW_TOKENS, seed=settings.seed, device="cpu")

    def load(stage: str) -> GPT:
        return GPT.from_pretrained(work / stage / "model").eval().requires_grad_(False)

    sft, proxy = ModelFolder.find(str(work / "sft"), GPT), ModelFolder.find(str(work / "reward"), RewardModel)
    prompts = prompts_of(work, "test")
    evaluator = Evaluator(config, prompts, [sft], judge=None, reward_model=proxy, reference=sft)
    evaluator.judge = judge(scorer)
    rows: list[dict] = []

    def add(method: str, answers: Answers, base: Answers, **setting: float) -> None:
        judged, gain = answers["total"], answers["total"] - base["total"]
        (low, high), (gain_low, gain_high) = (
            bootstrap_interval(values, seed=settings.seed) for values in (judged, gain)
        )
        kl = best_of_n_kl(setting["n"]) if "n" in setting else answers["kl"].mean()
        row = {"method": method, "beta": "", "n": "", **setting}
        numbers = {"kl": kl, "judge": judged.mean(), "low": low, "high": high, "gain": gain.mean()}
        numbers |= {"gain_low": gain_low, "gain_high": gain_high, "scorer": answers["scorer"].mean()}
        numbers |= {
            "reward": answers["reward"].mean(),
            "length": answers["length"].mean(),
            "distinct": distinct(answers.texts),
        }
        example = evaluator.prompts[0] + "|" + answers.texts[0]
        rows.append(row | {name: round(float(value), 4) for name, value in numbers.items()} | {"answer": example})

    most = max(settings.best_of)
    drawn = evaluator.sample(load("sft"), sft.encoding, count=most)
    rewards = evaluator.reward(drawn)
    base = evaluator.measure(drawn.rows(evaluator.first(drawn, 1)))
    add("sft", base, base)
    for n in settings.best_of:
        add("best-of-n", evaluator.best_of(drawn, rewards, n), base, n=n)
    learned = (("ppo", settings.ppo_betas), ("dpo", settings.dpo_betas), ("dpo2", settings.second_betas))
    for method, betas in learned:
        for beta in sorted(betas):
            answers = evaluator.measure(evaluator.sample(load(f"{method}-{beta}"), sft.encoding))
            add(method, answers, base, beta=beta)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the run (default: runs/sentiment, or -smoke)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; smoke: --work)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the parts and of every stage")
    parser.add_argument("--smoke", action="store_true", help="everything once and small; its figures mean nothing")
    arguments = parser.parse_args()
    settings = replace(SMOKE if arguments.smoke else Settings(), seed=arguments.seed)
    work = arguments.work or Path("runs/sentiment-smoke" if arguments.smoke else "runs/sentiment")
    out = arguments.out or (work if arguments.smoke else Path("benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    real.data_folder()
    torch.set_num_threads(1)  # so small that a second thread gains nothing, and figures do not depend on the number
    real.begin(work, asdict(settings))
    language, test = prepare(work, settings)
    scorer = LinearScorer([r["response"] for r in language], [r["rating"] for r in language])
    train(work, settings, scorer)
    ratings = [record["rating"] for record in test]
    correlation = np.corrcoef(scorer([record["response"] for record in test]), ratings)[0, 1]
    rows = measure(work, settings, scorer)
    stem = out / f"{datetime.date.today()}-sentiment"
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, stem.with_suffix(".png"))
    head = real.heading(real.circumstances(settings=asdict(settings)), work)
    notes = (
        f"{len(prompts_of(work, 'test'))} test openings, one continuation each; KL in nats a continuation, length in "
        f"tokens, distinct: share of pairs of words that are. The scorer's correlation with the ratings of "
        f"{len(test)} test snippets is {correlation:.2f}."
    )
    text = f"# Controlled sentiment\n\n{head}\n\n{notes}\n\n{table(rows)}\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""Any models against each other; the first is the baseline, and all are named before the flags.

    python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo runs/tiny/dpo --reward-model runs/tiny/reward

Every model answers the same prompts `--samples` times at temperature 1 with the same random numbers, and answer k of
one meets answer k of the baseline. So a model against itself ties throughout. All intervals are 95 %, over prompts.
Writes `<out>/comparison.json`, whose names docs/metrics.md explains, and `<out>/answers.jsonl`, a line an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from minirlhf import data
from minirlhf.config import Count
from minirlhf.encode import Record
from minirlhf.evaluate.evaluation import AnswersConfig, Evaluator
from minirlhf.evaluate.judges import Answers, JudgeModel, ModelFolder, verdicts
from minirlhf.evaluate.statistics import against_judge, estimate_of, length_controlled, wins
from minirlhf.evaluate.tables import FIGURES, rows
from minirlhf.evaluate.texts import RUDE_WORDS, distinct_n, rude_words, self_overlap
from minirlhf.files import write_json, write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runs.checkpoint import require_writable
from minirlhf.runtime import project_file, require


@dataclass
class Config(AnswersConfig):
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Two models or more: folders of models or of stages, or names on the hub; the first is the baseline."""
    prompts: str = str(project_file("world", "prompts.test.jsonl"))
    """Held-out prompts: a file of any known format, or a hub name."""
    split: str = ""
    """Part of `prompts`, e.g. [:100]."""
    samples: Count = 4
    """Answers of each model to each prompt; self-overlap and the agreement of reward model and judge need two."""
    judge: str | None = None
    """`world`, package.module:function, or the folder of a reward model; by default `world` without `judge_model`."""
    judge_model: str | None = None
    """Folder of a language model that is shown both answers and says which is better."""
    orders: Literal["both", "random"] = "both"
    """In which order `judge_model` sees two answers: each pair in both, or in one drawn at random."""
    instruction: str = ""
    """Text before every question to `judge_model`."""
    reward_model: str | None = None
    """Folder of a reward model to compare with the judge: the proxy that was trained on."""
    reference: str | None = None
    """The KL is measured to this model, by default the baseline; `none` measures none."""
    rude_words: Path = RUDE_WORDS
    """Text file of rude words, one a line."""
    out: Path = Path("runs/comparison")
    """Folder for `comparison.json` and `answers.jsonl`; earlier ones there are replaced."""


PRESETS = {"comparison": Config()}


class Contest(Evaluator):
    """The evaluation that the settings of a comparison name."""

    config: Config

    def __init__(self, config: Config) -> None:
        example = "python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo"
        require(len(config.models) > 1, f"evaluate: name two models or more, as in: {example}")
        only = "is for a judge that sees both answers; give --judge-model"
        require(config.judge_model is not None or not config.instruction, f"--instruction: {only}")
        require(config.judge_model is not None or config.orders == "both", f"--orders: {only}")
        require_writable(config.out, flag="--out")
        self.folders = [ModelFolder.find(source, GPT) for source in config.models]
        records = data.load(config.prompts, "prompts", split=config.split)[: config.max_prompts]
        self.rude = rude_words(config.rude_words)
        asked = ModelFolder.find(config.judge_model, GPT, flag="--judge-model") if config.judge_model else None
        proxy = (
            ModelFolder.find(config.reward_model, RewardModel, flag="--reward-model") if config.reward_model else None
        )
        self.spec, source = config.judge or (None if asked else "world"), config.reference or config.models[0]
        base = None if source == "none" else ModelFolder.find(source, GPT, flag="--reference")
        self.reference_path = str(base.path) if base else None
        prompts = [record["prompt"] for record in records]
        super().__init__(config, prompts, self.folders, judge=self.spec, reward_model=proxy, reference=base)
        tokens = config.micro_batch_tokens
        self.judge_model = JudgeModel(asked, config.instruction, self.device, tokens) if asked else None

    def won(self, outcomes: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
        """The win rate of (B,) outcomes, and what it would be at equal length; `longer` in tokens."""
        won, length = (values.reshape(len(self.prompts), -1) for values in (outcomes, longer))
        equal = estimate_of(lambda i: length_controlled(won[i], length[i]), len(won), seed=self.config.seed)
        return {"win_rate": self.mean(outcomes), "length_controlled_win_rate": equal}

    def row(self, answers: Answers, baseline: Answers) -> dict[str, Any]:
        """The figures of one model: what was not asked for is not there, and what does not exist is None."""
        texts, longer = answers.texts, answers["length"] - baseline["length"]
        row: dict[str, Any] = {name: self.mean(values) for name, values in answers.figures.items()}
        row["eos_rate"] = row.pop("finished")
        if self.judge:
            row |= self.won(wins(answers["total"], baseline["total"]), longer)
        if self.judge_model:
            random, seed = self.config.orders == "random", self.config.seed
            outcomes, habits = verdicts(self.judge_model, answers, baseline, random=random, seed=seed)
            row["judge_model"] = self.won(outcomes, longer) | habits
        row |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
        by_prompt = [[texts[i] for i in numbers] for numbers in self.first(answers, self.config.samples)]
        several = self.config.samples > 1
        row["self_overlap"] = self.mean(np.array([self_overlap(each) for each in by_prompt])) if several else None
        row["rude"] = self.mean(np.array([self.rude.search(text) is not None for text in texts]))
        if self.reward and self.judge:
            grids = (answers[name].reshape(len(self.prompts), -1) for name in ("reward", "total"))
            row |= against_judge(*grids, seed=self.config.seed)
        return row


def records(name: str, answers: Answers, count: int) -> list[Record]:
    """A record an answer, which other commands read as a demonstration."""
    figures = {figure: values.tolist() for figure, values in answers.figures.items()}
    return [
        {"prompt": prompt, "response": text, "model": name, "sample": i % count}
        | {figure: values[i] for figure, values in figures.items()}
        for i, (prompt, text) in enumerate(zip(answers.prompts, answers.texts, strict=True))
    ]


def short_names(sources: Sequence[str]) -> list[str]:
    """The end of each folder's path without `model`, as much of it as tells all apart; numbered where nothing does."""
    every = [Path(s).absolute().parts if Path(s).is_dir() else Path(s).parts for s in sources]
    parts = [own[:-1] if own[-1] == "model" and len(own) > 1 else own for own in every]
    for size in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-size:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number} {own[-1]}" for number, own in enumerate(parts, 1)]


def main(config: Config) -> dict[str, Any]:
    """Compare the models; returns the summary."""
    contest, names = Contest(config), short_names(config.models)
    every: list[Record] = []
    models: dict[str, Any] = {}
    baseline = None
    for name, folder in zip(names, contest.folders, strict=True):
        sampled = contest.sample(folder.load(GPT, contest.device), folder.encoding, count=config.samples)
        answers = contest.measure(sampled)
        baseline = baseline or answers
        models[name] = {"folder": str(folder.path), **contest.row(answers, baseline)}
        every += records(name, answers, config.samples)
    summary = {
        "prompts": len(contest.prompts),
        "samples": config.samples,
        "seed": config.seed,
        "judge": contest.spec,
        "baseline": names[0],
        "reference": contest.reference_path,
        "models": models,
    }
    write_json(config.out / "comparison.json", summary)
    write_records(config.out / "answers.jsonl", every)
    print(table(summary))
    return summary


def table(summary: dict[str, Any]) -> str:
    """All tables that have a figure, and what they are about."""
    parts = [lines for columns in FIGURES if (lines := rows(summary["models"], columns))]
    count = f"{summary['samples']} answer{'s' if summary['samples'] > 1 else ''} each"
    foot = f"{summary['prompts']} prompts, {count}; wins are against {summary['baseline']}; length in tokens"
    foot += f"; KL to {summary['reference']} in nats an answer" if summary["reference"] else ""
    return "\n\n".join([*parts, foot])

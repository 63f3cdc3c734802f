"""Any models against each other; the first is the baseline, and all are named before the flags.

    python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo runs/tiny/dpo --reward-model runs/tiny/reward

Every model answers the same prompts `--samples` times at temperature 1 with the same random numbers, and answer k of
one meets answer k of the baseline. So a model against itself ties throughout. All intervals are 95 %, over prompts.
Writes `<out>/comparison.json`, whose names docs/metrics.md explains, and `<out>/answers.jsonl`, a line an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from minirlhf import data
from minirlhf.config import Count
from minirlhf.encode import Record, encode_prompts
from minirlhf.evaluate.evaluation import Answers, AnswersConfig, judged, measure, sample, with_texts
from minirlhf.evaluate.judges import PARTS, JudgeModel, ModelFolder, RewardScorer, Sampled, find_judge
from minirlhf.evaluate.statistics import against_judge, estimate, interval_of
from minirlhf.evaluate.tables import SHARE, Column, rows, with_interval
from minirlhf.evaluate.texts import RUDE_WORDS, WordList, distinct_n, self_overlap
from minirlhf.evaluate.win_rate import Verdicts, length_controlled, presentations, verdicts, wins
from minirlhf.files import write_json, write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runs.checkpoint import require_writable
from minirlhf.runtime import project_file, require, resolve_device
from minirlhf.tokenizer import same_ids


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


class Contest:
    """The models, judges and prompts of a comparison, found and checked before a weight is read, and its measures.

    Raises UserError where one of them does not fit the others.
    """

    def __init__(self, config: Config) -> None:
        example = "python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo"
        require(len(config.models) > 1, f"evaluate: name two models or more, as in: {example}")
        asks_both = config.judge_model is not None
        only = "is for a judge that sees both answers; give --judge-model"
        require(asks_both or not config.instruction, f"--instruction: {only}")
        require(asks_both or config.orders == "both", f"--orders: {only}")
        require_writable(config.out, flag="--out")
        self.config, self.device = config, resolve_device(config.device)
        machine = (self.device, config.micro_batch_tokens)
        self.folders = {
            name: ModelFolder.find(source, GPT)
            for name, source in zip(short_names(config.models), config.models, strict=True)
        }
        self.baseline, first = next(iter(self.folders.items()))
        records = data.load(config.prompts, "prompts", split=config.split)
        self.prompts = [record["prompt"] for record in records[: config.max_prompts]]
        self.words = WordList.read(config.rude_words)
        self.spec = config.judge or (None if asks_both else "world")
        self.judge = find_judge(self.spec, self.prompts, *machine) if self.spec else None
        self.judge_model = self.reward = self.reference = None
        if config.judge_model is not None:
            folder = ModelFolder.find(config.judge_model, GPT, flag="--judge-model")
            self.judge_model = JudgeModel(folder, config.instruction, *machine)
        if config.reward_model is not None:
            folder = ModelFolder.find(config.reward_model, RewardModel, flag="--reward-model")
            self.reward = RewardScorer(folder, *machine)
        if config.reference != "none":
            self.reference = ModelFolder.find(config.reference, GPT, flag="--reference") if config.reference else first
            for folder in self.folders.values():
                same = same_ids(self.reference.encoding, folder.encoding)
                where = f"{folder.path}: has not the tokenizer of {self.reference.path}"
                require(same, f"{where}, so there is no KL between them; give --reference none")
        self.room = self.room_for_prompts()

    @functools.cached_property
    def kl_model(self) -> GPT | None:
        """The model that the KL is measured to."""
        return self.reference.load(GPT, self.device) if self.reference else None

    def room_for_prompts(self) -> int:
        """Tokens of a prompt that every model has room for, and everything that reads the sampled ids."""
        models, limit = list(self.folders.values()), self.config.max_new_tokens
        readers = [reader.folder for reader in (self.judge, self.reward) if reader and reader.folder]
        readers += [self.reference] if self.reference else []
        models += [r for r in readers if any(same_ids(r.encoding, folder.encoding) for folder in models)]
        smallest = min(models, key=lambda folder: folder.positions)
        where = f"the context of {smallest.path}, {smallest.positions} tokens, leaves no room for a prompt"
        require(smallest.positions > limit, f"--max-new-tokens {limit}: {where}")
        return smallest.positions - limit

    def sample(self, folder: ModelFolder) -> Sampled:
        """A model's answers; a prompt that is too long has lost its start."""
        ids = encode_prompts(folder.encoding, self.prompts, max_length=self.room)
        model, eos_id = folder.load(GPT, self.device), folder.encoding.eot_token
        samples = sample(model, ids, eos_id, self.config, count=self.config.samples)
        return with_texts(samples, self.prompts, folder.encoding)

    def measure(self, sampled: Sampled, baseline: Sampled) -> Answers:
        """All that is measured about one model's answers."""
        parts = self.judge.marks(sampled) if self.judge else np.zeros((len(sampled.texts), 0))
        reward = self.reward(sampled) if self.reward else np.zeros(0)
        answers = measure(sampled, parts, reward, self.kl_model, self.config)
        if self.judge_model:
            answers.verdicts = self.ask_both(self.judge_model, sampled, baseline)
        return answers

    def ask_both(self, judge: JudgeModel, sampled: Sampled, baseline: Sampled) -> Verdicts:
        """The judge model's verdicts about every answer beside the baseline's."""
        equal = [mine == other for mine, other in zip(sampled.texts, baseline.texts, strict=True)]
        asked = presentations(equal, random=self.config.orders == "random", seed=self.config.seed)
        questions = []
        for pair, mine_first in asked:
            both = (sampled.texts[pair], baseline.texts[pair])
            questions.append((sampled.prompts[pair], *(both if mine_first else both[::-1])))
        return verdicts(asked, judge.preferred(questions), len(equal))

    def summarise(self, answers: Answers, baseline: Answers) -> dict[str, Any]:
        """The row of one model: what was not asked for is not there, and what does not exist is None."""
        count, seed = self.config.samples, self.config.seed
        longer = (answers.lengths - baseline.lengths).reshape(-1, count)

        def mean(values: np.ndarray) -> dict[str, Any]:
            return estimate(values.astype(np.float64).reshape(-1, count), seed=seed)

        def at_equal_length(outcomes: np.ndarray) -> dict[str, Any]:
            won = outcomes.reshape(-1, count)
            interval = interval_of(lambda i: length_controlled(won[i], longer[i]), len(won), seed=seed)
            return {"mean": length_controlled(won, longer), "interval": interval}

        row: dict[str, Any] = {}
        if self.judge:
            row |= judged(answers, baseline, self.judge.parts, count, seed)
            row["length_controlled_win_rate"] = at_equal_length(wins(answers.parts[:, 0], baseline.parts[:, 0]))
        if answers.verdicts:
            v = answers.verdicts
            row["judge_model"] = {
                "win_rate": mean(v.outcomes),
                "length_controlled_win_rate": at_equal_length(v.outcomes),
            }
            row["judge_model"] |= {"first_preferred": v.first_preferred, "contradictions": v.contradictions}
        if answers.kl is not None:
            row["kl"] = mean(answers.kl)
        row |= {"length": mean(answers.lengths), "eos_rate": mean(answers.finished)}
        row |= {f"distinct_{n}": distinct_n(answers.texts, n) for n in (1, 2)}
        by_prompt = [answers.texts[i : i + count] for i in range(0, len(answers.texts), count)]
        overlaps = np.array([[self_overlap(texts)] for texts in by_prompt]) if count > 1 else None
        row["self_overlap"] = None if overlaps is None else estimate(overlaps, seed=seed)
        row["rude"] = mean(np.array([bool(self.words.found(text)) for text in answers.texts]))
        if self.reward:
            row["reward"] = mean(answers.reward)
            grids = (answers.reward.reshape(-1, count), answers.parts[:, :1].reshape(-1, count))
            row |= against_judge(*grids, seed=seed) if self.judge else {}
        return row

    def records(self, name: str, answers: Answers) -> list[Record]:
        """A record an answer, which other commands read as a demonstration."""
        found = []
        numbers = dict(zip(self.judge.parts, answers.parts.T, strict=True)) if self.judge else {}
        numbers |= {"reward": answers.reward} if self.reward else {}
        numbers |= {"kl": answers.kl} if answers.kl is not None else {}
        for i, text in enumerate(answers.texts):
            prompt, k = divmod(i, self.config.samples)
            record = {"prompt": self.prompts[prompt], "response": text, "model": name, "sample": k}
            record |= {"length": int(answers.lengths[i]), "finished": bool(answers.finished[i])}
            record |= {name: float(values[i]) for name, values in numbers.items()}
            found.append(record)
        return found


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
    contest = Contest(config)
    measured: dict[str, Answers] = {}
    baseline = None
    for name, folder in contest.folders.items():
        sampled = contest.sample(folder)
        baseline = baseline or sampled
        measured[name] = contest.measure(sampled, baseline)
    first = measured[contest.baseline]
    summary = {
        "prompts": len(contest.prompts),
        "samples": config.samples,
        "seed": config.seed,
        "judge": contest.spec,
        "baseline": contest.baseline,
        "reference": str(contest.reference.path) if contest.reference else None,
        "models": {
            name: {"folder": str(folder.path), **contest.summarise(measured[name], first)}
            for name, folder in contest.folders.items()
        },
    }
    write_json(config.out / "comparison.json", summary)
    every = [record for name, answers in measured.items() for record in contest.records(name, answers)]
    write_records(config.out / "answers.jsonl", every)
    print(table(summary))
    return summary


TABLES = (
    [*with_interval("judge", "total"), *(Column(part, part) for part in PARTS[1:])],
    [
        *with_interval("win rate", "win_rate", SHARE),
        *with_interval("at equal length", "length_controlled_win_rate", SHARE),
    ],
    [
        *with_interval("judge model: win rate", "judge_model.win_rate", SHARE),
        *with_interval("at equal length", "judge_model.length_controlled_win_rate", SHARE),
        Column("first preferred", "judge_model.first_preferred", SHARE),
        Column("contradictions", "judge_model.contradictions", SHARE),
    ],
    [
        *with_interval("KL", "kl"),
        Column("length", "length", "{:.1f}"),
        Column("EOS", "eos_rate", SHARE),
        *(Column(f"distinct-{n}", f"distinct_{n}", "{:.3f}") for n in (1, 2)),
        Column("self-overlap", "self_overlap"),
        Column("rude", "rude", "{:.1%}"),
    ],
    [
        *with_interval("reward", "reward"),
        *with_interval("correlation with judge", "reward_correlation"),
        *with_interval("pairs as the judge", "reward_agreement", SHARE),
    ],
)


def table(summary: dict[str, Any]) -> str:
    """All tables that have a figure, and what they are about."""
    parts = [lines for columns in TABLES if (lines := rows(summary["models"], columns))]
    count = f"{summary['samples']} answer{'s' if summary['samples'] > 1 else ''} each"
    foot = f"{summary['prompts']} prompts, {count}; wins are against {summary['baseline']}; length in tokens"
    foot += f"; KL to {summary['reference']} in nats an answer" if summary["reference"] else ""
    return "\n\n".join([*parts, foot])

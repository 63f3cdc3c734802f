"""Any models against each other; the first is the baseline, and all are named before the flags.

    python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo runs/tiny/dpo --reward-model runs/tiny/reward

Every model answers the same prompts `--samples` times at temperature 1 with the same random numbers, and answer k of
one meets answer k of the baseline. So a model against itself ties throughout. All intervals are 95 %, over prompts.
Writes `<out>/comparison.json`, whose names docs/glossary.md explains, and `<out>/answers.jsonl`, a line an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from minirlhf import data
from minirlhf.config import Count, Seed, Settings
from minirlhf.encode import Record, encode_prompts
from minirlhf.evaluate.bootstrap import estimate, interval_of
from minirlhf.evaluate.diversity import distinct_n, self_overlap
from minirlhf.evaluate.judges import Judge, JudgeModel, ModelFolder, RewardScorer, Sampled, find_judge
from minirlhf.evaluate.proxy import against_judge
from minirlhf.evaluate.table import table
from minirlhf.evaluate.win_rate import Verdicts, length_controlled, presentations, verdicts, wins
from minirlhf.evaluate.words import RUDE_WORDS, WordList
from minirlhf.files import write_json, write_records
from minirlhf.generate import SLOTS, generate
from minirlhf.model import GPT
from minirlhf.ops import kl_k1
from minirlhf.reward import RewardModel
from minirlhf.rollout import over_micro_batches
from minirlhf.runs.checkpoint import require_writable
from minirlhf.runtime import Stream, project_file, require, resolve_device
from minirlhf.tokenizer import response_text, same_ids


@dataclass
class Config(Settings):
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Two models or more: folders of models or of stages, or names on the hub; the first is the baseline."""
    prompts: str = str(project_file("world", "prompts.test.jsonl"))
    """Held-out prompts: a file of any known format, or a hub name."""
    split: str = ""
    """Part of `prompts`, e.g. [:100]."""
    max_prompts: Count = 500
    """Use at most this many prompts, from the start."""
    samples: Count = 4
    """Answers of each model to each prompt; self-overlap and the agreement of reward model and judge need two."""
    max_new_tokens: Count = 32
    """Length limit of an answer in tokens."""
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
    micro_batch_tokens: Count = 8192
    """Padded tokens a forward pass."""
    seed: Seed = 0
    """Seed of the answers, of the order of two answers, and of the bootstrap."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


PRESETS = {"comparison": Config()}


@dataclass(frozen=True)
class Contest:
    """Everything that a comparison needs, checked, without a weight read."""

    names: list[str]
    folders: list[ModelFolder]
    prompts: list[str]
    judge: Judge | None
    judge_model: JudgeModel | None
    reward: RewardScorer | None
    reference: ModelFolder | None
    words: WordList
    device: torch.device
    room: int


@dataclass(frozen=True)
class Measured:
    """The answers of one model, row-major by prompt, and what was measured about each: arrays are (P, K).

    marks  (P, K, parts) of the judge; no parts where there is none. None: verdicts, reward and kl not asked for
    """

    texts: list[str]
    lengths: np.ndarray
    finished: np.ndarray
    marks: np.ndarray
    verdicts: Verdicts | None
    reward: np.ndarray | None
    kl: np.ndarray | None


# ------------------------------------------------------------------------------------------------------------- checks
def open_contest(config: Config) -> Contest:
    """Find models, judges and prompts; raises UserError before any weights are read."""
    example = "python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo"
    require(len(config.models) > 1, f"evaluate: name two models or more, as in: {example}")
    asks_both = config.judge_model is not None
    only = "is for a judge that sees both answers; give --judge-model"
    require(asks_both or not config.instruction, f"--instruction: {only}")
    require(asks_both or config.orders == "both", f"--orders: {only}")
    require_writable(config.out, flag="--out")
    device = resolve_device(config.device)
    folders = [ModelFolder.find(source, GPT) for source in config.models]
    prompts = [r["prompt"] for r in data.load(config.prompts, "prompts", split=config.split)][: config.max_prompts]
    words = WordList.read(config.rude_words)
    spec = config.judge or (None if asks_both else "world")
    judge = find_judge(spec, prompts, device, config.micro_batch_tokens) if spec else None
    judge_model = reward = reference = None
    if config.judge_model is not None:
        folder = ModelFolder.find(config.judge_model, GPT, flag="--judge-model")
        judge_model = JudgeModel(folder, config.instruction, device, config.micro_batch_tokens)
    if config.reward_model is not None:
        folder = ModelFolder.find(config.reward_model, RewardModel, flag="--reward-model")
        reward = RewardScorer(folder, device, config.micro_batch_tokens)
    if config.reference != "none":
        reference = ModelFolder.find(config.reference, GPT, flag="--reference") if config.reference else folders[0]
        for folder in folders:
            same = same_ids(reference.encoding, folder.encoding)
            where = f"{folder.path}: has not the tokenizer of {reference.path}, so there is no KL between them"
            require(same, f"{where}; give --reference none")
    scorers = [judge.folder if judge else None, reward.folder if reward else None, reference]
    room = room_for_prompts(config, folders, [scorer for scorer in scorers if scorer])
    names = short_names(config.models)
    return Contest(names, folders, prompts, judge, judge_model, reward, reference, words, device, room)


def short_names(sources: Sequence[str]) -> list[str]:
    """The end of each folder's path without `model`, as much of it as tells all apart; numbered where nothing does."""
    every = [Path(s).absolute().parts if Path(s).is_dir() else Path(s).parts for s in sources]
    parts = [own[:-1] if own[-1] == "model" and len(own) > 1 else own for own in every]
    for size in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-size:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number} {own[-1]}" for number, own in enumerate(parts, 1)]


def room_for_prompts(config: Config, folders: Sequence[ModelFolder], readers: Sequence[ModelFolder]) -> int:
    """Tokens of a prompt that every model has room for, and everything that reads the sampled ids."""
    own = [r for r in readers if any(same_ids(r.encoding, folder.encoding) for folder in folders)]
    smallest = min([*folders, *own], key=lambda folder: folder.positions)
    limit, room = config.max_new_tokens, smallest.positions - config.max_new_tokens
    where = f"the context of {smallest.path}, {smallest.positions} tokens, leaves no room for a prompt"
    require(room > 0, f"--max-new-tokens {limit}: {where}")
    return room


# ------------------------------------------------------------------------------------------------------------ measures
def sample(contest: Contest, folder: ModelFolder, config: Config) -> Sampled:
    """K answers to each prompt, a prompt's answers next to each other."""
    encoding = folder.encoding
    ids = encode_prompts(encoding, contest.prompts, max_length=contest.room)
    rows = [(i, k) for i in range(len(ids)) for k in range(config.samples)]
    samples = generate(
        folder.load(GPT, contest.device),
        [ids[i] for i, _ in rows],
        max_new_tokens=config.max_new_tokens,
        eos_id=encoding.eot_token,
        seed=config.seed,
        keys=[(Stream.EVALUATION, i, k) for i, k in rows],
        slots=SLOTS,
    )
    texts = [response_text(encoding, row) for row in samples.response_ids()]
    return Sampled([contest.prompts[i] for i, _ in rows], texts, samples, encoding)


def measure(contest: Contest, sampled: Sampled, baseline: Sampled, reference: GPT | None, config: Config) -> Measured:
    """All that is measured about one model's answers."""
    shape, samples = (len(contest.prompts), config.samples), sampled.samples
    marks = contest.judge.marks(sampled).reshape(*shape, -1) if contest.judge else np.zeros((*shape, 0))
    kl = None
    if reference is not None:
        ref = over_micro_batches(
            lambda part: reference.logprobs(part.tokens, part.mask), samples, config.micro_batch_tokens
        )
        kl = kl_k1(samples.logprobs, ref).sum(dim=1).cpu().double().numpy().reshape(shape)
    return Measured(
        texts=sampled.texts,
        lengths=(samples.lengths - samples.prompt_lengths).cpu().numpy().reshape(shape),
        finished=samples.finished.cpu().numpy().reshape(shape),
        marks=marks,
        verdicts=ask_both(contest.judge_model, sampled, baseline, config) if contest.judge_model else None,
        reward=contest.reward(sampled).reshape(shape) if contest.reward else None,
        kl=kl,
    )


def ask_both(judge: JudgeModel, sampled: Sampled, baseline: Sampled, config: Config) -> Verdicts:
    """What the judge model says about every answer beside the baseline's."""
    equal = [mine == other for mine, other in zip(sampled.texts, baseline.texts, strict=True)]
    asked = presentations(equal, random=config.orders == "random", seed=config.seed)
    questions = []
    for pair, mine_first in asked:
        both = (sampled.texts[pair], baseline.texts[pair])
        questions.append((sampled.prompts[pair], *(both if mine_first else both[::-1])))
    return verdicts(asked, judge.preferred(questions), len(equal))


# ------------------------------------------------------------------------------------------------------------- summary
def against_baseline(outcomes: np.ndarray, differences: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Win rate and length-controlled win rate, of outcomes (P, K) and differences in length (P, K)."""
    interval = interval_of(lambda i: length_controlled(outcomes[i], differences[i]), len(outcomes), seed=seed)
    controlled = {"mean": length_controlled(outcomes, differences), "interval": interval}
    return {"win_rate": estimate(outcomes, seed=seed), "length_controlled_win_rate": controlled}


def summarise(answers: Measured, baseline: Measured, contest: Contest, seed: int) -> dict[str, Any]:
    """The row of one model: what was not asked for is not there, and what does not exist is None."""
    shape, longer = answers.lengths.shape, answers.lengths - baseline.lengths
    by_prompt = [answers.texts[i : i + shape[1]] for i in range(0, len(answers.texts), shape[1])]
    rude = np.array([bool(contest.words.found(text)) for text in answers.texts]).reshape(shape)
    row: dict[str, Any] = {}
    if contest.judge:
        row |= {part: estimate(answers.marks[..., i], seed=seed) for i, part in enumerate(contest.judge.parts)}
        row |= against_baseline(wins(answers.marks[..., 0], baseline.marks[..., 0]), longer, seed=seed)
    if answers.verdicts:
        said = answers.verdicts
        row["judge_model"] = against_baseline(said.outcomes.reshape(shape), longer, seed=seed)
        row["judge_model"] |= {"first_preferred": said.first_preferred, "contradictions": said.contradictions}
    if answers.kl is not None:
        row["kl"] = estimate(answers.kl, seed=seed)
    row |= {"length": estimate(answers.lengths, seed=seed), "eos_rate": estimate(answers.finished, seed=seed)}
    row |= {f"distinct_{n}": distinct_n(answers.texts, n) for n in (1, 2)}
    overlap = np.array([[self_overlap(own)] for own in by_prompt]) if shape[1] > 1 else None
    row["self_overlap"] = None if overlap is None else estimate(overlap, seed=seed)
    row["rude"] = estimate(rude, seed=seed)
    if answers.reward is not None:
        row["reward"] = estimate(answers.reward, seed=seed)
        row |= against_judge(answers.reward, answers.marks[..., 0], seed=seed) if contest.judge else {}
    return row


def records(contest: Contest, measured: dict[str, Measured]) -> list[Record]:
    """A record an answer, which other commands read as a demonstration."""
    found = []
    for name, answers in measured.items():
        for row, text in enumerate(answers.texts):
            i, k = divmod(row, answers.lengths.shape[1])
            record = {"prompt": contest.prompts[i], "response": text, "model": name, "sample": k}
            record |= {"length": int(answers.lengths[i, k]), "finished": bool(answers.finished[i, k])}
            parts = contest.judge.parts if contest.judge else ()
            marks = dict(zip(parts, answers.marks[i, k], strict=True))
            numbers = marks | {"reward": answers.reward, "kl": answers.kl}
            record |= {n: float(v if v.ndim == 0 else v[i, k]) for n, v in numbers.items() if v is not None}
            found.append(record)
    return found


def main(config: Config) -> dict[str, Any]:
    """Compare the models; returns the summary."""
    contest = open_contest(config)
    reference = contest.reference.load(GPT, contest.device) if contest.reference else None
    measured: dict[str, Measured] = {}
    baseline = None
    for name, folder in zip(contest.names, contest.folders, strict=True):
        sampled = sample(contest, folder, config)
        baseline = baseline or sampled
        measured[name] = measure(contest, sampled, baseline, reference, config)
    first = measured[contest.names[0]]
    summary = {
        "prompts": len(contest.prompts),
        "samples": config.samples,
        "seed": config.seed,
        "judge": config.judge or ("world" if contest.judge else None),
        "baseline": contest.names[0],
        "reference": str(contest.reference.path) if contest.reference else None,
        "models": {
            name: {"folder": str(folder.path), **summarise(measured[name], first, contest, config.seed)}
            for name, folder in zip(contest.names, contest.folders, strict=True)
        },
    }
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "comparison.json", summary)
    write_records(config.out / "answers.jsonl", records(contest, measured))
    print(table(summary))
    return summary

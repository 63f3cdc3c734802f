"""How good is it? Every model answers the same held-out prompts and is measured beside the SFT model.

Judge scores are means over prompts of one sampled answer each (temperature 1, the policy that was trained), with 95 %
intervals by bootstrap over prompts. Win rate: share of prompts on which the judge scores the answer above the SFT
model's, ties half. KL is log pi - log pi_sft of the sampled answer, summed over its tokens, so its mean estimates
KL(pi || pi_sft) per sequence. For best-of-n, whose log-probability has no simple form, it is the upper bound
log n - (n-1)/n (Beirami et al. 2024, arXiv 2401.01879).

    python -m minirlhf.evaluate --run runs/tiny      # writes <run>/summary.json and <run>/answers.jsonl
    python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo ...       # any models, see comparison.py

`sample`, `measure` and `judged` are what both commands do with a model; the rest of this file is the run's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken
import torch
from torch import Tensor

from minirlhf import data
from minirlhf.batch import Batch, over_micro_batches
from minirlhf.config import Count, Seed, Settings
from minirlhf.encode import encode_prompt
from minirlhf.evaluate.judges import PARTS, ModelFolder, Sampled, judge_parts
from minirlhf.evaluate.statistics import agreeing_pairs, estimate
from minirlhf.evaluate.statistics import bootstrap_interval as bootstrap_interval
from minirlhf.evaluate.tables import SHARE, Column, rows, with_interval
from minirlhf.evaluate.win_rate import Verdicts, wins
from minirlhf.files import write_json, write_records
from minirlhf.generate import SLOTS, Samples, generate
from minirlhf.model import GPT
from minirlhf.ops import kl_k1
from minirlhf.reward import RewardModel
from minirlhf.runtime import Stream, project_file, require, resolve_device
from minirlhf.tokenizer import response_text, same_ids


@dataclass
class AnswersConfig(Settings):
    """The settings of answers to held-out prompts, a run's or any models'."""

    max_prompts: Count = 500
    """Use at most this many prompts, from the start."""
    max_new_tokens: Count = 32
    """Length limit of an answer in tokens."""
    micro_batch_tokens: Count = 8192
    """Padded tokens a forward pass."""
    seed: Seed = 0
    """Seed of the answers, of the order in which a judge sees two, and of the bootstrap."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


@dataclass
class Config(AnswersConfig):
    preset: Literal["tiny"] = "tiny"
    """Set of defaults; the judge knows the embedded world alone."""
    run: Path = Path("runs/tiny")
    """Folder of the run; reads its models, writes `<run>/summary.json` and `<run>/answers.jsonl`."""
    prompts: Path = project_file("world", "prompts.test.jsonl")
    """JSONL file of held-out prompts."""
    best_of: tuple[Count, ...] = (4, 16)
    """Sizes n of best-of-n from the SFT model by the reward model's score."""


PRESETS = {"tiny": Config()}


# -------------------------------------------------------------------------------------------- what is done with a model
@dataclass
class Answers:
    """K answers to each of P prompts, a prompt's next to each other, and what was measured about these B = P K rows.

    texts            B strings
    kl, lengths      (B,) nats and tokens (EOS included); kl is None where it was not measured
    finished         (B,) bool, ended with EOS
    reward           (B,) the reward model's score; empty without one
    parts            (B, parts) the judge's marks, the one that decides first; no parts without a judge
    kl_bound         best-of-n's bound on the KL, else None
    verdicts         of a judge that saw each answer beside the baseline's, where there is one
    """

    texts: list[str]
    kl: np.ndarray | None
    lengths: np.ndarray
    finished: np.ndarray
    reward: np.ndarray
    parts: np.ndarray
    kl_bound: float | None = None
    verdicts: Verdicts | None = None


def sample(model: GPT, prompts: Sequence[list[int]], eos_id: int, config: AnswersConfig, *, count: int = 1) -> Samples:
    """`count` answers to each prompt, a prompt's next to each other, from streams that no training reads."""
    every = [(i, k) for i in range(len(prompts)) for k in range(count)]
    return generate(
        model,
        [prompts[i] for i, _ in every],
        max_new_tokens=config.max_new_tokens,
        eos_id=eos_id,
        seed=config.seed,
        keys=[(Stream.EVALUATION, i, k) for i, k in every],
        slots=SLOTS,
    )


def with_texts(samples: Samples, prompts: Sequence[str], encoding: tiktoken.Encoding) -> Sampled:
    """The answers with their texts and the prompt of each."""
    each = len(samples) // len(prompts)
    texts = [response_text(encoding, ids) for ids in samples.response_ids()]
    return Sampled([prompt for prompt in prompts for _ in range(each)], texts, samples, encoding)


def measure(
    sampled: Sampled, parts: np.ndarray, reward: np.ndarray, reference: GPT | None, config: AnswersConfig
) -> Answers:
    """Lengths and the KL to the reference, where there is one, beside what judge and reward model gave."""
    samples, kl = sampled.samples, None
    if reference is not None:
        logprobs = over_micro_batches(
            lambda part: reference.logprobs(part.tokens, part.mask), samples, config.micro_batch_tokens
        )
        kl = kl_k1(samples.logprobs, logprobs).sum(dim=1).cpu().numpy()
    lengths = (samples.lengths - samples.prompt_lengths).cpu().numpy()
    return Answers(sampled.texts, kl, lengths, samples.finished.cpu().numpy(), reward, parts)


def judged(answers: Answers, baseline: Answers, names: Sequence[str], count: int, seed: int) -> dict[str, Any]:
    """The judge's marks of `count` answers a prompt by their names, and the win rate, with intervals over prompts."""
    won = wins(answers.parts[:, 0], baseline.parts[:, 0])
    columns = dict(zip(names, answers.parts.T, strict=True)) | {"win_rate": won}
    return {name: estimate(values.reshape(-1, count), seed=seed) for name, values in columns.items()}


# ------------------------------------------------------------------------------------------------------ the demo's run
def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: an upper bound on KL(best-of-n || base), in nats (Beirami et al. 2024, theorem 3.1)."""
    return math.log(n) - (n - 1) / n


class Evaluator:
    """The held-out prompts, the SFT model to compare with, and the reward model."""

    def __init__(
        self,
        sft: GPT,
        reward_model: RewardModel,
        encoding: tiktoken.Encoding,
        prompts: Sequence[str],
        config: Config,
        judge_parts: Callable[[str, str], Sequence[float]],
    ) -> None:
        self.sft, self.reward_model, self.encoding = sft, reward_model, encoding
        self.prompts, self.config, self.judge_parts = list(prompts), config, judge_parts
        self.ids = [encode_prompt(encoding, p) for p in self.prompts]

    def sample(self, model: GPT, candidates: int = 1) -> Samples:
        """`candidates` answers to each prompt, a prompt's answers next to each other."""
        return sample(model, self.ids, self.encoding.eot_token, self.config, count=candidates)

    def reward(self, samples: Batch) -> Tensor:
        """(B,) scores of the reward model."""
        model = self.reward_model
        return over_micro_batches(
            lambda part: model(part.tokens, part.lengths), samples, self.config.micro_batch_tokens
        )

    def marks(self, sampled: Sampled) -> np.ndarray:
        """(B, parts) of the judge."""
        return np.array([self.judge_parts(p, t) for p, t in zip(sampled.prompts, sampled.texts, strict=True)])

    def measure(self, samples: Samples, *, kl_bound: float | None = None) -> Answers:
        """Judge the answers; with `kl_bound` the KL is not estimated from the samples."""
        sampled = with_texts(samples, self.prompts, self.encoding)
        reference = self.sft if kl_bound is None else None
        reward = self.reward(samples).cpu().numpy()
        answers = measure(sampled, self.marks(sampled), reward, reference, self.config)
        answers.kl_bound = kl_bound
        return answers

    def first(self, samples: Samples, count: int) -> Samples:
        """The first `count` answers to each prompt."""
        grid = torch.arange(len(samples), device=samples.tokens.device).view(len(self.prompts), -1)
        return samples.rows(grid[:, :count].flatten())

    def best_of(self, samples: Samples, rewards: Tensor, n: int) -> Answers:
        """The best by reward of the first n candidates of each prompt.

        samples  from `sample(sft, candidates >= n)`; rewards (B,) the reward model's scores of them
        """
        scores = rewards.view(len(self.prompts), -1)
        start = torch.arange(0, len(samples), scores.shape[1], device=scores.device)
        return self.measure(samples.rows(start + scores[:, :n].argmax(dim=1)), kl_bound=best_of_n_kl(n))

    def agreement(self, samples: Samples, rewards: Tensor, candidates: int) -> dict[str, float]:
        """How often the reward model orders two answers to a prompt as the judge does: `share` of so many `pairs`.

        Over the pairs among the first `candidates` answers to each prompt that the judge does not think equal.
        """
        count = len(self.prompts)
        marks = self.marks(with_texts(self.first(samples, candidates), self.prompts, self.encoding))[:, 0]
        scores = rewards.cpu().double().numpy().reshape(count, -1)[:, :candidates]
        agreed, pairs = (each.sum() for each in agreeing_pairs(scores, marks.reshape(count, -1)))
        return {"share": float(agreed / pairs) if pairs else math.nan, "pairs": int(pairs)}

    def summarise(self, answers: Answers, baseline: Answers) -> dict[str, Any]:
        """Means with intervals, and the win rate against the baseline's answers to the same prompts."""
        return {
            **judged(answers, baseline, PARTS, 1, self.config.seed),
            "kl": answers.kl_bound if answers.kl is None else float(answers.kl.mean()),
            "kl_is_bound": answers.kl is None,
            "length": float(answers.lengths.mean()),
            "eos_rate": float(answers.finished.mean()),
            "reward": float(answers.reward.mean()),
        }


def main(config: Config) -> dict[str, Any]:
    """Evaluate the run's SFT model, best-of-n, and the PPO and DPO models that it holds; returns the summary."""
    device = resolve_device(config.device)
    prompts = [r["prompt"] for r in data.load(config.prompts, "prompts")][: config.max_prompts]
    for stage in ("sft", "reward"):
        place = config.run / stage / "model"
        require(place.is_dir(), f"{place}: no such folder; train with train_{stage}.py, or give another --run")
    trained = [stage for stage in ("ppo", "dpo") if (config.run / stage / "model").is_dir()]
    folders = {stage: ModelFolder.find(str(config.run / stage), GPT) for stage in ("sft", *trained)}
    scorer, sft = ModelFolder.find(str(config.run / "reward"), RewardModel), folders["sft"]
    for folder in (scorer, *folders.values()):
        require(same_ids(sft.encoding, folder.encoding), f"{folder.path}: has not the tokenizer of {sft.path}")

    start, reward_model = sft.load(GPT, device), scorer.load(RewardModel, device)
    evaluator = Evaluator(start, reward_model, sft.encoding, prompts, config, judge_parts)
    samples = evaluator.sample(start, candidates=max(config.best_of, default=1))
    rewards = evaluator.reward(samples)
    answers = {"sft": evaluator.measure(evaluator.first(samples, 1))}
    answers |= {f"best-of-{n}": evaluator.best_of(samples, rewards, n) for n in config.best_of}
    for stage in trained:
        answers[stage] = evaluator.measure(evaluator.sample(folders[stage].load(GPT, device)))

    summary: dict[str, Any] = {"prompts": len(prompts), "seed": config.seed}
    summary["reward_model_agreement"] = evaluator.agreement(samples, rewards, candidates=4)
    summary["models"] = {name: evaluator.summarise(a, answers["sft"]) for name, a in answers.items()}
    write_json(config.run / "summary.json", summary)
    texts = [{"prompt": p, **{name: a.texts[i] for name, a in answers.items()}} for i, p in enumerate(prompts)]
    write_records(config.run / "answers.jsonl", texts)
    print(table(summary))
    return summary


COLUMNS = (
    *with_interval("judge", "total", "{:.2f}", widths=(5, 15)),
    *(Column(part, part, "{:.2f}") for part in PARTS[1:]),
    *with_interval("win rate", "win_rate", SHARE, widths=(8, 13)),
    Column("KL", "bounded_kl", "{}", 5),
    Column("length", "length", "{:.1f}"),
    Column("EOS", "eos_rate", SHARE, 4),
    Column("reward", "reward", "{:.2f}"),
)


def table(summary: dict[str, Any]) -> str:
    """The summary as text: one row a model."""
    models = {
        name: m | {"bounded_kl": f"{'<= ' if m['kl_is_bound'] else ''}{m['kl']:.1f}"}
        for name, m in summary["models"].items()
    }
    share, pairs = (summary["reward_model_agreement"][name] for name in ("share", "pairs"))
    foot = f"{summary['prompts']} held-out prompts, one answer each; KL in nats per answer, length in tokens"
    agreement = f"the reward model orders {share:.1%} of {pairs} pairs of SFT answers as the judge does"
    return "\n".join([rows(models, COLUMNS, width=12), foot, agreement])

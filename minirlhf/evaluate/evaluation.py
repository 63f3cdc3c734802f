"""How good is it? Every model answers the same held-out prompts and is measured beside the SFT model.

Judge scores are means over prompts of one sampled answer each (temperature 1, the policy that was trained), with 95 %
intervals by bootstrap over prompts. Win rate: share of prompts on which the judge scores the answer above the SFT
model's, ties half. KL is log pi - log pi_sft of the sampled answer, summed over its tokens, so its mean estimates
KL(pi || pi_sft) per sequence. For best-of-n, whose log-probability has no simple form, it is the upper bound
log n - (n-1)/n (Beirami et al. 2024, arXiv 2401.01879).

    python -m minirlhf.evaluate --run runs/tiny      # writes <run>/summary.json and <run>/answers.jsonl
    python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo ...       # any models, see comparison.py

`Evaluator` is what both commands measure with; the rest of this file is the run's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from minirlhf import data
from minirlhf.batch import over_micro_batches
from minirlhf.config import Count, Seed, Settings
from minirlhf.encode import encode_prompts
from minirlhf.evaluate.judges import PARTS, Answers, ModelFolder, RewardScorer, find_judge
from minirlhf.evaluate.statistics import agreeing_pairs, estimate, wins
from minirlhf.evaluate.statistics import bootstrap_interval as bootstrap_interval
from minirlhf.evaluate.tables import FIGURES, rows
from minirlhf.files import write_json, write_records
from minirlhf.generate import SLOTS, generate
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
    """Padded tokens per forward pass."""
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


# ------------------------------------------------------------------------------------------------------ the evaluation
class Evaluator:
    """Held-out prompts, and what the answers to them are measured by: found and checked before a weight is read.

    folders       the models that answer; a prompt that is too long for one of them loses its start for all
    judge         of single answers, see `find_judge`
    reward_model  the proxy;  reference  the model that the KL is measured to
    Raises UserError where one of them does not fit the others.
    """

    def __init__(
        self,
        config: AnswersConfig,
        prompts: list[str],
        folders: Sequence[ModelFolder],
        *,
        judge: str | None,
        reward_model: ModelFolder | None,
        reference: ModelFolder | None,
    ) -> None:
        self.config, self.prompts, self.device = config, prompts, resolve_device(config.device)
        machine = (self.device, config.micro_batch_tokens)
        self.judge, readers = find_judge(judge, prompts, *machine)
        self.reward = RewardScorer(reward_model, *machine) if reward_model else None
        if reference is not None:
            advice = "so there is no KL between them; compare the models with --reference none"
            for folder in folders:
                where = f"{folder.path}: has not the tokenizer of {reference.path}"
                require(same_ids(reference.encoding, folder.encoding), f"{where}, {advice}")
        readers += [folder for folder in (reward_model, reference) if folder]
        readers = [r for r in readers if any(same_ids(r.encoding, folder.encoding) for folder in folders)]
        smallest = min([*folders, *readers], key=lambda folder: folder.positions)
        where = f"the context of {smallest.path}, {smallest.positions} tokens, leaves no room for a prompt"
        self.room = smallest.positions - config.max_new_tokens
        require(self.room > 0, f"--max-new-tokens {config.max_new_tokens}: {where}")
        self.reference = reference.load(GPT, self.device) if reference else None

    def sample(self, model: GPT, encoding: tiktoken.Encoding, *, count: int = 1) -> Answers:
        """`count` answers to each prompt, a prompt's next to each other, from streams that no training reads."""
        ids = encode_prompts(encoding, self.prompts, max_length=self.room)
        every = [(i, k) for i in range(len(ids)) for k in range(count)]
        samples = generate(
            model,
            [ids[i] for i, _ in every],
            max_new_tokens=self.config.max_new_tokens,
            eos_id=encoding.eot_token,
            seed=self.config.seed,
            keys=[(Stream.EVALUATION, i, k) for i, k in every],
            slots=SLOTS,
        )
        texts = [response_text(encoding, response) for response in samples.response_ids()]
        return Answers([self.prompts[i] for i, _ in every], texts, samples, encoding)

    def first(self, answers: Answers, count: int) -> np.ndarray:
        """(P, count) numbers of the first `count` answers to each prompt."""
        return np.arange(len(answers.texts)).reshape(len(self.prompts), -1)[:, :count]

    def measure(self, answers: Answers, *, kl: bool = True) -> Answers:
        """The answers with all figures, (B,) each.

        length            tokens, EOS included;  finished  bool, ended with EOS
        total, and so on  the judge's parts, where there is a judge; `total` decides who wins
        reward            the reward model's score, where there is one
        kl                log pi - log pi_ref in nats, where there is a reference and `kl` is true
        """
        samples, reference = answers.samples, self.reference
        plain = {"length": samples.lengths - samples.prompt_lengths, "finished": samples.finished}
        figures = {name: values.cpu().numpy() for name, values in plain.items()}
        figures |= self.judge(answers) if self.judge else {}
        figures |= {"reward": self.reward(answers)} if self.reward else {}
        if reference is not None and kl:
            logprobs = over_micro_batches(
                lambda part: reference.logprobs(part.tokens, part.mask), samples, self.config.micro_batch_tokens
            )
            figures["kl"] = kl_k1(samples.logprobs, logprobs).sum(dim=1).cpu().numpy()
        return replace(answers, figures=figures)

    def mean(self, values: np.ndarray) -> dict[str, Any]:
        """Mean and interval of (B,) figures."""
        return estimate(values.reshape(len(self.prompts), -1), seed=self.config.seed)

    def best_of(self, answers: Answers, rewards: np.ndarray, n: int) -> Answers:
        """The best by rewards (B,) of the first n answers to each prompt, measured; for the KL there is a bound."""
        first = self.first(answers, n)
        best = np.take_along_axis(first, rewards[first].argmax(axis=1)[:, None], axis=1)
        return self.measure(answers.rows(best), kl=False)

    def agreement(self, answers: Answers, rewards: np.ndarray, count: int) -> dict[str, float]:
        """How often rewards order two answers to a prompt as the judge does: `share` of so many `pairs`.

        Over the pairs among the first `count` answers to each prompt that the judge does not think equal.
        """
        assert self.judge is not None
        first = self.first(answers, count)
        marks = self.judge(answers.rows(first))["total"].reshape(first.shape)
        agreed, pairs = (each.sum() for each in agreeing_pairs(rewards[first], marks))
        return {"share": float(agreed / pairs) if pairs else math.nan, "pairs": int(pairs)}

    def summarise(self, answers: Answers, baseline: Answers, *, kl_bound: float | None = None) -> dict[str, Any]:
        """Means, those of the judge with intervals, and the win rate against the baseline's answers."""
        judged = {part: answers[part] for part in PARTS} | {"win_rate": wins(answers["total"], baseline["total"])}
        return {
            **{name: self.mean(values) for name, values in judged.items()},
            "kl": float(answers["kl"].mean()) if kl_bound is None else kl_bound,
            "kl_is_bound": kl_bound is not None,
            "length": float(answers["length"].mean()),
            "eos_rate": float(answers["finished"].mean()),
            "reward": float(answers["reward"].mean()),
        }


# ------------------------------------------------------------------------------------------------------ the demo's run
def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: an upper bound on KL(best-of-n || base), in nats (Beirami et al. 2024, theorem 3.1)."""
    return math.log(n) - (n - 1) / n


def main(config: Config) -> dict[str, Any]:
    """Evaluate the run's SFT model, best-of-n, and the PPO and DPO models that it holds; returns the summary."""
    prompts = [r["prompt"] for r in data.load(config.prompts, "prompts")][: config.max_prompts]
    for stage in ("sft", "reward"):
        place = config.run / stage / "model"
        require(place.is_dir(), f"{place}: no such folder; train with train_{stage}.py, or give another --run")
    trained = [stage for stage in ("ppo", "dpo") if (config.run / stage / "model").is_dir()]
    folders = {stage: ModelFolder.find(str(config.run / stage), GPT) for stage in ("sft", *trained)}
    sft, reward = folders["sft"], ModelFolder.find(str(config.run / "reward"), RewardModel)
    require(same_ids(sft.encoding, reward.encoding), f"{reward.path}: has not the tokenizer of {sft.path}")
    every = list(folders.values())
    evaluator = Evaluator(config, prompts, every, judge="world", reward_model=reward, reference=sft)
    drawn = evaluator.sample(sft.load(GPT, evaluator.device), sft.encoding, count=max(config.best_of, default=1))
    assert evaluator.reward is not None
    rewards = evaluator.reward(drawn)
    answers = {"sft": evaluator.measure(drawn.rows(evaluator.first(drawn, 1)))}
    bounds = {f"best-of-{n}": best_of_n_kl(n) for n in config.best_of}
    answers |= {f"best-of-{n}": evaluator.best_of(drawn, rewards, n) for n in config.best_of}
    for stage in trained:
        model = folders[stage].load(GPT, evaluator.device)
        answers[stage] = evaluator.measure(evaluator.sample(model, sft.encoding))

    summary: dict[str, Any] = {"prompts": len(prompts), "seed": config.seed}
    summary["reward_model_agreement"] = evaluator.agreement(drawn, rewards, 4)
    summary["models"] = {
        name: evaluator.summarise(each, answers["sft"], kl_bound=bounds.get(name)) for name, each in answers.items()
    }
    write_json(config.run / "summary.json", summary)
    texts = [{"prompt": p, **{name: each.texts[i] for name, each in answers.items()}} for i, p in enumerate(prompts)]
    write_records(config.run / "answers.jsonl", texts)
    print(table(summary))
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as text: one row a model."""
    bounds = {name: {"kl": f"<= {m['kl']:.2f}"} if m["kl_is_bound"] else {} for name, m in summary["models"].items()}
    models = {name: m | bounds[name] for name, m in summary["models"].items()}
    share, pairs = (summary["reward_model_agreement"][name] for name in ("share", "pairs"))
    foot = f"{summary['prompts']} held-out prompts, one answer each; KL in nats per answer, length in tokens"
    agreement = f"the reward model orders {share:.1%} of {pairs} pairs of SFT answers as the judge does"
    return "\n".join([rows(models, [column for part in FIGURES for column in part]), foot, agreement])

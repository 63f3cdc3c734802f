"""How good is it? Every model answers the same held-out prompts and is measured beside the SFT model.

Judge scores are means over prompts of one sampled answer each (temperature 1, the policy that was trained), with 95 %
intervals by bootstrap over prompts. Win rate: share of prompts on which the judge scores the answer above the SFT
model's, ties half. KL is log pi - log pi_sft of the sampled answer, summed over its tokens, so its mean estimates
KL(pi || pi_sft) per sequence. For best-of-n, whose log-probability has no simple form, it is the upper bound
log n - (n-1)/n (Beirami et al. 2024, arXiv 2401.01879).

    python -m minirlhf.evaluate --run runs/tiny      # writes <run>/summary.json and <run>/answers.jsonl
    python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo ...       # any models, see comparison.py
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

from minirlhf import data, tokenizer
from minirlhf.batch import Batch
from minirlhf.config import Count, Seed, Settings
from minirlhf.encode import encode_prompt
from minirlhf.evaluate.bootstrap import bootstrap_interval
from minirlhf.evaluate.judges import PARTS, judge_parts
from minirlhf.evaluate.win_rate import wins
from minirlhf.files import write_json, write_records
from minirlhf.generate import SLOTS, Samples, generate
from minirlhf.model import GPT
from minirlhf.ops import kl_k1
from minirlhf.reward import RewardModel
from minirlhf.rollout import over_micro_batches
from minirlhf.runtime import Stream, project_file, resolve_device
from minirlhf.tokenizer import response_text


@dataclass
class Config(Settings):
    preset: Literal["tiny"] = "tiny"
    """Set of defaults; the judge knows the embedded world alone."""
    run: Path = Path("runs/tiny")
    """Folder of the run; reads its models, writes `<run>/summary.json` and `<run>/answers.jsonl`."""
    prompts: Path = project_file("world", "prompts.test.jsonl")
    """JSONL file of held-out prompts."""
    max_prompts: Count = 500
    """Use at most this many prompts, from the start of the file."""
    best_of: tuple[Count, ...] = (4, 16)
    """Sizes n of best-of-n from the SFT model by the reward model's score."""
    max_new_tokens: Count = 32
    """Length limit of an answer in tokens."""
    micro_batch_tokens: Count = 8192
    """Padded tokens a forward pass."""
    seed: Seed = 0
    """Seed of the answers and the bootstrap."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


PRESETS = {"tiny": Config()}


@dataclass
class Answers:
    """One answer to each of P prompts and what was measured about it.

    texts            P strings
    kl, lengths      (P,) nats and tokens (EOS included); kl is None for best-of-n
    finished         (P,) bool, ended with EOS
    reward           (P,) the reward model's score
    parts            (P, 4) the judge's total, helpful, honest, harmless
    kl_bound         best-of-n's bound on the KL, else None
    """

    texts: list[str]
    kl: np.ndarray | None
    lengths: np.ndarray
    finished: np.ndarray
    reward: np.ndarray
    parts: np.ndarray
    kl_bound: float | None = None


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
        rows = [(i, k) for i in range(len(self.ids)) for k in range(candidates)]
        return generate(
            model,
            [self.ids[i] for i, _ in rows],
            max_new_tokens=self.config.max_new_tokens,
            eos_id=self.encoding.eot_token,
            seed=self.config.seed,
            keys=[(Stream.EVALUATION, i, k) for i, k in rows],
            slots=SLOTS,
        )

    def reward(self, samples: Batch) -> Tensor:
        """(B,) scores of the reward model."""
        model = self.reward_model
        return over_micro_batches(
            lambda part: model(part.tokens, part.lengths), samples, self.config.micro_batch_tokens
        )

    def measure(self, samples: Samples, *, kl_bound: float | None = None) -> Answers:
        """Judge one answer a prompt; with `kl_bound` the KL is not estimated from the samples."""
        texts = [response_text(self.encoding, ids) for ids in samples.response_ids()]
        kl = None
        if kl_bound is None:
            ref = over_micro_batches(
                lambda part: self.sft.logprobs(part.tokens, part.mask), samples, self.config.micro_batch_tokens
            )
            kl = kl_k1(samples.logprobs, ref).sum(dim=1).cpu().numpy()
        return Answers(
            texts=texts,
            kl=kl,
            lengths=(samples.lengths - samples.prompt_lengths).cpu().numpy(),
            finished=samples.finished.cpu().numpy(),
            reward=self.reward(samples).cpu().numpy(),
            parts=np.array([self.judge_parts(p, t) for p, t in zip(self.prompts, texts, strict=True)]),
            kl_bound=kl_bound,
        )

    def best_of(self, samples: Samples, rewards: Tensor, n: int) -> Answers:
        """The best by reward of the first n candidates of each prompt.

        samples  from `sample(sft, candidates >= n)`; rewards (B,) the reward model's scores of them
        """
        candidates = len(samples) // len(self.prompts)
        scores = rewards.view(len(self.prompts), candidates)[:, :n]
        first = torch.arange(0, len(samples), candidates, device=scores.device)
        return self.measure(samples.rows(first + scores.argmax(dim=1)), kl_bound=best_of_n_kl(n))

    def agreement(self, samples: Samples, rewards: Tensor, candidates: int) -> dict[str, float]:
        """How often the reward model orders two answers to a prompt as the judge does: `share` of so many `pairs`.

        Over the pairs among the first `candidates` answers to each prompt that the judge does not think equal.
        """
        per_prompt = len(samples) // len(self.prompts)
        texts = [response_text(self.encoding, ids) for ids in samples.response_ids()]
        agrees = []
        for i, prompt in enumerate(self.prompts):
            rows = range(i * per_prompt, i * per_prompt + min(candidates, per_prompt))
            scored = [(self.judge_parts(prompt, texts[row])[0], rewards[row].item()) for row in rows]
            pairs = [(a, b) for n, a in enumerate(scored) for b in scored[:n] if abs(a[0] - b[0]) > 1e-9]
            agrees += [(a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs]
        return {"share": float(np.mean(agrees)) if agrees else math.nan, "pairs": len(agrees)}

    def summarise(self, answers: Answers, baseline: Answers) -> dict:
        """Means with intervals, and the win rate against the baseline's answers to the same prompts."""
        seed = self.config.seed
        won = wins(answers.parts[:, 0], baseline.parts[:, 0])
        row: dict[str, Any] = {
            part: {"mean": float(values.mean()), "interval": bootstrap_interval(values, seed=seed)}
            for part, values in zip(PARTS, answers.parts.T, strict=True)
        }
        row["win_rate"] = {"mean": float(won.mean()), "interval": bootstrap_interval(won, seed=seed)}
        row["kl"] = answers.kl_bound if answers.kl is None else float(answers.kl.mean())
        row["kl_is_bound"] = answers.kl is None
        row["length"] = float(answers.lengths.mean())
        row["eos_rate"] = float(answers.finished.mean())
        row["reward"] = float(answers.reward.mean())
        return row


def main(config: Config) -> dict:
    """Evaluate the run's SFT model, best-of-n, and the PPO and DPO models that it holds; returns the summary."""
    device = resolve_device(config.device)
    prompts = [r["prompt"] for r in data.load(config.prompts, "prompts")][: config.max_prompts]
    encoding = tokenizer.load(config.run / "sft" / "model")

    def load(stage: str) -> GPT:
        model = GPT.from_pretrained(config.run / stage / "model").to(device).eval().requires_grad_(False)
        tokenizer.check_fits(encoding, model.config.vocab_size, config.run / stage / "model")
        return model

    reward_model = RewardModel.from_pretrained(config.run / "reward" / "model").to(device).eval().requires_grad_(False)
    evaluator = Evaluator(load("sft"), reward_model, encoding, prompts, config, judge_parts)
    largest = max(config.best_of, default=1)
    samples = evaluator.sample(evaluator.sft, candidates=largest)
    answers = {"sft": evaluator.measure(samples.rows(torch.arange(0, len(samples), largest, device=device)))}
    rewards = evaluator.reward(samples)
    for n in config.best_of:
        answers[f"best-of-{n}"] = evaluator.best_of(samples, rewards, n)
    for stage in ("ppo", "dpo"):
        if (config.run / stage / "model").is_dir():
            answers[stage] = evaluator.measure(evaluator.sample(load(stage)))

    summary: dict[str, Any] = {"prompts": len(prompts), "seed": config.seed}
    summary["reward_model_agreement"] = evaluator.agreement(samples, rewards, candidates=4)
    summary["models"] = {name: evaluator.summarise(a, answers["sft"]) for name, a in answers.items()}
    write_json(config.run / "summary.json", summary)
    write_records(
        config.run / "answers.jsonl",
        [{"prompt": p, **{name: a.texts[i] for name, a in answers.items()}} for i, p in enumerate(prompts)],
    )
    print(table(summary))
    return summary


def table(summary: dict) -> str:
    """The summary as text: one row a model."""
    head = f"{'model':<12}{'judge':>7}{'95 % interval':>17}{'helpful':>9}{'honest':>8}{'harmless':>10}"
    head += f"{'win rate':>10}{'95 % interval':>15}{'KL':>7}{'length':>8}{'EOS':>6}{'reward':>8}"
    rows = [head]
    for name, m in summary["models"].items():
        low, high = m["total"]["interval"]
        row = f"{name:<12}{m['total']['mean']:>7.2f}{f'{low:.2f} to {high:.2f}':>17}"
        row += f"{m['helpful']['mean']:>9.2f}{m['honest']['mean']:>8.2f}{m['harmless']['mean']:>10.2f}"
        low, high = m["win_rate"]["interval"]
        row += f"{m['win_rate']['mean']:>10.0%}{f'{low:.0%} to {high:.0%}':>15}"
        row += f"{'<= ' if m['kl_is_bound'] else ''}{m['kl']:.1f}".rjust(7)
        rows.append(row + f"{m['length']:>8.1f}{m['eos_rate']:>6.0%}{m['reward']:>8.2f}")
    rows.append(f"{summary['prompts']} held-out prompts, one answer each; KL in nats per answer, length in tokens")
    agreement = summary["reward_model_agreement"]
    share, pairs = agreement["share"], agreement["pairs"]
    rows.append(f"the reward model orders {share:.1%} of {pairs} pairs of SFT answers as the judge does")
    return "\n".join(rows)

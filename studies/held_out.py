"""What studies on the embedded world measure with: held-out prompts, and many answers of the SFT model to each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import project  # noqa: F401  first: it finds the package
import torch

from minirlhf import data, tokenizer
from minirlhf.batch import Batch, over_micro_batches
from minirlhf.evaluate import evaluation
from minirlhf.model import GPT
from minirlhf.rejection import best_of_n_mean
from minirlhf.reward import RewardModel
from minirlhf.runtime import project_file
from minirlhf.tokenizer import response_text

MICRO_BATCH_TOKENS = 8192


def evaluator(
    run: Path, prompts: int, seed: int, *, reward_model: torch.nn.Module | None = None, part: str = "test"
) -> evaluation.Evaluator:
    """A run's models on the first `prompts` of a part of the world, by its reward model or another."""
    file = project_file("world", f"prompts.{part}.jsonl")
    config = evaluation.Config(run=run, prompts=file, max_prompts=prompts, seed=seed, device="cpu")
    texts = [record["prompt"] for record in data.load(file, "prompts")][:prompts]
    sft = GPT.from_pretrained(run / "sft" / "model").eval().requires_grad_(False)
    if reward_model is None:
        reward_model = RewardModel.from_pretrained(run / "reward" / "model").eval().requires_grad_(False)
    encoding = tokenizer.load(run / "sft" / "model")
    return evaluation.Evaluator(sft, reward_model, encoding, texts, config, evaluation.judge_parts)


@dataclass(frozen=True)
class Drawn:
    """N sampled answers to each of P prompts, each distinct one kept and judged once.

    batch  the U distinct rows;  place (P, N) the row of each answer
    parts  (U, 4) the judge's total, helpful, honest, harmless
    """

    batch: Batch
    place: np.ndarray
    parts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(U,) tokens of the answers."""
        return (self.batch.lengths - self.batch.prompt_lengths).numpy().astype(float)

    def scores(self, reward_model: torch.nn.Module) -> np.ndarray:
        """(U,) of a reward model."""
        found = over_micro_batches(lambda b: reward_model(b.tokens, b.lengths), self.batch, MICRO_BATCH_TOKENS)
        return found.double().numpy()

    def best_of(self, n: int, scores: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(P,) what the best of n by `scores` is worth in `values`, (U,) both, without bias."""
        return best_of_n_mean(scores[self.place], values[self.place], n)

    @property
    def sizes(self) -> list[int]:
        """1, 2, 4, ... up to N."""
        return [2**k for k in range(self.place.shape[1].bit_length()) if 2**k <= self.place.shape[1]]

    def save(self, file: Path) -> None:
        """As one file of arrays."""
        rows = {name: getattr(self.batch, name).numpy() for name in ("tokens", "prompt_lengths", "lengths")}
        np.savez(file, **rows, place=self.place, parts=self.parts)

    @classmethod
    def load(cls, file: Path) -> Drawn:
        """What `save` wrote."""
        kept = np.load(file, allow_pickle=False)
        rows = (torch.from_numpy(kept[name]) for name in ("tokens", "prompt_lengths", "lengths"))
        return cls(Batch(*rows), kept["place"], kept["parts"])


def draw(known: evaluation.Evaluator, count: int) -> Drawn:
    """`count` answers of the SFT model to each held-out prompt."""
    samples = known.sample(known.sft, candidates=count)
    _, first, place = np.unique(samples.tokens.numpy(), axis=0, return_index=True, return_inverse=True)
    rows = torch.from_numpy(first)
    batch = Batch(samples.tokens[rows], samples.prompt_lengths[rows], samples.lengths[rows])
    texts = [response_text(known.encoding, ids) for ids in batch.response_ids()]
    asked = [known.prompts[row // count] for row in first.tolist()]
    parts = [known.judge_parts(prompt, text) for prompt, text in zip(asked, texts, strict=True)]
    return Drawn(batch, place.reshape(len(known.prompts), count), np.array(parts))

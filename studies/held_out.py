"""What studies on the embedded world measure with: held-out prompts, and many answers of the SFT model to each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import project  # noqa: F401  first: it finds the package
import torch

from minirlhf import data
from minirlhf.batch import Batch, over_micro_batches
from minirlhf.evaluate import evaluation
from minirlhf.evaluate.evaluation import Evaluator
from minirlhf.evaluate.judges import Answers, ModelFolder, world_marks
from minirlhf.model import GPT
from minirlhf.rejection import best_of_n_mean
from minirlhf.reward import RewardEnsemble, RewardModel
from minirlhf.runtime import project_file

MICRO_BATCH_TOKENS = 8192
AnyRewardModel = RewardModel | RewardEnsemble


def scores(reward_model: AnyRewardModel, batch: Batch) -> np.ndarray:
    """(B,) of a reward model."""
    return over_micro_batches(lambda b: reward_model(b.tokens, b.lengths), batch, MICRO_BATCH_TOKENS).numpy()


class HeldOut(Evaluator):
    """Held-out prompts of the embedded world: its judge, a run's reward model or another, the KL to its SFT model."""

    def __init__(
        self, run: Path, prompts: int, seed: int, *, reward_model: AnyRewardModel | None = None, part: str = "test"
    ) -> None:
        file = project_file("world", f"prompts.{part}.jsonl")
        config = evaluation.Config(run=run, prompts=file, max_prompts=prompts, seed=seed, device="cpu")
        texts = [record["prompt"] for record in data.load(file, "prompts")][:prompts]
        sft = ModelFolder.find(str(run / "sft"), GPT)
        proxy = None if reward_model else ModelFolder.find(str(run / "reward"), RewardModel)
        super().__init__(config, texts, [sft], judge="world", reward_model=proxy, reference=sft)
        self.sft, self.encoding = self.reference, sft.encoding
        if reward_model:
            self.reward = lambda answers: scores(reward_model, answers.samples)
        self.reward_model = reward_model or self.reward.model

    def drawn(self, count: int) -> Answers:
        """`count` answers of the SFT model to each prompt."""
        return self.sample(self.sft, self.encoding, count=count)

    def measured(self, model: GPT) -> Answers:
        """One answer of a model to each prompt, with all figures."""
        return self.measure(self.sample(model, self.encoding))

    def reward_model_agreement(self, count: int = 4) -> dict[str, float]:
        """How often the reward model orders two answers of the SFT model, of `count` to a prompt, as the judge does."""
        answers = self.drawn(count)
        return self.agreement(answers, self.reward(answers), count)


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

    def scores(self, reward_model: AnyRewardModel) -> np.ndarray:
        """(U,) of a reward model."""
        return scores(reward_model, self.batch).astype(np.float64)

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


def draw(known: HeldOut, count: int) -> Drawn:
    """`count` answers of the SFT model to each held-out prompt."""
    answers = known.drawn(count)
    samples = answers.samples
    _, first, place = np.unique(samples.tokens.numpy(), axis=0, return_index=True, return_inverse=True)
    rows = torch.from_numpy(first)
    batch = Batch(samples.tokens[rows], samples.prompt_lengths[rows], samples.lengths[rows])
    marks = world_marks(*([texts[i] for i in first] for texts in (answers.prompts, answers.texts)))
    return Drawn(batch, place.reshape(len(known.prompts), count), np.stack(list(marks.values()), axis=1))

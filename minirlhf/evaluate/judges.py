"""Judges: the embedded world, a function of texts, a reward model, or a language model that sees two answers.

    --judge world                       three marks and their mean, for prompts of the embedded world
    --judge package.module:function     (prompts, responses) -> scores, as in minirlhf/reward_functions.py
    --judge runs/other/reward           a reward model that no stage of the models was trained on
    --judge-model runs/tiny/judge/sft   which of two answers is better, by the probability of the verdict

The same reward and judge models label for `python -m minirlhf.feedback label --by`. A judge is found, and refused,
before weights are read; they are read when it is first asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import tiktoken
import torch

from minirlhf import reward_functions, tokenizer
from minirlhf.batch import Batch, Example, over_micro_batches, pad
from minirlhf.data.formats import message_prompt
from minirlhf.encode import encode_example, encode_prompt
from minirlhf.evaluate.statistics import wins
from minirlhf.generate import Samples
from minirlhf.hf.folder import read_settings
from minirlhf.hf.hub import model_folder, weight_files
from minirlhf.model import GPT, read_config
from minirlhf.reward import RewardModel
from minirlhf.runtime import Stream, require
from minirlhf.world import judge, questions

M = TypeVar("M", GPT, RewardModel)
PARTS = ("total", "helpful", "honest", "harmless")
ARCHITECTURES = {
    GPT: ("GPT2LMHeadModel", "a language model"),
    RewardModel: ("GPT2ForSequenceClassification", "a reward model"),
}
QUESTIONS = 128  # asked at a time


# ------------------------------------------------------------------------------------------------------------- folders
@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model of which everything but the weights was read, and found good."""

    path: Path
    encoding: tiktoken.Encoding
    positions: int

    @classmethod
    def find(cls, source: str, kind: type[GPT] | type[RewardModel], *, flag: str = "") -> ModelFolder:
        """A model's folder, a stage's folder that holds `model`, or a name on the hub.

        Raises UserError, which names the flag, where it is not a folder of that kind of model.
        """
        stage = Path(source) / "model"
        own = (Path(source) / "config.json").is_file()
        path = stage if not own and (stage / "config.json").is_file() else model_folder(source)
        shape = read_config(path)
        wanted, words = ARCHITECTURES[kind]
        declared = read_settings(path).get("architectures") or [wanted]
        require(wanted in declared, f"{flag} {path}: holds {declared[0]}, and not {words}".lstrip())
        require(bool(weight_files(path)), f"{path}: no model.safetensors; save the model again")
        encoding = tokenizer.load(path)
        tokenizer.check_fits(encoding, shape.vocab_size, path)
        return cls(path, encoding, shape.n_positions)

    def load(self, kind: type[M], device: torch.device) -> M:
        """The model, frozen."""
        return kind.from_pretrained(self.path).to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- judges of a single answer
@dataclass(frozen=True)
class Answers:
    """B answers of one model, as texts without EOS and as they were sampled, and what was measured about them.

    prompts  B whole texts; in `samples` those that are too long have lost their start
    figures  (B,) each, see `Evaluator.measure`; empty before
    """

    prompts: list[str]
    texts: list[str]
    samples: Samples
    encoding: tiktoken.Encoding
    figures: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.figures[name]

    def rows(self, index: np.ndarray) -> Answers:
        """The answers with these numbers, in the order of `index`, of any shape; not measured."""
        index = index.ravel()
        prompts, texts = ([every[i] for i in index] for every in (self.prompts, self.texts))
        place = torch.from_numpy(index).to(self.samples.tokens.device)
        return Answers(prompts, texts, self.samples.rows(place), self.encoding)


Marks = dict[str, np.ndarray]  # (B,) each by the judge's parts; `total` decides who wins
Judge = Callable[[Answers], Marks]


def world_marks(prompts: Sequence[str], texts: Sequence[str]) -> Marks:
    """The parts of the embedded world's judge."""
    every = [judge(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return {part: np.array([getattr(each, part) for each in every]) for part in PARTS}


@dataclass(frozen=True)
class RewardScorer:
    """A reward model as a function of answers: `scorer(answers)` -> (B,) scores.

    Answers ids are scored as they were sampled; where the reward model has another tokenizer, the texts are, with its
    EOS after those that ended. Raises UserError where an answer does not fit it.
    """

    folder: ModelFolder
    device: torch.device
    micro_batch_tokens: int

    @functools.cached_property
    def model(self) -> RewardModel:
        return self.folder.load(RewardModel, self.device)

    def __call__(self, answers: Answers) -> np.ndarray:
        same = tokenizer.same_ids(self.folder.encoding, answers.encoding)
        return self.scores(answers.samples if same else self.encoded(answers))

    def scores(self, batch: Batch) -> np.ndarray:
        """(B,) scores of a batch in the reward model's own tokens."""
        model, batch = self.model, batch.to(self.device)
        scores = over_micro_batches(lambda part: model(part.tokens, part.lengths), batch, self.micro_batch_tokens)
        finite = bool(torch.isfinite(scores).all())
        require(finite, f"{self.folder.path}: gave a score that is not a finite number; its weights are damaged")
        return scores.cpu().float().numpy()

    def encoded(self, answers: Answers) -> Batch:
        """The answers in the reward model's own tokens."""
        encoding, room = self.folder.encoding, self.folder.positions
        each = zip(answers.prompts, answers.texts, answers.samples.finished.tolist(), strict=True)
        rows = [
            encode_example(encoding, p, tokenizer.encode(encoding, t) + [encoding.eot_token] * ended, max_length=room)
            for p, t, ended in each
        ]
        fitting = [row for row in rows if row is not None]
        fits = len(fitting) == len(rows)
        require(fits, f"{self.folder.path}: an answer does not fit its {room} tokens; lower --max-new-tokens")
        return pad(fitting)


def find_judge(
    spec: str | None, prompts: Sequence[str], device: torch.device, micro_batch_tokens: int
) -> tuple[Judge | None, list[ModelFolder]]:
    """The judge that `world`, `package.module:function` or a reward model's folder names, and the model, if it is one.

    None is no judge. Raises UserError where there is no such judge, or it cannot judge answers to these prompts.
    """
    if spec is None:
        return None, []
    if spec == "world":
        strange = next((prompt for prompt in prompts if prompt not in questions()), None)
        where = f"{strange!r:.60} is no prompt of the embedded world, and its judge knows no other"
        require(strange is None, f"{where}; compare the models by another --judge")
        return lambda answers: world_marks(answers.prompts, answers.texts), []
    if ":" in spec and not Path(spec).exists():
        function, where = reward_functions.load(spec, flag="--judge"), f"--judge {spec}"
        scores_of = reward_functions.scores_of
        return lambda answers: {"total": np.array(scores_of(function, answers.prompts, answers.texts, where=where))}, []
    scorer = RewardScorer(ModelFolder.find(spec, RewardModel, flag="--judge"), device, micro_batch_tokens)
    return lambda answers: {"total": scorer(answers)}, [scorer.folder]


# ------------------------------------------------------------------------------------- judges that see two answers
VERDICTS = (" A", " B")


def question(prompt: str, first: str, second: str, *, instruction: str = "") -> str:
    """What a judge of two answers is asked."""
    return f"{instruction}{prompt}\n\n[A]{first}\n\n[B]{second}\n\nBetter: ["


def comparison_text(prompt: str, first: str, second: str, *, instruction: str = "") -> str:
    """The question as a message in a dialogue; the verdict, one of VERDICTS, is the answer to it."""
    return message_prompt(question(prompt, first, second, instruction=instruction))


@dataclass(frozen=True)
class JudgeModel:
    """A language model that says which of two answers is better: q = P(" A") / (P(" A") + P(" B")) after the question.

    Bai et al. 2022, "Constitutional AI", section 4.1, log-probabilities of the verdict.
    """

    folder: ModelFolder
    instruction: str
    device: torch.device
    micro_batch_tokens: int

    @functools.cached_property
    def model(self) -> GPT:
        return self.folder.load(GPT, self.device)

    def preferred(self, questions: Sequence[tuple[str, str, str]]) -> list[float]:
        """Probability that the answer shown first is the better one, for each (prompt, first, second)."""
        encoding, positions, model = self.folder.encoding, self.folder.positions, self.model
        verdicts = [tokenizer.encode(encoding, verdict) for verdict in VERDICTS]  # no EOS: how it ends is no verdict
        room = positions - max(map(len, verdicts))
        require(room > 0, f"the judge's context of {positions} tokens is too short for a verdict")
        asked = [encode_prompt(encoding, comparison_text(*q, instruction=self.instruction)) for q in questions]
        if cut := sum(len(ids) > room for ids in asked):
            where = f"to fit the judge's {positions} tokens"
            print(f"{cut} of {len(asked)} questions to the judge model lost their start {where}")
        shares: list[float] = []
        for start in range(0, len(asked), QUESTIONS):
            # Both verdicts follow the same tokens: else they would answer different questions.
            rows = [Example(ids[-room:], v) for ids in asked[start : start + QUESTIONS] for v in verdicts]
            logprobs = over_micro_batches(
                lambda part: model.logprobs(part.tokens, part.mask).sum(dim=1),
                pad(rows).to(self.device),
                self.micro_batch_tokens,
            )
            shares += torch.softmax(logprobs.view(-1, 2).cpu().double(), dim=1)[:, 0].tolist()
        return shares


def verdicts(
    judge_model: JudgeModel, answers: Answers, baseline: Answers, *, random: bool, seed: int
) -> tuple[np.ndarray, dict[str, float | None]]:
    """(B,) outcomes of the answers against the baseline's by a judge that sees both, and the judge's habits.

    random  each pair in one order, drawn for it alone; else in both, and the outcome is the mean. Equal texts tie:
            nothing is asked
    `first_preferred` is the share of questions in which the answer shown first won, ties half: 1/2 without a habit.
    `contradictions` is the share of pairs, asked in both orders, on which the judge took the same place twice.
    They are None where no question was asked, or none in both orders.
    """
    both = list(zip(answers.texts, baseline.texts, strict=True))
    pairs = np.flatnonzero([mine != theirs for mine, theirs in both])
    drawn = np.random.default_rng((seed, Stream.EVALUATION, 0)).integers(2, size=len(both))[pairs, None]
    mine_first = drawn if random else np.tile([1, 0], (len(pairs), 1))  # (pairs, orders)
    questions = [
        (answers.prompts[i], *(both[i] if first else both[i][::-1]))
        for i, orders in zip(pairs, mine_first, strict=True)
        for first in orders
    ]
    won = wins(np.array(judge_model.preferred(questions)).reshape(mine_first.shape), 0.5)
    points = np.where(mine_first, won, 1 - won)
    outcomes = np.full(len(both), 0.5)
    outcomes[pairs] = points.mean(axis=1)
    contradicting = np.abs(points[:, 0] - points[:, -1]) == 1
    return outcomes, {
        "first_preferred": float(won.mean()) if len(pairs) else None,
        "contradictions": float(contradicting.mean()) if len(pairs) and not random else None,
    }

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
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import tiktoken
import torch

from minirlhf import reward_functions, tokenizer
from minirlhf.batch import Batch, Example, over_micro_batches, pad
from minirlhf.data.formats import message_prompt
from minirlhf.encode import encode_example, encode_prompt
from minirlhf.generate import Samples
from minirlhf.hf.folder import read_settings
from minirlhf.hf.hub import model_folder, weight_files
from minirlhf.model import GPT, read_config
from minirlhf.reward import RewardModel
from minirlhf.runtime import UserError, require
from minirlhf.world import judge

M = TypeVar("M", GPT, RewardModel)
PARTS = ("total", "helpful", "honest", "harmless")
ARCHITECTURES = {
    GPT: ("GPT2LMHeadModel", "a language model"),
    RewardModel: ("GPT2ForSequenceClassification", "a reward model"),
}
QUESTIONS = 128  # asked at a time


def judge_parts(prompt: str, response: str) -> tuple[float, float, float, float]:
    """The embedded world's judge as (total, helpful, honest, harmless)."""
    j = judge(prompt, response)
    return j.total, j.helpful, j.honest, j.harmless


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
class Sampled:
    """B answers of one model, as texts without EOS and as they were sampled.

    prompts  B whole texts; in `samples` those that are too long have lost their start
    """

    prompts: list[str]
    texts: list[str]
    samples: Samples
    encoding: tiktoken.Encoding


@dataclass(frozen=True)
class Judge:
    """`marks(sampled)` -> (B, parts), of which the first decides who wins.

    folder  where the judge is a model
    """

    parts: tuple[str, ...]
    marks: Callable[[Sampled], np.ndarray]
    folder: ModelFolder | None = None


@dataclass(frozen=True)
class RewardScorer:
    """A reward model as a function of answers: `scorer(sampled)` -> (B,) scores.

    Sampled ids are scored as they were sampled; where the reward model has another tokenizer, the texts are, with its
    EOS after those that ended. Raises UserError where an answer does not fit it.
    """

    folder: ModelFolder
    device: torch.device
    micro_batch_tokens: int

    @functools.cached_property
    def model(self) -> RewardModel:
        return self.folder.load(RewardModel, self.device)

    def __call__(self, sampled: Sampled) -> np.ndarray:
        own = tokenizer.same_ids(self.folder.encoding, sampled.encoding)
        return self.scores(sampled.samples if own else self.encoded(sampled))

    def scores(self, batch: Batch) -> np.ndarray:
        """(B,) scores of a batch in the reward model's own tokens."""
        batch = batch.to(self.device)
        scores = over_micro_batches(lambda part: self.model(part.tokens, part.lengths), batch, self.micro_batch_tokens)
        finite = bool(torch.isfinite(scores).all())
        require(finite, f"{self.folder.path}: gave a score that is not a finite number; its weights are damaged")
        return scores.cpu().double().numpy()

    def encoded(self, sampled: Sampled) -> Batch:
        """The answers in the reward model's own tokens."""
        encoding, rows = self.folder.encoding, []
        for prompt, text, ended in zip(sampled.prompts, sampled.texts, sampled.samples.finished.tolist(), strict=True):
            ids = tokenizer.encode(encoding, text) + [encoding.eot_token] * ended
            row = encode_example(encoding, prompt, ids, max_length=self.folder.positions)
            if row is None:
                raise UserError(
                    f"{self.folder.path}: an answer of {len(ids)} tokens does not fit; lower --max-new-tokens"
                )
            rows.append(row)
        return pad(rows)


def find_judge(spec: str, prompts: Sequence[str], device: torch.device, micro_batch_tokens: int) -> Judge:
    """The judge that `world`, `package.module:function` or a reward model's folder names; else UserError."""
    if spec == "world":
        _require_world(prompts)
        return Judge(PARTS, lambda s: np.array([judge_parts(p, t) for p, t in zip(s.prompts, s.texts, strict=True)]))
    if ":" in spec and not Path(spec).exists():
        function, where = reward_functions.load(spec, flag="--judge"), f"--judge {spec}"
        return Judge(
            PARTS[:1],
            lambda s: np.array(reward_functions.scores_of(function, s.prompts, s.texts, where=where))[:, None],
        )
    scorer = RewardScorer(ModelFolder.find(spec, RewardModel, flag="--judge"), device, micro_batch_tokens)
    return Judge(PARTS[:1], lambda s: scorer(s)[:, None], scorer.folder)


def _require_world(prompts: Sequence[str]) -> None:
    advice = "give --judge a function or a reward model"
    for prompt in prompts:
        try:
            judge(prompt, "")
        except ValueError as error:
            raise UserError(f"--judge world: {prompt!r:.60} is no prompt of the embedded world; {advice}") from error


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
        shares, cut = self.ask(questions)
        if cut:
            where = f"to fit the judge's {self.folder.positions} tokens"
            print(f"{cut} of {len(questions)} questions to the judge model lost their start {where}")
        return shares

    def ask(self, questions: Sequence[tuple[str, str, str]]) -> tuple[list[float], int]:
        """`preferred`, and how many questions lost their start."""
        shares: list[float] = []
        cut = 0
        for start in range(0, len(questions), QUESTIONS):
            rows = [row for asked in questions[start : start + QUESTIONS] for row in self._rows(*asked)]
            batch = pad(rows).to(self.device)
            logprobs = over_micro_batches(
                lambda part: self.model.logprobs(part.tokens, part.mask).sum(dim=1), batch, self.micro_batch_tokens
            )
            shares += torch.softmax(logprobs.view(-1, 2).cpu().double(), dim=1)[:, 0].tolist()
            cut += sum(row.cut > 0 for row in rows[::2])
        return shares, cut

    def _rows(self, prompt: str, first: str, second: str) -> list[Example]:
        """The question with each verdict. No EOS follows: how a model ends is not its verdict."""
        encoding, room = self.folder.encoding, self.folder.positions
        verdicts = [tokenizer.encode(encoding, verdict) for verdict in VERDICTS]
        longest = max(map(len, verdicts))
        require(longest < room, f"the judge's context of {room} tokens is too short for a verdict")
        # Both lose the same tokens where they do not fit: else they would answer different questions.
        ids = encode_prompt(encoding, comparison_text(prompt, first, second, instruction=self.instruction))
        return [Example(ids[longest - room :], verdict, cut=max(0, len(ids) + longest - room)) for verdict in verdicts]

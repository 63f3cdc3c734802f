"""The reward model, a scalar head on the GPT-2 trunk, and its normalisation; the value model; ensembles.

The reward model scores a whole row, read at its last real token; the value model gives one number a position, the
expected return before the action there. Both own a deep copy of their trunk and share storage with nothing.
Left out: a bias in the reward head and buffers for its normalisation. Hugging Face's classification head has neither,
so the normalisation is folded into the weights and the saved folder alone reproduces the scores.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from minirlhf.comparisons import PairBatch
from minirlhf.config import Aggregate
from minirlhf.hf.folder import read_tensors, write_config, write_tensors
from minirlhf.hf.hub import model_folder
from minirlhf.model import GPT, GPTConfig, read_config
from minirlhf.ops import upcast


class RewardModel(nn.Module):
    """r(x, y) = w . hidden at the last token: forward(tokens (B, T), lengths (B,)) -> scores (B,).

    .gpt is the trunk, .score the head w (C -> 1, no bias), 0 until `from_gpt` draws it or `from_pretrained` reads it.
    Source: Ziegler et al. 2019 and Stiennon et al. 2020.
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt
        self.score = _zero_head(gpt, bias=False)

    @classmethod
    def from_gpt(cls, gpt: GPT, *, generator: torch.Generator) -> Self:
        """A reward model on a deep copy of the trunk of `gpt`; head weights from `generator`.

        w ~ N(0, 1 / sqrt(C + 1)): the deviation in the code of Stiennon et al. 2020, whose text lacks the root.
        """
        trunk = _empty_trunk(gpt.config)
        weights = {name: value.clone() for name, value in gpt.state_dict().items() if name != "lm_head.weight"}
        trunk.load_state_dict(weights, assign=True)
        model = cls(trunk)
        head, std = model.score.weight, 1 / math.sqrt(gpt.config.n_embd + 1)
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=generator, device=generator.device) * std)
        return model

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        hidden = self.gpt.hidden(tokens)  # (B, T, C)
        # gather refuses an index outside the row, where hidden[..., lengths - 1] would wrap a length of 0 around.
        index = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
        return self.head_scores(hidden.gather(1, index)[:, 0])

    def head_scores(self, hidden: Tensor) -> Tensor:
        """(M,) scores of the hidden states (M, C) at the last token of M responses."""
        return upcast(self.score(hidden))[:, 0]

    @torch.no_grad()
    def normalise(self, mean: float, std: float) -> None:
        """Rescale in place: every new score is (old score - mean) / std, e.g. of reference samples.

        The gain goes into the head, w' = w / std, and the constant into the final LayerNorm,
        ln_f.bias -= (mean / std) w' / (w' . w'), because the head has no bias. Normalising: Ziegler et al. 2019.
        Trap: normalising again composes with the first time; mean and std must be those of the scores as they are now.
        """
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"RewardModel.normalise: mean {mean}, std {std}; the scores they come from must vary")
        weight = self.score.weight[0].cpu().double() / std  # (C,); on the host, since mps has no float64
        shift = (mean / std) * weight / weight.dot(weight)
        self.score.weight.copy_(weight)
        self.gpt.ln_f.bias.copy_(self.gpt.ln_f.bias.cpu().double() - shift)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> Self:
        """Read a folder, or hub name, in the layout of GPT2ForSequenceClassification; raises as `GPT` does."""
        folder = model_folder(source)
        model = cls(_empty_trunk(read_config(folder)))
        read_tensors(model, folder)
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, which transformers loads as GPT2ForSequenceClassification.

        Trap: no pad_token_id is written, so transformers takes one unpadded row at a time and reads its last token,
        as here. With EOS named as padding it would step back over the row's own EOS and score another position.
        """
        extra = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": None}
        dtype = self.score.weight.dtype
        write_config(folder, self.gpt.config, architecture="GPT2ForSequenceClassification", dtype=dtype, extra=extra)
        write_tensors(self, folder)


def response_scores(model: RewardModel, batch: PairBatch) -> Tensor:
    """(R,) scores of R responses that share their prompts, each read at its last token."""
    hidden = model.gpt.hidden(batch.tokens, positions=batch.positions, visible=batch.visible)  # (B, T, C)
    return model.head_scores(hidden.flatten(0, 1)[batch.ends])  # (R,)


class ValueModel(nn.Module):
    """V(state before the action at t): forward(tokens (B, T), mask (B, T-1)) -> values (B, T-1), 0 off the mask.

    Index t reads the hidden state of tokens[:, t], before tokens[:, t+1] is chosen: the index of the log-probabilities.
    The head starts at 0, so that the first advantages are the returns themselves.
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt
        self.value = _zero_head(gpt, bias=True)

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel) -> Self:
        """A value model on a deep copy of the reward model's trunk."""
        return cls(copy.deepcopy(reward_model.gpt).full_precision().requires_grad_(True))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        values = self.value(self.gpt.hidden(tokens[:, :-1]))[..., 0]  # (B, T-1); no action follows the last token
        return torch.where(mask, upcast(values), 0.0)


def _empty_trunk(config: GPTConfig) -> GPT:
    """A GPT without memory and without a head of its own, which would be a parameter that no loss here reaches."""
    return GPT(dataclasses.replace(config, tie_word_embeddings=True), seed=None)


def _zero_head(gpt: GPT, *, bias: bool) -> nn.Linear:
    """A head C -> 1 of zeros where the trunk lives, in its number format."""
    weight = gpt.wte.weight
    head = nn.Linear(gpt.config.n_embd, 1, bias=bias, device="meta", dtype=weight.dtype)
    head.to_empty(device=weight.device)  # the layer's own initialisation would draw from the global generator
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


class RewardEnsemble(nn.Module):
    """forward(tokens (B, T), lengths (B,)) -> scores (B,), like a RewardModel's.

    members  reward models with one tokenizer, trained with different seeds or on different labels
    penalty  of the variance, in units of 1 / score; used by mean-minus-variance alone
    Trap: their scores must have one scale. `train_reward.py` gives each mean 0 and deviation 1 over reference answers.
    """

    def __init__(self, members: Sequence[RewardModel], *, aggregate: Aggregate = "mean", penalty: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.aggregate, self.penalty = aggregate, penalty

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        scores = torch.stack([member(tokens, lengths) for member in self.members])  # (M, B)
        return combine(scores, aggregate=self.aggregate, penalty=self.penalty)


def combine(scores: Tensor, *, aggregate: Aggregate, penalty: float) -> Tensor:
    """(M, B) scores of M members -> (B,), as at the head of this file. The variance divides by M: one member has 0."""
    if aggregate == "worst":
        return scores.amin(dim=0)
    mean = scores.mean(dim=0)
    return mean if aggregate == "mean" else mean - penalty * scores.var(dim=0, correction=0)

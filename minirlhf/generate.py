"""The sampling loop: batched generation with a KV cache.

Every row draws from its own stream of random numbers, keyed by (seed, key), and samples by inverse CDF: its response
depends on no other row, on no order, on no number of slots. The recorded log-probabilities are those of the
distribution that was sampled, logits / temperature, over the whole vocabulary.
Left out: top-k, top-p, minimum lengths and repetition penalties. With them the samples come from another distribution
than the one that is scored, and the mean of log pi - log pi_ref over them is no longer a KL divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.data import Batch
from minirlhf.decoder import Decoder, sample
from minirlhf.model import GPT
from minirlhf.runtime import DivergenceError, UserError

__all__ = ["GenerationError", "Samples", "generate", "sample", "stream"]


class GenerationError(UserError, ValueError):
    """Prompts or limits with which this model cannot generate: what, and how to fix it, in one line."""


@dataclass
class Samples(Batch):
    """Prompts with their sampled responses, right-padded with 0: a training batch as it stands.

    logprobs  (B, T-1) log-probability of each sampled token at the time it was drawn, 0 off the mask
    finished  (B,) bool: the response ends with EOS, and not at the length limit
    """

    logprobs: Tensor
    finished: Tensor


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float = 1.0,
    seed: int = 0,
    keys: Sequence[tuple[int, ...]] | None = None,
    slots: int | None = None,
) -> Samples:
    """Sample one response to each prompt.

    prompts         lists of token ids, each at least one token; for unconditional text the single token EOS
    max_new_tokens  length limit of a response, its EOS included
    eos_id          ends a response and is part of it; None never stops early. An EOS in the prompt ends nothing
    temperature     sample from softmax(logits / temperature); 0 takes the argmax and records log-probs at 1
    keys            one tuple of non-negative integers a row, its stream of random numbers; by default its number
    slots           at most this many rows are decoded at a time (memory); the result does not depend on it
    Raises GenerationError on prompts that cannot be continued, DivergenceError where the model's output is not finite.
    Trap: neither training mode nor any global generator is read or changed.
    """
    keys = [(row,) for row in range(len(prompts))] if keys is None else keys
    _check(model, prompts, keys, max_new_tokens, eos_id, temperature, slots)
    uniforms = _uniforms(seed, keys, max_new_tokens)
    slots = min(slots or len(prompts), len(prompts))
    decoder = Decoder(model, prompts, uniforms, slots=slots, eos_id=eos_id, temperature=temperature)
    decoder.run()
    _require_finite(decoder.logprobs)
    sampled, logprobs = decoder.sampled[:, :max_new_tokens], decoder.logprobs[:, :max_new_tokens]
    return _assemble(decoder.prompts, decoder.lengths, sampled, logprobs, eos_id)


@torch.no_grad()
def stream(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float = 1.0,
    seed: int = 0,
    key: tuple[int, ...] = (0,),
) -> Iterator[int]:
    """The tokens of one response, each as soon as it is sampled, the EOS included.

    They are those that `generate` samples for this prompt, seed and key; arguments and errors are the same.
    Trap: nothing is checked or computed before the first token is asked for.
    """
    _check(model, [prompt], [key], max_new_tokens, eos_id, temperature, None)
    uniforms = _uniforms(seed, [key], max_new_tokens)
    decoder = Decoder(model, [prompt], uniforms, slots=1, eos_id=eos_id, temperature=temperature)
    decoder.admit(torch.tensor([0], device=decoder.rows.device))
    while True:
        _require_finite(decoder.logprobs)
        yield int(decoder.tokens)
        if not decoder.alive:
            return
        decoder.step()


def _require_finite(logprobs: Tensor) -> None:
    if not torch.isfinite(logprobs).all():
        raise DivergenceError(
            "generate: the model's logits are not finite, so its weights hold nan or inf, or are too large for their "
            "number format; start from an earlier model, with a lower learning rate"
        )


def _assemble(
    prompts: Tensor, prompt_lengths: Tensor, sampled: Tensor, logprobs: Tensor, eos_id: int | None
) -> Samples:
    """Join right-padded prompts and sampled tokens (B, max_new_tokens) up to each row's first EOS."""
    is_eos = torch.zeros_like(sampled, dtype=torch.bool) if eos_id is None else sampled == eos_id
    finished = is_eos.any(dim=1)
    limit = sampled.shape[1]
    counts = torch.where(finished, is_eos.int().argmax(dim=1) + 1, limit)  # argmax is the first; the EOS counts
    lengths = prompt_lengths + counts
    place = torch.arange(int(lengths.max()), device=sampled.device) - prompt_lengths[:, None]  # (B, T) in the response
    response = (place >= 0) & (place < counts[:, None])
    place = place.clamp(0, limit - 1)
    tokens = F.pad(prompts, (0, place.shape[1] - prompts.shape[1]))
    tokens = torch.where(response, sampled.gather(1, place), tokens)
    logprobs = torch.where(response, logprobs.gather(1, place), 0.0)[:, 1:]  # index t scores token t+1
    return Samples(tokens, prompt_lengths, lengths, logprobs, finished)


def _uniforms(seed: int, keys: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """(B, count) float32 numbers in [0, 1), row i from the Philox stream of (seed, keys[i]).

    A shorter limit reads a prefix of the same stream. The key goes in as spawn_key, because plain entropy is padded
    with zeros: (1,) and (1, 0) would be one stream.
    """
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(key)))).random(
            count, dtype=np.float32
        )
        for key in keys
    ]
    return torch.from_numpy(np.stack(rows))


def _check(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float,
    slots: int | None,
) -> None:
    """Raise GenerationError, in words, on what cannot be generated; ValueError where the caller miscounted."""
    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    if not prompts:
        raise GenerationError("generate: no prompts")
    if len(keys) != len(prompts):
        raise ValueError(f"generate: {len(keys)} keys for {len(prompts)} prompts; give one a row")
    if max_new_tokens < 1 or not temperature >= 0 or (slots is not None and slots < 1):
        raise GenerationError(
            f"generate: max_new_tokens {max_new_tokens}, temperature {temperature}, slots {slots}; "
            "at least 1, 0 and 1 are needed"
        )
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise GenerationError(
            f"generate: eos_id {eos_id} is outside the vocabulary of {vocab_size}; None never stops early"
        )
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise GenerationError(f"generate: prompt {row} is empty; for unconditional text give the single token EOS")
        if len(prompt) + max_new_tokens - 1 > n_positions:  # the last token is not fed back
            raise GenerationError(
                f"generate: prompt {row} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it exceeds the "
                f"model's n_positions {n_positions}; shorten the prompt or the limit"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise GenerationError(f"generate: prompt {row} has ids outside the vocabulary of {vocab_size}")

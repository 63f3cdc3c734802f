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
from minirlhf.model import GPT, KVCache, log_softmax
from minirlhf.runtime import DivergenceError, UserError

COMPACT_BELOW = 0.75  # share of unfinished rows at which the finished ones are dropped from the cache


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
    weight = model.wte.weight
    device = weight.device
    uniforms = _uniforms(seed, keys, max_new_tokens).to(device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = _pad(prompts).to(device)

    # Rows that share a batch should have prompts of like length, so that prefill and cache waste little.
    order = torch.argsort(prompt_lengths, descending=True, stable=True)
    sampled = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=device)
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    logprobs = torch.zeros(sampled.shape, dtype=exact, device=device)
    for rows in order.split(slots or len(prompts)):
        lengths = prompt_lengths[rows]
        part = padded[rows, : int(lengths.max())]
        sampled[rows], logprobs[rows] = _decode(model, part, lengths, uniforms[rows], eos_id, temperature)
    _require_finite(logprobs)
    return _assemble(padded, prompt_lengths, sampled, logprobs, eos_id)


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
    device = model.wte.weight.device
    uniforms = _uniforms(seed, [key], max_new_tokens).to(device)
    cache = _new_cache(model, torch.tensor([len(prompt)], device=device), max_new_tokens)
    hidden = model.hidden(_pad([prompt]).to(device), cache)[:, -1]  # (1, C)
    for step in range(max_new_tokens):
        tokens, logprobs = sample(F.linear(hidden, model.head_weight), uniforms[:, step], temperature=temperature)
        _require_finite(logprobs)
        token = int(tokens)
        yield token
        if token == eos_id or step + 1 == max_new_tokens:
            return
        hidden = model.hidden(tokens[:, None], cache)[:, 0]


def sample(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF; returns tokens (B,) and their log-probabilities (B,).

    The token is the first whose cumulative probability exceeds u, in float64 where the device has it.
    logits (B, V); uniforms u (B,) in [0, 1); temperature 0 takes the argmax, and scores it at temperature 1.
    Trap: with u < 1 and the strict comparison a token of probability 0 is never drawn, neither first nor last.
    """
    logprobs = log_softmax(logits, temperature or 1.0)  # (B, V)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
        thresholds = uniforms.to(cdf.dtype) * cdf[:, -1]  # the last value is 1 only up to rounding
        tokens = torch.searchsorted(cdf, thresholds[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # nan alone gets there, and `generate` refuses it
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _decode(
    model: GPT, prompts: Tensor, lengths: Tensor, uniforms: Tensor, eos_id: int | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs (B, max_new_tokens) of one batch; what follows a row's EOS means nothing."""
    steps = uniforms.shape[1]
    cache = _new_cache(model, lengths, steps)
    rows = torch.arange(len(prompts), device=prompts.device)  # of the rows in the cache
    alive = torch.ones_like(rows, dtype=torch.bool)
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    hidden = model.hidden(prompts, cache)[rows, lengths - 1]  # (B, C) at each prompt's last token
    for step in range(steps):
        tokens, logprobs = sample(F.linear(hidden, model.head_weight), uniforms[rows, step], temperature=temperature)
        results.append((rows, tokens, logprobs))
        if eos_id is not None:
            alive = alive & (tokens != eos_id)
            unfinished = int(alive.sum())
            if unfinished == 0:
                break
            if unfinished <= COMPACT_BELOW * len(rows):
                keep = alive.nonzero()[:, 0]
                cache.select(keep)
                rows, tokens, alive = rows[keep], tokens[keep], alive[keep]
        if step + 1 < steps:
            hidden = model.hidden(tokens[:, None], cache)[:, 0]
    sampled = torch.zeros(uniforms.shape, dtype=torch.long, device=prompts.device)
    recorded = torch.zeros(uniforms.shape, dtype=results[0][2].dtype, device=prompts.device)
    for step, (index, tokens, logprobs) in enumerate(results):
        sampled[index, step], recorded[index, step] = tokens, logprobs
    return sampled, recorded


def _new_cache(model: GPT, lengths: Tensor, steps: int) -> KVCache:
    """An empty cache for prompts of these lengths and `steps` more tokens, in the number format of the forward."""
    kind, dtype = lengths.device.type, model.wte.weight.dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    return KVCache(model.config, lengths, int(lengths.max()) + steps - 1, dtype=dtype)  # the last is not fed back


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


def _pad(prompts: Sequence[Sequence[int]]) -> Tensor:
    padded = torch.zeros(len(prompts), max(len(prompt) for prompt in prompts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    return padded


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

"""Sampling: draw a token by inverse CDF, decode many rows in slots with a KV cache, stream one.

Every row draws from its own stream of random numbers, keyed by (seed, key), and samples by inverse CDF: its response
depends on no other row, on no order, on no number of slots. The recorded log-probabilities are those of the
distribution that was sampled, logits / temperature, over the whole vocabulary.
Left out: top-k, top-p, minimum lengths and repetition penalties. With them the samples come from another distribution
than the one that is scored, and the mean of log pi - log pi_ref over them is no longer a KL divergence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.batch import Batch, Example, pad
from minirlhf.kv_cache import KVCache
from minirlhf.model import GPT, log_softmax
from minirlhf.runtime import DivergenceError, UserError, require

REFILL = 0.125  # share of the slots that must be free before waiting prompts are read into them
SLOTS = 1024  # rows decoded at a time where there may be very many: bounds the KV cache
REPLAYED = ("cuda",)  # kinds of device on which a step is captured
# By kind of device, with what holds for the others. The GPU's are chosen, not measured: a capture costs some steps.
COMPACT_BELOW = defaultdict(lambda: 0.75, cuda=0.5)  # share of unfinished rows at which the others' slots are given up
CHECK_EVERY = defaultdict(lambda: 1, cuda=16)  # steps
PREFILL_POSITIONS = defaultdict(lambda: 256, cuda=16384)  # padded, of prompts read at a time: bounds the memory


def sample(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF; returns tokens (B,) and their log-probabilities (B,).

    The token is the first whose cumulative probability exceeds u, in float64 where the device has it.
    logits (B, V); uniforms u (B,) in [0, 1); temperature 0 takes the argmax, and scores it at temperature 1.
    Trap: with u < 1 and the strict comparison a token of probability 0 is never drawn, neither first nor last.
    """
    logprobs = log_softmax(logits, temperature or 1.0)  # (B, V)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        exact = torch.float32 if logits.device.type == "mps" else torch.float64
        cdf = logprobs.exp().to(exact).cumsum_(-1)  # in place: it is the largest tensor of a step
        thresholds = uniforms.to(exact) * cdf[:, -1]  # the last value is 1 only up to rounding
        tokens = torch.searchsorted(cdf, thresholds[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # nan alone gets there, and `generate` refuses it
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


@dataclass(eq=False)
class Decoder:
    """N prompts, of which S are being answered at a time; arguments and errors are those of `generate`.

    padded, lengths     (N, P) the prompts as they stand right-padded, and (N,) their tokens
    uniforms            (N, limit + 1) the random numbers of each row, and a 0
    sampled, logprobs   (N, limit + 1) what was drawn; what follows a row's EOS means nothing, nor does the last column,
                        into which a slot writes whose row is done
    tokens, rows, place, alive   (S,) the last token of each slot, its row, how many it has sampled, whether it goes on
    """

    model: GPT
    prompts: Sequence[Sequence[int]]
    keys: Sequence[tuple[int, ...]]
    limit: int
    eos_id: int | None
    temperature: float
    seed: int
    slots: int | None

    def __post_init__(self) -> None:
        self._check()
        weights, device, limit = self.model.wte.weight.dtype, self.model.wte.weight.device, self.limit
        count, config = len(self.prompts), self.model.config
        slots = min(self.slots or count, count)
        padded = pad([Example(list(prompt), []) for prompt in self.prompts]).to(device)
        self.padded, self.lengths = padded.tokens, padded.lengths
        self.uniforms = F.pad(_uniforms(self.seed, self.keys, limit), (0, 1)).to(device)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weights
        capacity = int(self.lengths.max()) + limit - 1  # the last token is not fed back
        shape = (config.n_layer, 2, slots, config.n_head, capacity, config.n_embd // config.n_head)
        self.cache = KVCache(shape, dtype=dtype, device=device)
        self.sampled = torch.zeros(count, limit + 1, dtype=torch.long, device=device)
        exact = torch.float64 if weights == torch.float64 else torch.float32
        self.logprobs = torch.zeros(count, limit + 1, dtype=exact, device=device)
        self.tokens, self.rows, self.place = torch.zeros(3, slots, dtype=torch.long, device=device)
        self.place += limit
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)
        # Rows that share a pass should have prompts of like length, so that prefill and cache waste little.
        self.waiting = torch.argsort(self.lengths, descending=True, stable=True)
        self.replay: Callable[[], None] | None = None
        self.shape = (0, 0)  # slots and columns of the last step, and so of `replay`

    def _check(self) -> None:
        """Raise GenerationError, in words, on what cannot be generated; ValueError where the caller miscounted."""
        vocab_size, n_positions = self.model.config.vocab_size, self.model.config.n_positions
        numbers = f"generate: max_new_tokens {self.limit}, temperature {self.temperature}, slots {self.slots}"
        require(len(self.prompts) > 0, "generate: no prompts", GenerationError)
        if len(self.keys) != len(self.prompts):
            raise ValueError(f"generate: {len(self.keys)} keys for {len(self.prompts)} prompts; give one per row")
        enough = self.limit >= 1 and self.temperature >= 0 and (self.slots is None or self.slots >= 1)
        require(enough, f"{numbers}; at least 1, 0 and 1 are needed", GenerationError)
        outside = f"outside the vocabulary of {vocab_size}"
        usable = self.eos_id is None or 0 <= self.eos_id < vocab_size
        require(usable, f"generate: eos_id {self.eos_id} is {outside}; None never stops early", GenerationError)
        for row, prompt in enumerate(self.prompts):
            where, length = f"generate: prompt {row}", len(prompt)
            require(length > 0, f"{where} is empty; for unconditional text give the single token EOS", GenerationError)
            long = f"{where} has {length} tokens; with max_new_tokens {self.limit} it exceeds the model's n_positions"
            fits = length + self.limit - 1 <= n_positions  # the last token is not fed back
            require(fits, f"{long} {n_positions}; shorten the prompt or the limit", GenerationError)
            require(min(prompt) >= 0 and max(prompt) < vocab_size, f"{where} has ids {outside}", GenerationError)

    def run(self) -> None:
        """Answer every prompt."""
        slots = len(self.rows)
        kind = self.rows.device.type
        while True:
            free = (~self.alive).nonzero()[:, 0]
            if len(self.waiting) and len(free) >= REFILL * slots:
                self.admit(free)
                continue  # a response may be a single token
            if len(free) == len(self.rows):
                return
            if not len(self.waiting) and len(free) >= (1 - COMPACT_BELOW[kind]) * len(self.rows):
                self.compact(free)
            left = self.limit - int(self.place[self.alive].max())  # steps in which no row reaches the limit
            for _ in range(left if self.eos_id is None else min(left, CHECK_EVERY[kind])):
                self.step()

    def admit(self, free: Tensor) -> None:
        """Read waiting prompts into the free slots, and sample the first token of each."""
        rows, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        count = max(1, PREFILL_POSITIONS[rows.device.type] // int(self.lengths[rows].max()))
        for part, slots in zip(rows.split(count), free[: len(rows)].split(count), strict=True):
            lengths = self.lengths[part]
            self.cache.admit(slots, lengths)
            hidden = self.model.hidden(self.padded[part, : int(lengths.max())], self.cache)
            self.rows[slots], self.place[slots], self.alive[slots] = part, 0, True
            self._draw(hidden[torch.arange(len(part), device=part.device), lengths - 1], slots)

    def compact(self, free: Tensor) -> None:
        """Give up the free slots: the last rows move into the first of them."""
        active = self.alive.nonzero()[:, 0]
        count = len(active)
        order = torch.arange(count, device=active.device)
        order[free[free < count]] = active[active >= count]
        self.cache.select(order)
        self.tokens, self.rows, self.place, self.alive = (
            state[order] for state in (self.tokens, self.rows, self.place, self.alive)
        )

    def step(self) -> None:
        """Sample a token in every slot; on a GPU by the captured step, once it has been taken in this shape."""
        shape, self.shape = self.shape, (len(self.rows), self.cache.widen())
        if self.rows.device.type not in REPLAYED or shape != self.shape:
            self.replay = None
            self._step()
            return
        if self.replay is None:
            self.replay = capture(self._step)
        self.replay()

    def _step(self) -> None:
        self._draw(self.model.hidden(self.tokens[:, None], self.cache)[:, 0], slice(None))
        self.cache.lengths.clamp_(max=self.cache.capacity - 1)  # where a slot idles whose row is done

    def _draw(self, hidden: Tensor, slots: Tensor | slice) -> None:
        """Sample the next token of these slots from hidden states (B, C), and record it; all in place."""
        rows, place = self.rows[slots], self.place[slots]
        logits = F.linear(hidden, self.model.head_weight)
        tokens, logprobs = sample(logits, self.uniforms[rows, place], temperature=self.temperature)
        self.sampled[rows, place], self.logprobs[rows, place] = tokens, logprobs
        self.alive[slots] &= place + 1 < self.limit
        if self.eos_id is not None:
            self.alive[slots] &= tokens != self.eos_id
        self.place[slots] = (place + 1).clamp(max=self.limit)
        self.tokens[slots] = tokens

    def samples(self) -> Samples:
        """Prompts and sampled tokens joined, up to each row's first EOS; raises DivergenceError where it was not."""
        _require_finite(self.logprobs)
        sampled, logprobs = self.sampled[:, : self.limit], self.logprobs[:, : self.limit]
        is_eos = torch.zeros_like(sampled, dtype=torch.bool) if self.eos_id is None else sampled == self.eos_id
        finished = is_eos.any(dim=1)
        counts = torch.where(finished, is_eos.int().argmax(dim=1) + 1, self.limit)  # argmax is the first; EOS counts
        lengths = self.lengths + counts
        columns = torch.arange(int(lengths.max()), device=sampled.device)
        place = columns - self.lengths[:, None]  # (B, T) in the response
        response = (place >= 0) & (place < counts[:, None])
        place = place.clamp(0, self.limit - 1)
        tokens = F.pad(self.padded, (0, len(columns) - self.padded.shape[1]))
        tokens = torch.where(response, sampled.gather(1, place), tokens)
        logprobs = torch.where(response, logprobs.gather(1, place), 0.0)[:, 1:]  # index t scores token t+1
        return Samples(tokens, self.lengths, lengths, logprobs, finished)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step without taking it; the result takes it, on the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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
    keys            one tuple of non-negative integers per row, its stream of random numbers; by default its number
    slots           at most this many rows are decoded at a time (memory); the result does not depend on it
    Raises GenerationError on prompts that cannot be continued, DivergenceError where the model's output is not finite.
    Trap: neither training mode nor any global generator is read or changed.
    """
    keys = [(row,) for row in range(len(prompts))] if keys is None else keys
    decoder = Decoder(model, prompts, keys, max_new_tokens, eos_id, temperature, seed, slots)
    decoder.run()
    return decoder.samples()


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
    decoder = Decoder(model, [prompt], [key], max_new_tokens, eos_id, temperature, seed, slots=1)
    decoder.admit(torch.tensor([0], device=decoder.rows.device))
    while True:
        _require_finite(decoder.logprobs)
        yield int(decoder.tokens)
        if not decoder.alive:
            return
        decoder.step()


def _require_finite(logprobs: Tensor) -> None:
    words = (
        "generate: the model's logits are not finite, so its weights hold nan or inf, or are too large for their "
        "number format; start from an earlier model, with a lower learning rate"
    )
    require(bool(logprobs.isfinite().all()), words, DivergenceError)


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

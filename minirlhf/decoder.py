"""Decoding: prompts waiting for a slot, the rows in the slots, and one step that makes each a token longer.

A row that ends leaves its slot to a waiting prompt; with none waiting, the rows that are left move together. What a row
samples depends on neither: its random numbers are its own.
A step keeps its state in place and asks the device nothing, so on a GPU it is captured once for each number of slots
and of cache columns and then replayed; whether rows have ended is looked up every CHECK_EVERY steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kv_cache import KVCache
from minirlhf.model import GPT, log_softmax

REFILL = 0.125  # share of the slots that must be free before waiting prompts are read into them
REPLAYED = ("cuda",)  # kinds of device on which a step is captured
# By kind of device, with what holds for the others. The GPU's are chosen, not measured: a capture costs some steps.
COMPACT_BELOW = defaultdict(lambda: 0.75, cuda=0.5)  # share of unfinished rows at which the others' slots are given up
CHECK_EVERY = defaultdict(lambda: 1, cuda=16)  # steps
PREFILL_POSITIONS = defaultdict(lambda: 256, cuda=16384)  # padded, of prompts read at a time: bounds the memory


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
        exact = torch.float32 if logits.device.type == "mps" else torch.float64
        cdf = logprobs.exp().to(exact).cumsum_(-1)  # in place: it is the largest tensor of a step
        thresholds = uniforms.to(exact) * cdf[:, -1]  # the last value is 1 only up to rounding
        tokens = torch.searchsorted(cdf, thresholds[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # nan alone gets there, and `generate` refuses it
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


class Decoder:
    """N prompts, of which S are being answered at a time.

    prompts    lists of token ids; as tensors `prompts` (N, P), right-padded, and `lengths` (N,)
    uniforms   (N, L) the random numbers of each row, L the length limit of a response
    slots      S, at most N
    sampled, logprobs   (N, L + 1) what was drawn; what follows a row's EOS means nothing, nor does the last column,
                        into which a slot writes whose row is done
    tokens, rows, place, alive   (S,) the last token of each slot, its row, how many it has sampled, whether it goes on
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        *,
        slots: int,
        eos_id: int | None,
        temperature: float,
    ) -> None:
        weights, device, (count, limit) = model.wte.weight.dtype, model.wte.weight.device, uniforms.shape
        self.model, self.prompts = model, _pad(prompts).to(device)
        self.lengths = lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.uniforms, self.limit = F.pad(uniforms, (0, 1)).to(device), limit
        self.eos_id, self.temperature = eos_id, temperature
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weights
        capacity = int(lengths.max()) + limit - 1  # the last token is not fed back
        layers, heads, head_size = model.config.n_layer, model.config.n_head, model.config.n_embd // model.config.n_head
        self.cache = KVCache(layers, heads, head_size, slots=slots, capacity=capacity, dtype=dtype, device=device)
        self.sampled = torch.zeros(count, limit + 1, dtype=torch.long, device=device)
        exact = torch.float64 if weights == torch.float64 else torch.float32
        self.logprobs = torch.zeros(count, limit + 1, dtype=exact, device=device)
        self.tokens, self.rows, self.place = torch.zeros(3, slots, dtype=torch.long, device=device)
        self.place += limit
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)
        # Rows that share a pass should have prompts of like length, so that prefill and cache waste little.
        self.waiting = torch.argsort(lengths, descending=True, stable=True)
        self.replay: Callable[[], None] | None = None
        self.shape = (0, 0)  # slots and columns of the last step, and so of `replay`

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
            hidden = self.model.hidden(self.prompts[part, : int(lengths.max())], self.cache)
            self.rows[slots], self.place[slots], self.alive[slots] = part, 0, True
            self._draw(hidden[torch.arange(len(part), device=part.device), lengths - 1], slots)

    def compact(self, free: Tensor) -> None:
        """Give up the free slots: the last rows move into the first of them."""
        kept = self.alive.nonzero()[:, 0]
        count = len(kept)
        order = torch.arange(count, device=kept.device)
        order[free[free < count]] = kept[kept >= count]
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


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step without taking it; the result takes it, on the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _pad(prompts: Sequence[Sequence[int]]) -> Tensor:
    padded = torch.zeros(len(prompts), max(len(prompt) for prompt in prompts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    return padded

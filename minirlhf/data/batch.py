"""The one noun that flows through everything: a right-padded batch, and how its rows are chosen and divided.

A row is prompt, response, padding, contiguous from column 0. `lengths` and `prompt_lengths` are the only truth about
it: no mask is ever computed from token ids, so GPT-2 needs no padding token and a real EOS is never mistaken for one.
Left out: packing several sequences into a row (a row is one sequence).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from minirlhf.runtime import Stream

C = TypeVar("C", bound="Comparison")


@dataclass(frozen=True)
class Example:
    """One tokenised prompt with its response; the response's last id is EOS where the writer finished."""

    prompt_ids: list[int]
    response_ids: list[int]
    cut: int = field(default=0, compare=False)  # tokens that the prompt lost at its start to fit the model


@dataclass(frozen=True)
class Comparison:
    """K responses to one prompt and the (better, worse) pairs among them, as positions in `examples`.

    The K responses stay together in one batch element: each is scored once, however many pairs it is in
    (Ouyang et al. 2022, section 3.5).
    """

    examples: list[Example]
    pairs: list[tuple[int, int]]


@dataclass
class Batch:
    """Right-padded sequences.

    tokens          (B, T) long; row i is meaningful up to lengths[i], what lies beyond may hold anything in range
    prompt_lengths  (B,)   tokens of the prompt, at least 1
    lengths         (B,)   tokens of prompt and response together, the response's EOS included

    Subclasses add fields of shape (B,), one number a row, or (B, T-1), one number a predicted token.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, T-1) bool: index t is true where tokens[:, t+1] belongs to the response, its EOS included."""
        t = torch.arange(self.tokens.shape[1] - 1, device=self.tokens.device)
        return (t >= self.prompt_lengths[:, None] - 1) & (t < self.lengths[:, None] - 1)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def response_ids(self) -> list[list[int]]:
        """Each row's response as ids, its EOS included."""
        ends = zip(self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:end] for row, start, end in ends]

    def rows(self, index: Tensor) -> Self:
        """The rows at `index`, trimmed to the longest of them."""
        width = self.tokens.shape[1]
        longest = int(self.lengths[index].max())

        def pick(value: Tensor) -> Tensor:
            # (B, T) and (B, T-1) keep their distance from the full width.
            return value[index] if value.ndim == 1 else value[index, : longest - (width - value.shape[1])]

        return type(self)(**{f.name: pick(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def pad(sequences: Sequence[Example]) -> Batch:
    """Right-pad examples to the longest of them; padding is 0, a value that nothing reads."""
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    tokens = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
    for row, s in enumerate(sequences):
        tokens[row, : lengths[row]] = [*s.prompt_ids, *s.response_ids]
    prompt_lengths = torch.tensor([len(s.prompt_ids) for s in sequences])
    return Batch(torch.from_numpy(tokens), prompt_lengths, torch.tensor(lengths))


def micro_batches(lengths: Tensor, max_tokens: int, rows_each: Tensor | None = None) -> list[Tensor]:
    """Split items into micro-batches of at most `max_tokens` padded positions, longest first.

    lengths    (n,) tokens of each item's longest row
    rows_each  (n,) rows an item brings along (K for a comparison of K responses); 1 by default
    Returns index tensors that together hold every item once. Sorting keeps neighbours alike, so little is padding.
    An item that is larger than the budget by itself becomes a micro-batch of its own.
    """
    rows_each = torch.ones_like(lengths) if rows_each is None else rows_each
    order = torch.argsort(lengths, descending=True, stable=True)
    parts: list[list[int]] = []
    rows = longest = 0
    for item in order.tolist():
        more = int(rows_each[item])
        if not parts or (rows + more) * longest > max_tokens:
            parts.append([])
            rows, longest = 0, int(lengths[item])
        parts[-1].append(item)
        rows += more
    return [torch.tensor(part) for part in parts]


def permutation(count: int, *key: int) -> list[int]:
    """A random order of `count` items that depends on the key alone, e.g. (seed, stream, epoch)."""
    return np.random.default_rng(key).permutation(count).tolist()


def batch_indices(count: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """The items of optimizer step `step`: consecutive slices of epoch after epoch, every item once an epoch.

    A pure function of its arguments, so the data position is the step itself and a resumed run needs nothing else.
    The last batch of an epoch may be smaller.
    """
    per_epoch = steps_per_epoch(count, batch_size)
    epoch, slot = divmod(step, per_epoch)
    return permutation(count, seed, Stream.DATA, epoch)[slot * batch_size : (slot + 1) * batch_size]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Optimizer steps that visit each of `count` items once."""
    return -(-count // batch_size)


@dataclass
class PairBatch:
    """Comparisons as one right-padded batch of all their responses, and the pairs as row numbers.

    batch  Batch of R rows, a comparison's responses next to each other
    pairs  (N, 2) long: row of the better, row of the worse response
    """

    batch: Batch
    pairs: Tensor

    @property
    def chosen(self) -> Tensor:
        """(N,) rows of the better responses."""
        return self.pairs[:, 0]

    @property
    def rejected(self) -> Tensor:
        """(N,) rows of the worse responses."""
        return self.pairs[:, 1]

    def to(self, device: torch.device) -> PairBatch:
        """The same comparisons on another device."""
        return PairBatch(self.batch.to(device), self.pairs.to(device))


def pad_comparisons(comparisons: Sequence[Comparison]) -> PairBatch:
    """One PairBatch of all the comparisons' responses, in order."""
    pairs, offset = [], 0
    for comparison in comparisons:
        pairs += [(offset + i, offset + j) for i, j in comparison.pairs]
        offset += len(comparison.examples)
    return PairBatch(pad([e for c in comparisons for e in c.examples]), torch.tensor(pairs))


def pair_micro_batches(comparisons: Sequence[C], max_tokens: int) -> Iterator[tuple[list[C], PairBatch]]:
    """The comparisons in micro-batches of at most `max_tokens` positions, each with its PairBatch.

    A comparison is never divided, so every pair stays together.
    """
    longest = torch.tensor([max(len(e.prompt_ids) + len(e.response_ids) for e in c.examples) for c in comparisons])
    rows = torch.tensor([len(c.examples) for c in comparisons])
    for index in micro_batches(longest, max_tokens, rows):
        part = [comparisons[i] for i in index.tolist()]
        yield part, pad_comparisons(part)


def token_count(comparisons: Sequence[Comparison]) -> int:
    """Tokens of all responses with their prompts."""
    return sum(len(e.prompt_ids) + len(e.response_ids) for c in comparisons for e in c.examples)

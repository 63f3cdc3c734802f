"""The one noun that flows through everything: a right-padded batch; its micro-batches, and the order of the data.

A row is prompt, response, padding, contiguous from column 0. `lengths` and `prompt_lengths` are the only truth about
it: no mask is ever computed from token ids, so GPT-2 needs no padding token and a real EOS is never mistaken for one.
Comparisons, whose responses share a prompt, have a batch of their own (comparisons.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from minirlhf import distributed
from minirlhf.runtime import Stream, is_out_of_memory, require

PASS_COST = 48  # what one more pass through a model costs, in positions; measured on a CPU, see docs/speed.md


@dataclass(frozen=True)
class Example:
    """One tokenised prompt with its response; the response's last id is EOS where the writer finished."""

    prompt_ids: list[int]
    response_ids: list[int]
    cut: int = field(default=0, compare=False)  # tokens that the prompt lost at its start to fit the model

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Batch:
    """Right-padded sequences.

    tokens          (B, T) long; row i is meaningful up to lengths[i], what lies beyond may hold anything in range
    prompt_lengths  (B,)   tokens of the prompt, at least 1
    lengths         (B,)   tokens of prompt and response together, the response's EOS included

    Subclasses add fields of shape (B,), one number per row, or (B, T-1), one number per predicted token.
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


B = TypeVar("B", bound=Batch)
T = TypeVar("T")


def pad(sequences: Sequence[Example]) -> Batch:
    """Right-pad examples to the longest of them; padding is 0, a value that nothing reads."""
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    tokens = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
    for row, s in enumerate(sequences):
        tokens[row, : lengths[row]] = [*s.prompt_ids, *s.response_ids]
    prompt_lengths = torch.tensor([len(s.prompt_ids) for s in sequences])
    return Batch(torch.from_numpy(tokens), prompt_lengths, torch.tensor(lengths))


def micro_batches(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Split rows into micro-batches of at most `max_tokens` padded positions, longest first, with the least padding.

    lengths  (n,) tokens of each row
    Returns index tensors that together hold every row once. The rows are sorted and cut where

        sum over micro-batches of (rows x longest row + PASS_COST)

    is smallest: padding against the fixed cost of a pass. Found by dynamic programming, from the shortest rows up.
    A row that is larger than the budget by itself becomes a micro-batch of its own.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered = lengths[order].tolist()
    count = len(ordered)
    least = np.zeros(count + 1)  # least[i]: cost of rows i, i+1, ...
    ends = np.zeros(count, dtype=np.int64)  # where the micro-batch that begins with row i ends
    for i in reversed(range(count)):
        rows = np.arange(1, 1 + min(count - i, max(1, max_tokens // ordered[i])))
        costs = rows * ordered[i] + least[i + rows]
        best = int(costs.argmin())
        least[i], ends[i] = costs[best] + PASS_COST, i + rows[best]
    parts, start = [], 0
    while start < count:
        parts.append(order[start : ends[start]])
        start = int(ends[start])
    return parts


def local_micro_batches(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """The `micro_batches` of those rows that are this process's to compute; alone, of all.

    Rows are chosen on the host, which a GPU is asked for once; the index tensors are where `lengths` is.
    """
    sizes = lengths.cpu()
    local = distributed.share(sizes)
    return [local[part].to(lengths.device) for part in micro_batches(sizes[local], max_tokens)]


def fitting(function: Callable[[int], T], max_tokens: int) -> T:
    """`function(max_tokens)`, a pass without gradient; where memory is refused, with half as many tokens, and so on."""
    try:
        return function(max_tokens)
    except (RuntimeError, MemoryError) as error:
        if max_tokens == 1 or not is_out_of_memory(error):
            raise
    return fitting(function, max_tokens // 2)  # out here the error no longer holds the tensors of the pass


@torch.no_grad()
def over_micro_batches(function: Callable[[Batch], Tensor], batch: Batch, max_tokens: int) -> Tensor:
    """`function(batch)` computed in micro-batches, without gradient; a (B,) or (B, T-1) result, 0 beyond a row.

    function  per-row: its result for a row must not depend on the other rows
    Every process computes a share of the rows and returns the result for all of them. Where memory is refused the
    micro-batches become smaller.
    """

    def local_rows(max_tokens: int) -> Tensor:
        parts = local_micro_batches(batch.lengths, max_tokens)
        first = function(batch.rows(parts[0] if parts else torch.tensor([0])))  # without rows: how a result looks
        shape = (len(batch),) if first.ndim == 1 else (len(batch), batch.tokens.shape[1] - 1)
        result = first.new_zeros(shape)
        for number, part in enumerate(parts):
            value = function(batch.rows(part)) if number else first
            if value.ndim == 1:
                result[part] = value
            else:
                result[part, : value.shape[1]] = value
        return result

    # Each row from one process, 0 from the others: nothing is rounded.
    return distributed.all_sum(fitting(local_rows, max_tokens))


def permutation(count: int, *key: int) -> list[int]:
    """A random order of `count` items that depends on the key alone, e.g. (seed, stream, epoch)."""
    return np.random.default_rng(key).permutation(count).tolist()


def shuffled(batch: B, count: int, *key: int) -> Iterator[B]:
    """The rows of a batch in `count` minibatches, in an order that depends on the key alone: every row once."""
    order = torch.tensor(permutation(len(batch), *key))
    for rows in order.tensor_split(min(count, len(order))):  # an epoch's last rollout may be small
        yield batch.rows(rows.to(batch.tokens.device))


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


def count_steps(epochs: float, count: int, batch_size: int) -> int:
    """Optimizer steps of `epochs` passes over `count` items; raises UserError where that is none."""
    require_batch("--batch-size", batch_size, count)
    steps = round(epochs * steps_per_epoch(count, batch_size))
    require(steps > 0, f"--epochs {epochs}: not a single step of {batch_size} with {count} to learn from")
    return steps


def require_batch(flag: str, size: int, count: int) -> None:
    """Raise UserError where a batch of `size`, given by `flag`, is larger than the data."""
    require(size <= count, f"{flag} {size}: larger than the {count} there are to learn from; give at most {count}")

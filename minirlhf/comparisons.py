"""Comparisons, the batch in which the responses to a prompt share it, and their log-probabilities for DPO.

A row is a prompt, its responses one after the other, and padding. A response reads its prompt and itself, never its
neighbours, and has the positions it would have if it followed the prompt alone: the prompt is computed once, forward
and backward, and every number is that of the responses in rows of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minirlhf import distributed
from minirlhf.batch import Example, fitting, local_micro_batches
from minirlhf.model import GPT

C = TypeVar("C", bound="Comparison")


@dataclass(frozen=True)
class Comparison:
    """K responses to one prompt and the (better, worse) pairs among them, as positions in `examples`.

    The K responses stay together in one batch element: each is scored once, however many pairs it is in
    (Ouyang et al. 2022, section 3.5).

    weights  of the pairs; none means 1 each. A tie is two pairs, one each way, of weight 1/2
    """

    examples: list[Example]
    pairs: list[tuple[int, int]]
    weights: list[float] = field(default_factory=list, kw_only=True)

    def __post_init__(self) -> None:
        same = all(e.prompt_ids == self.examples[0].prompt_ids for e in self.examples)
        if not (same and all(e.response_ids for e in self.examples)):
            raise ValueError("Comparison: an empty answer, or different prompts; answers to one prompt can be compared")

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt that all responses answer."""
        return self.examples[0].prompt_ids

    @property
    def pair_weights(self) -> list[float]:
        """The weight of each pair."""
        return self.weights or [1.0] * len(self.pairs)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of all responses: the length of the row they make."""
        return len(self.prompt_ids) + sum(len(e.response_ids) for e in self.examples)


@dataclass
class PairBatch:
    """Comparisons as right-padded rows of prompt, response 1, ..., response K; all responses numbered 0 to R-1.

    tokens     (B, T) long, one row per comparison
    positions  (B, T) long, of a response as if it followed its prompt directly
    segments   (B, T) long: 0 in the prompt, k in the row's k-th response, -1 in padding
    targets    (M,) places in `tokens.flatten()` of all response tokens, response after response
    sources    (M,) places of the token before each, from whose hidden state it is predicted
    owners     (M,) number of the response each belongs to
    ends       (R,) place of each response's last token
    chosen, rejected   (N,) numbers of the better and of the worse responses
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    sources: Tensor
    owners: Tensor
    ends: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def visible(self) -> Tensor:
        """(B, 1, T, T) bool: which key each query reads: not a later one, of the prompt or of its own response.

        Padding reads padding, so that no query is left without a key.
        """
        keys, queries = self.segments[:, None, None, :], self.segments[:, None, :, None]
        width = self.tokens.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.tokens.device).tril()
        return causal & ((keys == 0) | (keys == queries))

    def to(self, device: torch.device) -> PairBatch:
        """The same comparisons on another device."""
        return PairBatch(**{name: value.to(device) for name, value in vars(self).items()})


def pad_comparisons(comparisons: Sequence[Comparison]) -> PairBatch:
    """One PairBatch of all the comparisons, in order."""
    shape = (len(comparisons), max(c.length for c in comparisons))
    tokens, positions = np.zeros((2, *shape), dtype=np.int64)
    segments = np.full(shape, -1)
    for row, comparison in enumerate(comparisons):
        parts = [comparison.prompt_ids, *(example.response_ids for example in comparison.examples)]
        sizes, prompt = [len(part) for part in parts], len(comparison.prompt_ids)
        place = (row, slice(comparison.length))
        tokens[place] = np.concatenate(parts)
        positions[place] = np.concatenate([np.arange(prompt), *(np.arange(prompt, prompt + n) for n in sizes[1:])])
        segments[place] = np.repeat(np.arange(len(parts)), sizes)
    targets = np.flatnonzero(segments > 0)
    first = segments.flat[targets] != segments.flat[targets - 1]  # of a response: it follows the prompt
    ends_of_prompts = (segments == 0).sum(axis=1) - 1 + shape[1] * np.arange(shape[0])
    flat = {
        "targets": targets,
        "sources": np.where(first, ends_of_prompts[targets // shape[1]], targets - 1),
        "owners": first.cumsum() - 1,
        "ends": targets[np.append(first[1:], True)],
    }
    arrays = {"tokens": tokens, "positions": positions, "segments": segments, **flat}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    chosen, rejected = pair_numbers(comparisons).unbind(dim=1)
    return PairBatch(**tensors, chosen=chosen, rejected=rejected)


def best_against_rest(comparison: C) -> C:
    """The same comparison with the pairs of its best responses alone, those that no other one beats."""
    weighted = list(zip(comparison.pairs, comparison.pair_weights, strict=True))
    beaten = {worse for (_, worse), weight in weighted if weight == 1}
    remaining = [(pair, weight) for pair, weight in weighted if pair[0] not in beaten]
    return replace(comparison, pairs=[pair for pair, _ in remaining], weights=[weight for _, weight in remaining])


def best_first(comparison: Comparison) -> list[int]:
    """The responses of a ranking, best first; of equal ones the first alone, since a strict order has no ties."""
    beaten_by = [0] * len(comparison.examples)
    for (_, worse), weight in zip(comparison.pairs, comparison.pair_weights, strict=True):
        beaten_by[worse] += weight == 1
    return sorted({count: i for i, count in reversed(list(enumerate(beaten_by)))}.values(), key=beaten_by.__getitem__)


def differing_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of what two responses do not share: the longer one's middle, between common start and common end."""
    shortest = min(len(first), len(second))
    start = next((t for t in range(shortest) if first[t] != second[t]), shortest)
    end = next((t for t in range(shortest - start) if first[-1 - t] != second[-1 - t]), shortest - start)
    return max(len(first), len(second)) - start - end


def pair_weights(comparisons: Sequence[Comparison], contrast: float) -> Tensor:
    """(N,) weights of all pairs: a pair's own times d^-contrast, where its two responses differ in d tokens."""
    weights = [
        weight * differing_tokens(c.examples[i].response_ids, c.examples[j].response_ids) ** -contrast
        for c in comparisons
        for (i, j), weight in zip(c.pairs, c.pair_weights, strict=True)
    ]
    return torch.tensor(weights, dtype=torch.float64)


def ranked_scores(scores: Tensor, comparisons: Sequence[Comparison]) -> list[Tensor]:
    """(R,) scores of all responses -> (M, K), best first, of the M comparisons that rank K responses, for each K."""
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for part, comparison in zip(scores.split([len(c.examples) for c in comparisons]), comparisons, strict=True):
        order = best_first(comparison)
        by_length[len(order)].append(part[order])
    return [torch.stack(rows) for rows in by_length.values()]


def pair_numbers(comparisons: Sequence[Comparison]) -> Tensor:
    """(N, 2) long: the pairs of all comparisons, with their responses numbered through."""
    starts = np.cumsum([0, *(len(c.examples) for c in comparisons)])
    pairs = [(start + i, start + j) for start, c in zip(starts, comparisons, strict=False) for i, j in c.pairs]
    return torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 2))


def pair_micro_batches(comparisons: Sequence[C], max_tokens: int) -> Iterator[tuple[list[C], PairBatch]]:
    """The comparisons in micro-batches of at most `max_tokens` positions, longest first, each with its PairBatch.

    A comparison is never divided, so every pair stays together. Of several processes each gets its share.
    """
    for index in _micro_batches(comparisons, max_tokens):
        part = [comparisons[i] for i in index]
        yield part, pad_comparisons(part)


@torch.no_grad()
def over_comparisons(
    function: Callable[[PairBatch], Tensor], comparisons: Sequence[Comparison], max_tokens: int, device: torch.device
) -> list[Tensor]:
    """`function(PairBatch) -> (R,)` in micro-batches, without gradient: the K numbers of each comparison, in order.

    Of several processes each computes its share, and all get everything. Where memory is refused the micro-batches
    become smaller.
    """
    counts = [len(c.examples) for c in comparisons]
    numbers = torch.arange(sum(counts)).split(counts)

    def local_rows(max_tokens: int) -> Tensor:
        result = torch.zeros(sum(counts), dtype=torch.float64)  # on the host, where every device has float64
        for index in _micro_batches(comparisons, max_tokens):
            values = function(pad_comparisons([comparisons[i] for i in index]).to(device))
            result[torch.cat([numbers[i] for i in index])] = values.cpu().double()
        return result

    return list(distributed.all_sum(fitting(local_rows, max_tokens)).split(counts))


def _micro_batches(comparisons: Sequence[Comparison], max_tokens: int) -> list[list[int]]:
    lengths = torch.tensor([c.length for c in comparisons])
    return [index.tolist() for index in local_micro_batches(lengths, max_tokens)]


def token_count(comparisons: Sequence[Comparison]) -> int:
    """Tokens of all responses and prompts, a shared prompt counted once: those that are computed."""
    return sum(c.length for c in comparisons)


# -------------------------------------------------------------------------------------------------- log-probabilities
@dataclass(frozen=True)
class ReferencedComparison(Comparison):
    """A comparison with the frozen reference's log-probability of each response, summed over its tokens."""

    ref_seq_logprobs: list[float]


def seq_logprobs(model: GPT, batch: PairBatch, *, temperature: float = 1.0) -> Tensor:
    """(R,) log pi(y|x) of R responses: summed over the tokens, never averaged, because length matters in DPO."""
    hidden = model.hidden(batch.tokens, positions=batch.positions, visible=batch.visible).flatten(0, 1)  # (B T, C)
    targets = batch.tokens.flatten()[batch.targets]  # (M,)
    logprobs = model.head_logprobs(hidden[batch.sources], targets, temperature=temperature)  # (M,)
    return logprobs.new_zeros(len(batch.ends)).index_add(0, batch.owners, logprobs)  # (R,)


def with_reference(
    reference: GPT, comparisons: Sequence[Comparison], device: torch.device, *, max_tokens: int
) -> list[ReferencedComparison]:
    """Compute the reference's log-probabilities, once for the whole stage, and keep them with the comparisons."""
    ref = over_comparisons(lambda batch: seq_logprobs(reference, batch), comparisons, max_tokens, device)
    return [ReferencedComparison(c.examples, c.pairs, r.tolist()) for c, r in zip(comparisons, ref, strict=True)]


def pair_logprobs(
    policy: GPT, comparisons: Sequence[ReferencedComparison], batch: PairBatch, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four (N,) arguments of `dpo_loss`: chosen and rejected, of the policy and of the reference."""
    logprobs = seq_logprobs(policy, batch, temperature=temperature)  # (R,)
    stored = [value for c in comparisons for value in c.ref_seq_logprobs]
    ref = torch.tensor(stored, dtype=logprobs.dtype, device=logprobs.device)  # (R,)
    return logprobs[batch.chosen], logprobs[batch.rejected], ref[batch.chosen], ref[batch.rejected]

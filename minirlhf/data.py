"""Records on disk, and the one noun that flows through everything: a right-padded batch.

A row is prompt, response, padding, contiguous from column 0. `lengths` and `prompt_lengths` are the only truth about
it: no mask is ever computed from token ids, so GPT-2 needs no padding token and a real EOS is never mistaken for one.
Left out: packing several sequences into a row (a row is one sequence) and any reading by file name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import tiktoken
import torch
from torch import Tensor

from minirlhf import tokenizer
from minirlhf.runtime import Stream, UserError

Record = dict[str, Any]
C = TypeVar("C", bound="Comparison")


# ---------------------------------------------------------------------------------------------- the right-padded batch
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


# ---------------------------------------------------------------------------------------------- from text to examples
@dataclass(frozen=True)
class Example:
    """One tokenised prompt with its response; the response's last id is EOS where the writer finished."""

    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class Comparison:
    """K responses to one prompt and the (better, worse) pairs among them, as positions in `examples`.

    The K responses stay together in one batch element: each is scored once, however many pairs it is in
    (Ouyang et al. 2022, section 3.5).
    """

    examples: list[Example]
    pairs: list[tuple[int, int]]


def encode_prompt(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    """Ids of a prompt; the empty prompt, unconditional text, is the single token EOS."""
    return tokenizer.encode(encoding, prompt) or [encoding.eot_token]


def encode_example(
    encoding: tiktoken.Encoding,
    prompt: str,
    response: str,
    *,
    max_length: int,
    response_ids: list[int] | None = None,
) -> Example | None:
    """The one encoder: prompt and response tokenised apart and joined as ids, EOS after the response.

    response_ids  ids of a sampled response, kept as they were sampled: a model may write a text in other pieces
                  than the tokenizer would, and may have been cut off before its EOS.
    A row longer than max_length loses the prompt's first tokens. None where the response and one prompt token do
    not fit.
    """
    if response_ids is None:
        response_ids = [*tokenizer.encode(encoding, response), encoding.eot_token]
    room = max_length - len(response_ids)
    if room < 1:
        return None
    return Example(encode_prompt(encoding, prompt)[-room:], list(response_ids))


def encode_demonstrations(encoding: tiktoken.Encoding, records: Sequence[Record], *, max_length: int) -> list[Example]:
    """Examples of `{"prompt", "response"}` records; those whose response does not fit are left out."""
    examples = [encode_example(encoding, r["prompt"], r["response"], max_length=max_length) for r in records]
    return [e for e in examples if e is not None]


def split_by_prompt(records: Sequence[Record], *, share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; all records of a prompt fall on the same side, a random `share` on the second."""
    prompts = sorted({r["prompt"] for r in records})
    order = permutation(len(prompts), seed, Stream.SPLIT)
    held_out = {prompts[i] for i in order[: round(share * len(prompts))]}
    return [r for r in records if r["prompt"] not in held_out], [r for r in records if r["prompt"] in held_out]


def pairs_from_ranks(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """All (better, worse) pairs of a ranking; rank 0 is best and equal ranks make no pair."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def differing_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of what two responses do not share: the longer one's middle, between common start and common end."""
    shortest = min(len(first), len(second))
    start = next((t for t in range(shortest) if first[t] != second[t]), shortest)
    end = next((t for t in range(shortest - start) if first[-1 - t] != second[-1 - t]), shortest - start)
    return max(len(first), len(second)) - start - end


def encode_comparison(encoding: tiktoken.Encoding, record: Record, *, max_length: int) -> Comparison | None:
    """A comparison from a pair or a ranking record; None where nothing in it can be compared.

    `{"prompt", "chosen", "rejected"}` is a ranking of two. Responses that do not fit max_length are left out with
    their pairs, and so are pairs whose two sides hold the same ids: they say nothing about preference.
    """
    if "responses" in record:
        responses, ranks = record["responses"], record["ranks"]
    else:
        responses, ranks = [record["chosen"], record["rejected"]], [0, 1]
    ids = record.get("response_ids", [None] * len(responses))
    examples = [
        encode_example(encoding, record["prompt"], text, max_length=max_length, response_ids=known)
        for text, known in zip(responses, ids, strict=True)
    ]
    kept = [i for i, e in enumerate(examples) if e is not None]
    examples = [examples[i] for i in kept]
    pairs = [
        (i, j)
        for i, j in pairs_from_ranks([ranks[i] for i in kept])
        if examples[i].response_ids != examples[j].response_ids
    ]
    return Comparison(examples, pairs) if pairs else None


def encode_comparisons(encoding: tiktoken.Encoding, records: Sequence[Record], *, max_length: int) -> list[Comparison]:
    """Comparisons of pair or ranking records; those with nothing to compare are left out."""
    comparisons = [encode_comparison(encoding, r, max_length=max_length) for r in records]
    return [c for c in comparisons if c is not None]


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


# --------------------------------------------------------------------------------------------------- files of records
def read_records(path: Path | str, fields: Sequence[str]) -> list[Record]:
    """The records of a JSONL file, each with the given text fields (`"a|b"`: either of the two).

    Raises UserError that names file, line and reason for a line that is not such a record, or for an empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JSONL file with the fields {', '.join(fields)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: holds no records; each line must hold one JSON object")
    records = []
    # Not splitlines: it would break a text at U+2028 and its like, which JSON leaves as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); each line must hold one object") from error
        for field in fields:
            if not isinstance(record, dict) or not any(name in record for name in field.split("|")):
                raise UserError(f"{path}:{number}: no field {field.replace('|', ' or ')!r} in this record")
        records.append(record)
    return records


def write_records(path: Path | str, records: Sequence[Record]) -> None:
    """Write records as JSONL, one a line, readable UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

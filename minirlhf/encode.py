"""From records to token ids: the one encoder, used by SFT, reward model, PPO, DPO and evaluation.

Prompt and response are tokenised apart and joined as ids. A row that is too long loses the start of its prompt, never
its response or EOS; what cannot be kept is left out, counted and said in one line.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import tiktoken

from minirlhf import tokenizer
from minirlhf.batch import Example, permutation
from minirlhf.comparisons import Comparison
from minirlhf.runtime import Stream, require

Record = dict[str, Any]
Response = str | list[int]


def encode_prompt(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    """Ids of a prompt; the empty prompt, unconditional text, is the single token EOS."""
    return tokenizer.encode(encoding, prompt) or [encoding.eot_token]


def encode_prompts(encoding: tiktoken.Encoding, prompts: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Ids of prompts to answer; a prompt longer than max_length loses its start, so that the answer has room."""
    every = [encode_prompt(encoding, prompt) for prompt in prompts]
    _say("prompts", len(every), 0, sum(len(ids) > max_length for ids in every), max_length)
    return [ids[-max_length:] for ids in every]


def encode_example(encoding: tiktoken.Encoding, prompt: str, response: Response, *, max_length: int) -> Example | None:
    """The one encoder: prompt and response tokenised apart and joined as ids, EOS after the response.

    response  a text, or ids that stay as they were sampled: a model may write a text in other pieces than the
              tokenizer would, and may have been cut off before its EOS
    A row longer than max_length loses the prompt's first tokens. None where the response and one prompt token do
    not fit.
    """
    response_ids = encode_response(encoding, response)
    room = max_length - len(response_ids)
    return _join(encode_prompt(encoding, prompt), response_ids, room) if room >= 1 else None


def encode_response(encoding: tiktoken.Encoding, response: Response) -> list[int]:
    """Ids of a whole response: its text, then EOS; ids are taken as they are."""
    return [*tokenizer.encode(encoding, response), encoding.eot_token] if isinstance(response, str) else response


def _join(prompt_ids: list[int], response_ids: list[int], room: int) -> Example:
    """The example with the last `room` tokens of its prompt, at least one."""
    return Example(prompt_ids[-room:], list(response_ids), cut=max(0, len(prompt_ids) - room))


# ------------------------------------------------------------------------------------------------------ demonstrations
def encode_demonstrations(encoding: tiktoken.Encoding, records: Sequence[Record], *, max_length: int) -> list[Example]:
    """Examples of `{"prompt", "response"}` records; those whose response does not fit are left out and counted."""
    rows = [encode_demonstration(encoding, record, max_length=max_length) for record in records]
    cut = sum(e.cut > 0 for examples in rows for e in examples)
    _say("demonstrations", len(rows), sum(not examples for examples in rows), cut, max_length)
    return [e for examples in rows for e in examples]


def encode_demonstration(encoding: tiktoken.Encoding, record: Record, *, max_length: int) -> list[Example]:
    """The examples of one record: one, none where its response does not fit, or many for a long text.

    A text without a prompt goes on in as many rows as it needs. Each later row has the last token of the row before
    as its prompt, so that every token is predicted exactly once and EOS stands at the text's two ends alone.
    """
    if record["prompt"] or max_length < 2:
        example = encode_example(encoding, record["prompt"], record["response"], max_length=max_length)
        return [] if example is None else [example]
    ids = [encoding.eot_token, *encode_response(encoding, record["response"])]
    starts = range(1, len(ids), max_length - 1)
    return [Example([ids[start - 1]], ids[start : start + max_length - 1]) for start in starts]


# --------------------------------------------------------------------------------------------------------- comparisons
def pairs_from_ranks(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """All (better, worse) pairs of a ranking; rank 0 is best and equal ranks make no pair."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def encode_comparison(
    encoding: tiktoken.Encoding, record: Record, *, max_length: int, ties: bool = False
) -> Comparison | None:
    """A comparison from a pair or a ranking record; None where nothing in it can be compared.

    `{"prompt", "chosen", "rejected"}` is a ranking of two. Responses that do not fit max_length are left out with
    their pairs, and so are pairs whose two sides hold the same ids: they say nothing about preference.
    All rows of a comparison lose the same tokens of their prompt: answers to different prompts cannot be compared.

    ties  True makes two pairs of each tie, one each way, of weight 1/2. A label that was skipped is no tie.
    """
    if "responses" in record:
        responses, ranks = record["responses"], record["ranks"]
    else:
        responses, ranks = [record["chosen"], record["rejected"]], [0, 1]
    ids = [encode_response(encoding, response) for response in record.get("response_ids") or responses]
    places = [i for i, row in enumerate(ids) if 0 < len(row) < max_length]
    ranks = [ranks[i] for i in places]
    pairs = pairs_from_ranks(ranks)
    if ties and record.get("verdict") != "skip":
        pairs += [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] == ranks[j]]
    pairs = [(i, j) for i, j in pairs if list(ids[places[i]]) != list(ids[places[j]])]
    if not pairs:
        return None
    weights = [1.0 if ranks[i] != ranks[j] else 0.5 for i, j in pairs] if ties else []
    prompt_ids = encode_prompt(encoding, record["prompt"])
    room = max_length - max(len(ids[i]) for i in places)
    return Comparison([_join(prompt_ids, ids[i], room) for i in places], pairs, weights=weights)


def encode_comparisons(
    encoding: tiktoken.Encoding, records: Sequence[Record], *, max_length: int, ties: bool = False
) -> list[Comparison]:
    """Comparisons of pair or ranking records; those with nothing to compare are left out and counted."""
    every = [encode_comparison(encoding, record, max_length=max_length, ties=ties) for record in records]
    encoded = [c for c in every if c is not None]
    _say("comparisons", len(every), len(every) - len(encoded), sum(c.examples[0].cut > 0 for c in encoded), max_length)
    return encoded


def split_by_prompt(records: Sequence[Record], *, share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; all records of a prompt fall on the same side, a random `share` on the second.

    Texts without a prompt are told apart by themselves. Of one single text the end is held out.
    """
    if len(records) == 1 and not records[0]["prompt"] and "response" in records[0]:
        text = records[0]["response"]
        place = text.find("\n", round((1 - share) * len(text))) + 1 or len(text)
        return [{"prompt": "", "response": text[:place]}], [{"prompt": "", "response": text[place:]}]

    def key(record: Record) -> str:
        return record["prompt"] or record.get("response") or record.get("chosen") or ""

    keys = sorted({key(r) for r in records})
    order = permutation(len(keys), seed, Stream.SPLIT)
    held_out = {keys[i] for i in order[: round(share * len(keys))]}
    return [r for r in records if key(r) not in held_out], [r for r in records if key(r) in held_out]


def require_both_sides(source: object, train: Sequence[Comparison], validation: Sequence[Comparison]) -> None:
    """Raise UserError unless there are comparisons to learn from and comparisons to hold out."""
    sizes = f"{len(train)} comparisons to learn from and {len(validation)} to hold out"
    wanted = "at least two prompts are needed, and a --validation-share that divides them"
    require(len(train) > 0 and len(validation) > 0, f"{source}: {sizes}; {wanted}")


def _say(what: str, total: int, dropped: int, cut: int, max_length: int) -> None:
    """One line about what did not fit, where there is something to say."""
    if dropped:
        print(f"{what}: {dropped} of {total} left out, nothing to learn from in {max_length} tokens", flush=True)
    if cut:
        print(f"{what}: {cut} of {total} lost the start of their prompt to fit {max_length} tokens", flush=True)

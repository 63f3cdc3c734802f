"""Candidates: several answers to each prompt, sampled from a policy."""

from __future__ import annotations

from collections.abc import Sequence

import tiktoken

from minirlhf import tokenizer
from minirlhf.encode import Record, encode_prompt
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.runtime import Stream
from minirlhf.tokenizer import response_text

SLOTS = 1024  # rows decoded at a time: bounds the KV cache; answers stay the same but for rounding


def collect(
    policy: GPT,
    encoding: tiktoken.Encoding,
    prompts: Sequence[str],
    *,
    candidates: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Record]:
    """Sample `candidates` answers to each prompt; equal texts are kept once.

    Returns a record a prompt: `prompt`, `responses`, and `response_ids`, the ids as they were sampled (EOS included
    where the model wrote it). Later stages train on those ids: a model may write a word in other pieces than the
    tokenizer would. A prompt with a single distinct answer gives a record with one response.
    """
    ids = [encode_prompt(encoding, prompt) for prompt in prompts]
    samples = generate(
        policy,
        [ids[i] for i in range(len(ids)) for _ in range(candidates)],
        max_new_tokens=max_new_tokens,
        eos_id=encoding.eot_token,
        temperature=temperature,
        seed=seed,
        keys=[(Stream.FEEDBACK, i, k) for i in range(len(ids)) for k in range(candidates)],
        slots=SLOTS,
    )
    sampled = samples.response_ids()
    records = []
    for i, prompt in enumerate(prompts):
        distinct: dict[str, list[int]] = {}
        for response_ids in sampled[i * candidates : (i + 1) * candidates]:
            distinct.setdefault(response_text(encoding, response_ids), response_ids)
        records.append({"prompt": prompt, "responses": list(distinct), "response_ids": list(distinct.values())})
    return records


def reencoded_differently(encoding: tiktoken.Encoding, record: Record) -> int:
    """How many of a record's responses the tokenizer would encode to other ids than were sampled."""
    return sum(
        [i for i in ids if i != encoding.eot_token] != tokenizer.encode(encoding, text)
        for text, ids in zip(record["responses"], record["response_ids"], strict=True)
    )

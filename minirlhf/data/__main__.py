"""What a data file holds, before anything trains on it.

    python -m minirlhf.data check pairs.jsonl
    python -m minirlhf.data check Anthropic/hh-rlhf/helpful-base --preset gpt2 --split "test[:200]"

Prints what was detected, the first record as the model will see it with its loss mask, lengths, what would be cut or
left out and why, and every bad line as file:line: reason. Exit code 2 where there are bad lines.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import tiktoken
import tyro

from minirlhf import data, tokenizer
from minirlhf.batch import Example, pad
from minirlhf.config import Count, Settings, run_into_a_pipe
from minirlhf.encode import Record, encode_comparison, encode_demonstration, encode_prompt
from minirlhf.runtime import UserError, require

SHOWN = 600  # characters of a text that are printed


@dataclass
class Config(Settings):
    source: Annotated[str, tyro.conf.Positional] = ""
    """File, or name on the hub."""
    preset: Literal["tiny", "gpt2"] = "tiny"
    """Tokenizer and context of this preset of the training scripts."""
    kind: Literal["pairs", "demonstrations", "prompts"] | None = None
    """What to read it as; by default the richest that it can give."""
    split: str = ""
    """Split of a hub data set, or a slice: train, test[:1000], [:90%]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query response=reply."""
    tokenizer: str = "world"
    """`world`, `gpt2`, `bytes` or a folder with GPT-2 tokenizer files."""
    max_length: Count = 512
    """Context of the model in tokens; 512 is what train_sft.py gives a new model for a user's file."""


PRESETS = {"tiny": Config(), "gpt2": Config(preset="gpt2", tokenizer="gpt2", max_length=1024)}


def main(config: Config) -> data.Dataset:
    """Print the report; raises UserError where there are bad lines or nothing to learn from."""
    require(bool(config.source), "no file; write: python -m minirlhf.data check FILE")
    require(config.max_length >= 2, f"--max-length {config.max_length}: must be at least 2")
    encoding = tokenizer.load(config.tokenizer)
    dataset = data.read(config.source, config.kind, split=config.split, columns=config.columns)
    print(f"{config.source}\n  {dataset.container}; {dataset.format}; {dataset.rows} rows")
    print(f"  {len(dataset.records)} {dataset.kind} to learn from")
    for reason, count in dataset.left_out.most_common():
        print(f"  {count} left out: {reason}")
    if dataset.records:
        rows = [_rows(encoding, dataset.kind, record, config.max_length) for record in dataset.records]
        print(f"\nfirst record, as the model sees it in {config.max_length} tokens of {config.tokenizer!r}:")
        _show_record(encoding, dataset, rows[0])
        print(f"\n{'tokens':<11}" + "".join(f"{name:>8}" for name in ("min", "50 %", "90 %", "99 %", "max")))
        _show_lengths(encoding, dataset)
        _show_fit(rows, dataset, config.max_length)
    for bad in dataset.bad:
        print(bad)
    if dataset.bad:
        raise UserError(f"{config.source}: bad lines: {len(dataset.bad)}; correct or remove them")
    require(len(dataset.records) > 0, f"{config.source}: nothing to learn from")
    return dataset


def _rows(encoding: tiktoken.Encoding, kind: data.Kind, record: Record, max_length: int) -> list[Example]:
    """The rows that a record becomes; none where it does not fit."""
    if kind == "prompts":
        ids = encode_prompt(encoding, record["prompt"])
        return [Example(ids[-max_length:], [], cut=max(0, len(ids) - max_length))]
    if kind == "demonstrations":
        return encode_demonstration(encoding, record, max_length=max_length)
    comparison = encode_comparison(encoding, record, max_length=max_length)
    return [] if comparison is None else comparison.examples


def _show_record(encoding: tiktoken.Encoding, dataset: data.Dataset, rows: list[Example]) -> None:
    """Each row in two parts, without and with loss, as the batch's own mask divides it."""
    sides = "chosen" in dataset.records[0]
    names = ["chosen", "rejected"] if sides else ["row" if row.response_ids else "prompt" for row in rows]
    if not rows:
        print("  it does not fit: its response is too long")
    for name, row in zip(names, rows[:4], strict=False):
        batch = pad([row])
        tokens = batch.tokens[0].tolist()
        loss = [False, *batch.mask[0].tolist()]  # nothing predicts the first token
        for on, mark in ((False, "no loss"), (True, "loss")):
            ids = [token for token, learned in zip(tokens, loss, strict=True) if learned == on]
            text = _printable(tokenizer.decode(encoding, ids))
            if ids:
                print(f"  {name:<9}{mark:<8}{len(ids):>5} tokens |{text}|")


def _printable(text: str) -> str:
    """On one line, with what does not print written out; the middle of a long text is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"


def _show_lengths(encoding: tiktoken.Encoding, dataset: data.Dataset) -> None:
    """Percentiles of whole texts, before anything is cut."""
    for name in ("prompt", "response", "chosen", "rejected"):
        texts = [record[name] for record in dataset.records if name in record]
        if not texts:
            continue
        eos = 0 if name == "prompt" else 1
        lengths = [len(tokenizer.encode(encoding, text)) + eos for text in texts]
        quantiles = np.percentile(lengths, (0, 50, 90, 99, 100))
        print(f"  {name:<9}" + "".join(f"{value:>8.0f}" for value in quantiles))


def _show_fit(rows: list[list[Example]], dataset: data.Dataset, max_length: int) -> None:
    lost = sum(not examples for examples in rows)
    cut = [most for most in (max((e.cut for e in examples), default=0) for examples in rows) if most]
    print(f"in {max_length} tokens: {lost} left out (response too long, or its two sides have the same tokens)")
    longest = f", at most {max(cut)} tokens" if cut else ""
    print(f"in {max_length} tokens: {len(cut)} lose the start of their prompt{longest}")
    pieces = sum(map(len, rows))
    if dataset.kind == "demonstrations" and pieces > len(rows):
        print(f"in {max_length} tokens: texts go on over rows, {pieces} in all")


if __name__ == "__main__":
    if sys.argv[1:2] != ["check"]:
        print("error: write: python -m minirlhf.data check FILE, or check --help", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run_into_a_pipe(main, PRESETS)

"""The contents of a data file, before anything trains on it.

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
from minirlhf.batch import Example
from minirlhf.config import AtLeastTwo, Settings, run_into_a_pipe
from minirlhf.encode import Record, encode_comparison, encode_demonstration, encode_prompt
from minirlhf.runtime import require

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
    max_length: AtLeastTwo = 512
    """Context of the model in tokens; 512 is what train_sft.py gives a new model for a user's file."""


PRESETS = {"tiny": Config(), "gpt2": Config(preset="gpt2", tokenizer="gpt2", max_length=1024)}


def main(config: Config) -> data.Dataset:
    """Print the report; raises UserError where there are bad lines or nothing to learn from."""
    require(bool(config.source), "no file; write: python -m minirlhf.data check FILE")
    encoding = tokenizer.load(config.tokenizer)
    dataset = data.read(config.source, config.kind, split=config.split, columns=config.columns)
    print(f"{config.source}\n  {dataset.container}; {dataset.format}; {len(dataset.rows)} rows")
    print(f"  {len(dataset.records)} {dataset.kind} to learn from")
    for reason, count in dataset.left_out.most_common():
        print(f"  {count} left out: {reason}")
    if dataset.records:
        every = [_examples(encoding, dataset.kind, record, config.max_length) for record in dataset.records]
        print(f"\nfirst record, as the model sees it in {config.max_length} tokens of {config.tokenizer!r}:")
        _show_record(encoding, dataset.records[0], every[0])
        print(f"\n{'tokens':<11}" + "".join(f"{name:>8}" for name in ("min", "50 %", "90 %", "99 %", "max")))
        for name in ("prompt", "response", "chosen", "rejected"):
            _show_lengths(encoding, name, [record[name] for record in dataset.records if name in record])
        _show_fit(dataset, every, config.max_length)
    for bad in dataset.bad:
        print(bad)
    require(not dataset.bad, f"{config.source}: bad lines: {len(dataset.bad)}; correct or remove them")
    require(len(dataset.records) > 0, f"{config.source}: nothing to learn from")
    return dataset


def _examples(encoding: tiktoken.Encoding, kind: data.Kind, record: Record, max_length: int) -> list[Example]:
    """The rows that a record becomes; none where it does not fit."""
    if kind == "prompts":
        ids = encode_prompt(encoding, record["prompt"])
        return [Example(ids[-max_length:], [], cut=max(0, len(ids) - max_length))]
    if kind == "demonstrations":
        return encode_demonstration(encoding, record, max_length=max_length)
    comparison = encode_comparison(encoding, record, max_length=max_length)
    return [] if comparison is None else comparison.examples


def _show_record(encoding: tiktoken.Encoding, record: Record, examples: list[Example]) -> None:
    """Each row in two parts: its prompt, without loss, and its response."""
    if not examples:
        print("  it does not fit: its response is too long")
    row = "row" if any(example.response_ids for example in examples) else "prompt"
    names = ["chosen", "rejected"] if "chosen" in record else [row] * 4
    for name, example in zip(names, examples, strict=False):
        for mark, ids in (("no loss", example.prompt_ids), ("loss", example.response_ids)):
            if ids:
                print(f"  {name:<9}{mark:<8}{len(ids):>5} tokens |{_printable(tokenizer.decode(encoding, ids))}|")


def _printable(text: str) -> str:
    """On one line, with what does not print written out; the middle of a long text is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"


def _show_lengths(encoding: tiktoken.Encoding, name: str, texts: list[str]) -> None:
    """Percentiles of whole texts, before anything is cut."""
    if texts:
        lengths = [len(tokenizer.encode(encoding, text)) + (name != "prompt") for text in texts]  # with their EOS
        quantiles = np.percentile(lengths, (0, 50, 90, 99, 100))
        print(f"  {name:<9}" + "".join(f"{value:>8.0f}" for value in quantiles))


def _show_fit(dataset: data.Dataset, every: list[list[Example]], max_length: int) -> None:
    lost = sum(not examples for examples in every)
    cut = [most for most in (max((e.cut for e in examples), default=0) for examples in every) if most]
    print(f"in {max_length} tokens: {lost} left out (response too long, or its two sides have the same tokens)")
    longest = f", at most {max(cut)} tokens" if cut else ""
    print(f"in {max_length} tokens: {len(cut)} lose the start of their prompt{longest}")
    pieces = sum(map(len, every))
    if dataset.kind == "demonstrations" and pieces > len(every):
        print(f"in {max_length} tokens: texts go on over rows, {pieces} in all")


if __name__ == "__main__":
    if sys.argv[1:2] != ["check"]:
        print("error: write: python -m minirlhf.data check FILE, or check --help", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run_into_a_pipe(main, PRESETS)

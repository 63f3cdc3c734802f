"""How much of what the stages compute is padding, on real dialogues: pairs of helpful and harmless answers.

    MINIRLHF_REAL_DATA=... python benchmarks/padding.py --out results      # seconds

Batches are those of the scripts: the same order of the data, batch sizes and micro-batches of both presets, every file
of pairs (hh-*.jsonl.gz) through the stages' own readers and encoders with GPT-2's tokenizer.

- sft         the chosen answers as demonstrations
- reward, dpo comparisons, the two answers behind their shared prompt
- ppo         prompts with a response each; that of a sampled response is not known here, so it is the chosen
              answer, cut at --max-new-tokens

A computed position is one of the (rows x longest row) of a micro-batch. What packing rows into one another could save
is the share that is padding. `apart` is what the shared prompt saves: positions without padding if every answer had a
row and a prompt of its own, over those without padding as they are.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ours  # noqa: F401  first, because it finds the scripts where they are not installed
import real
import torch

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data, tokenizer
from minirlhf.batch import batch_indices, micro_batches
from minirlhf.encode import encode_comparisons, encode_demonstrations

CONTEXT = 1024  # of GPT-2
PRESETS = {"sft": train_sft.PRESETS, "reward": train_reward.PRESETS, "dpo": train_dpo.PRESETS, "ppo": train_ppo.PRESETS}
TARGET = 0.05


def encoded(folder: Path, limit: int | None) -> dict[str, list[Any]]:
    """Demonstrations and comparisons of all files of dialogues with preferences."""
    encoding = tokenizer.load(folder / "gpt2-tokenizer")
    result: dict[str, list[Any]] = {"demonstrations": [], "comparisons": []}
    for file in sorted((folder / "preference").glob("hh-*.jsonl.gz")):
        part = f"[:{limit}]" if limit else ""
        demonstrations = data.load(file, "demonstrations", split=part)
        pairs = data.load(file, "pairs", split=part)
        result["demonstrations"] += encode_demonstrations(encoding, demonstrations, max_length=CONTEXT)
        result["comparisons"] += encode_comparisons(encoding, pairs, max_length=CONTEXT)
    return result


def lengths_of(stage: str, preset: Any, texts: dict[str, list[Any]]) -> torch.Tensor:
    """Tokens of every row of the stage."""
    if stage in ("reward", "dpo"):
        return torch.tensor([c.length for c in texts["comparisons"]])
    longest = preset.max_new_tokens if stage == "ppo" else CONTEXT
    return torch.tensor([len(e.prompt_ids) + min(len(e.response_ids), longest) for e in texts["demonstrations"]])


def parts_of(stage: str, preset: Any, lengths: torch.Tensor) -> Iterator[torch.Tensor]:
    """The lengths of the rows of every micro-batch of an epoch; PPO's are those of its minibatches."""
    batch = preset.rollout_size // preset.minibatches if stage == "ppo" else preset.batch_size
    for step in range(len(lengths) // batch):
        own = lengths[batch_indices(len(lengths), batch, seed=0, step=step)]
        for part in micro_batches(own, preset.micro_batch_tokens):
            yield own[part]


def measure(stage: str, name: str, texts: dict[str, list[Any]]) -> dict[str, Any]:
    """The share of padding, and micro-batches an optimizer step, of a stage and preset."""
    preset = PRESETS[stage][name]
    lengths = lengths_of(stage, preset, texts)
    parts = list(parts_of(stage, preset, lengths))
    computed = sum(len(part) * int(part.max()) for part in parts)
    needed = sum(int(part.sum()) for part in parts)
    batch = preset.rollout_size // preset.minibatches if stage == "ppo" else preset.batch_size
    apart = 1.0
    if stage in ("reward", "dpo"):
        prompts = sum(len(c.prompt_ids) * (len(c.examples) - 1) for c in texts["comparisons"])
        apart = 1 + prompts / int(lengths.sum())
    return {
        "stage": stage,
        "preset": name,
        "rows": len(lengths),
        "mean_tokens": round(float(lengths.float().mean()), 1),
        "micro_batch_tokens": preset.micro_batch_tokens,
        "micro_batches_a_step": round(len(parts) / (len(lengths) // batch), 1),
        "padding": round(1 - needed / computed, 4),
        "apart": round(apart, 2),
    }


def table(results: list[dict[str, Any]]) -> str:
    names = {"micro_batch_tokens": "micro-batch tokens", "micro_batches_a_step": "micro-batches a step"}
    lines = ["| " + " | ".join(names.get(name, name.replace("_", " ")) for name in results[0]) + " | |"]
    lines.append("| --- " * (len(results[0]) + 1) + "|")
    for r in results:
        shown = {**r, "padding": f"{r['padding']:.1%}"}
        verdict = "" if r["padding"] <= TARGET else f"above {TARGET:.0%}"
        lines.append("| " + " | ".join(map(str, shown.values())) + f" | {verdict} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="records of each file; by default all")
    parser.add_argument("--out", type=Path, help="folder of the results; by default nothing is written")
    given = parser.parse_args(arguments)
    texts = encoded(real.data_folder(), given.limit)
    results = [measure(stage, name, texts) for stage, presets in PRESETS.items() for name in presets]
    print(table(results))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        stem = given.out / f"{datetime.date.today()}-padding"
        whole = {**real.circumstances(), "results": results}
        stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(table(results), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()

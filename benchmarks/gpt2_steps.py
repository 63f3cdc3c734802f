"""Three steps of every stage with the gpt2 preset at its true shape, on two recipes: memory and time of each stage.

    MINIRLHF_REAL_DATA=... python benchmarks/gpt2_steps.py       # 124M parameters, about six CPU minutes, 8.7 GiB
    python benchmarks/gpt2_steps.py --size tiny                  # the same in seconds; what the tests run
    MINIRLHF_REAL_DATA=... python benchmarks/gpt2_steps.py --device cuda --batches preset     # one GPU, bfloat16

The weights are random, so nothing is learned and no loss means anything; shapes, settings and data are real. The stages
are `train_sft.main`, `train_reward.main`, `train_dpo.main` and `train_ppo.main` with their `gpt2` presets. What differs
is said in the results: with `--batches small`, the default, fewer rows a step than the preset has, which suit a CPU.
Recipes: `hh` (pairs of helpful answers; SFT on the chosen ones) and `sentiment` (texts with
ratings; pairs of a better and a worse rated one; PPO's prompts are the first words).

Each stage has a process of its own. Peak memory is its largest resident set, on a GPU what torch allocated at most.
CPU seconds are those of all its threads, reading packages included: what other programs do on the machine lengthens
the seconds far more than these.
Writes <date>-gpt2-steps.json and .md to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
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
from minirlhf.files import write_records
from minirlhf.model import GPT, GPTConfig
from minirlhf.runs.log import read_rows
from minirlhf.runtime import project_file

SHAPES = {  # the released gpt2, and one that CI has time for
    "gpt2": {"n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
    "tiny": {"n_positions": 192, "n_layer": 2, "n_head": 2, "n_embd": 32},
}
STEPS = 3
ROWS = 8  # one is held out; 7 are three batches of three
STAGES: dict[str, tuple[Callable[[Any], Path], Any]] = {
    "sft": (train_sft.main, train_sft.PRESETS["gpt2"]),
    "reward": (train_reward.main, train_reward.PRESETS["gpt2"]),
    "dpo": (train_dpo.main, train_dpo.PRESETS["gpt2"]),
    "ppo": (train_ppo.main, train_ppo.PRESETS["gpt2"]),
}
# What is smaller than in the preset with `--batches small`.
SMALL = {
    "sft": {"batch_size": 3, "micro_batch_tokens": 1024},
    "reward": {"batch_size": 3, "micro_batch_tokens": 1024, "reference_samples": 4, "max_new_tokens": 16},
    "dpo": {"batch_size": 3, "micro_batch_tokens": 1024},
    "ppo": {"rollout_size": 4, "epochs": 1, "micro_batch_tokens": 1024, "max_new_tokens": 16},
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Files of a recipe: demonstrations, comparisons and prompts, each of any known format."""

    demonstrations: Path
    comparisons: Path
    prompts: Path


def hh(source: Path, folder: Path) -> Recipe:
    """One file of pairs is enough: the chosen answers are demonstrations, and its prompts are prompts."""
    return Recipe(*[source / "preference" / "hh-helpful-base.train.jsonl.gz"] * 3)


def sentiment(source: Path, folder: Path) -> Recipe:
    """Texts with ratings; each text is in one pair at most, the better rated one chosen."""
    texts = source / "sentiment" / "movie-snippets-rated.tsv"
    records = data.load(texts, "demonstrations")
    pairs = [sorted(two, key=lambda r: -r["rating"]) for two in zip(records[::2], records[1::2], strict=False)]
    clear = [(better, worse) for better, worse in pairs if better["rating"] > worse["rating"]]
    starts = [" ".join(record["response"].split()[:4]) for record in records]
    write_records(
        folder / "pairs.jsonl",
        [{"prompt": "", "chosen": better["response"], "rejected": worse["response"]} for better, worse in clear],
    )
    write_records(folder / "prompts.jsonl", [{"prompt": start} for start in starts])
    return Recipe(texts, folder / "pairs.jsonl", folder / "prompts.jsonl")


def stand_ins(folder: Path) -> Path:
    """Files of the same names and forms with the world's texts, for a machine without the real ones."""
    path = project_file("world", "demonstrations.train.jsonl")
    records = data.load(path, "demonstrations", split="[:40]")
    pairs = [{"chosen": r["prompt"] + r["response"], "rejected": r["prompt"] + " No."} for r in records]
    write_records(folder / "preference" / "hh-helpful-base.train.jsonl.gz", pairs)  # read by content: not packed
    lines = [f"{i}\t{i % 7 - 3}\t{r['response'].strip()} ({i})\n" for i, r in enumerate(records)]
    (folder / "sentiment").mkdir()
    (folder / "sentiment" / "movie-snippets-rated.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def save_model(folder: Path, shape: dict[str, int], vocabulary: Path | str) -> None:
    """A folder with random weights of the shape, and its tokenizer."""
    encoding = tokenizer.load(vocabulary)
    config = GPTConfig(vocab_size=encoding.n_vocab, eos_token_id=encoding.eot_token, **shape)
    GPT(config, seed=0).save_pretrained(folder)
    tokenizer.save(encoding, folder)


def configurations(recipe: Recipe, run: Path, model: Path, *, batches: str, device: str) -> dict[str, Any]:
    """The preset of every stage, with the recipe's files and what makes it three steps."""
    small = SMALL if batches == "small" else dict.fromkeys(STAGES, {})
    every = {name: {"run": run, "device": device, **small[name]} for name in STAGES}
    every["sft"] |= {"model": str(model), "train": str(recipe.demonstrations)}
    every["reward"] |= {"comparisons": str(recipe.comparisons)}
    every["dpo"] |= {"comparisons": str(recipe.comparisons)}
    every["ppo"] |= {"prompts": str(recipe.prompts), "iterations": STEPS}
    if batches == "small":
        rows = dict.fromkeys(("sft", "reward", "dpo"), f"[:{ROWS}]") | {
            "ppo": f"[:{STEPS * SMALL['ppo']['rollout_size']}]"
        }
    else:  # a tenth is held out of the first three
        sizes = {name: STAGES[name][1].batch_size for name in ("sft", "reward", "dpo")}
        rows = {name: f"[:{round(STEPS * size / 0.9)}]" for name, size in sizes.items()} | {"ppo": ""}
    return {name: dataclasses.replace(preset, **every[name], split=rows[name]) for name, (_, preset) in STAGES.items()}


def measure(target: Callable[..., None], *arguments: object) -> dict[str, Any]:
    """Run `target` in a process of its own; returns its seconds and peak memory."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, target, *arguments))
    process.start()
    theirs.close()
    try:
        result = mine.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{target.__module__}: ended with status {process.exitcode}") from None
    process.join()
    return result


def _measured(pipe: Any, target: Callable[..., None], *arguments: object) -> None:
    started = time.perf_counter()
    target(*arguments)
    gpu = {"peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if torch.cuda.is_available() else {}
    seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    pipe.send(
        {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_gib": round(usage.ru_maxrss / 2**20, 2),  # from kilobytes, Linux's unit
            **gpu,
        }
    )


def run_recipe(name: str, recipe: Recipe, folder: Path, model: Path, *, batches: str, device: str) -> list[dict]:
    """Every stage of a recipe in turn; a stage reads what an earlier one left in the run's folder."""
    results = []
    configs = configurations(recipe, folder / "run", model, batches=batches, device=device)
    for stage, config in configs.items():
        result = measure(STAGES[stage][0], config)
        log = folder / "run" / stage
        times = [json.loads(line) for line in (log / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
        if len(read_rows(log)) != STEPS:
            raise SystemExit(f"{name}, {stage}: {len(read_rows(log))} steps instead of {STEPS}")
        tokens = [round(row["seconds"] * row["tokens_per_second"]) for row in times]
        result |= {"step_seconds": [round(row["seconds"], 2) for row in times], "step_tokens": tokens}
        results.append({"recipe": name, "stage": stage, **result})
        print(json.dumps(results[-1]), flush=True)
        shutil.rmtree(log / "checkpoints")  # of a policy and a value model of this size, 3 GB
    return results


def page(results: list[dict], report: dict[str, Any]) -> str:
    """What was run, in words, then one row a recipe and stage."""
    less = "; ".join(f"{stage}: " + ", ".join(f"{k} {v}" for k, v in SMALL[stage].items()) for stage in SMALL)
    small = report["batches"] == "small"
    lines = [
        f"# The gpt2 preset, {STEPS} steps of every stage",
        "",
        f"Random weights, {report['parameters']:,} parameters, device {report['device']}: memory and time, no quality. "
        + (f"Smaller than in the preset: {less}." if small else "The preset's own batches."),
        "",
        f"`{report['command']}`, {report['processor']}, {report['threads']} thread, other work on the machine, which "
        f"lengthens the seconds far more than the CPU seconds. Python {report['python']}, torch {report['torch']}.",
        "",
        "| recipe | stage | tokens of each step | seconds of each step | seconds in all | CPU seconds | peak GiB |",
        "| --- " * 7 + "|",
    ]
    for r in results:
        tokens, seconds = (", ".join(map(str, r[name])) for name in ("step_tokens", "step_seconds"))
        lines.append(
            f"| {r['recipe']} | {r['stage']} | {tokens} | {seconds} | {r['seconds']:.0f} | {r['cpu_seconds']:.0f} "
            f"| {r.get('peak_gpu_gib', r['peak_gib']):.2f} |"
        )
    return "\n".join(lines) + "\n"


def run_all(size: str, recipes: list[str], *, batches: str, device: str) -> tuple[dict[str, Any], list[dict]]:
    """Every recipe in a temporary folder; returns what was run, and the results."""
    full = size == "gpt2"
    with tempfile.TemporaryDirectory(prefix="gpt2-steps-") as name:
        folder = Path(name)
        source = real.data_folder() if full else stand_ins(folder / "stand-ins")
        save_model(folder / "model", SHAPES[size], source / "gpt2-tokenizer" if full else "world")
        results = []
        for recipe in recipes:
            place = folder / recipe
            place.mkdir()
            files = {"hh": hh, "sentiment": sentiment}[recipe](source, place)
            results += run_recipe(recipe, files, place, folder / "model", batches=batches, device=device)
            shutil.rmtree(place)
        parameters = sum(p.numel() for p in GPT.from_pretrained(folder / "model").parameters())
    settings = {
        "size": size,
        "weights": "random",
        "parameters": parameters,
        "batches": batches,
        "smaller_than_the_preset": SMALL if batches == "small" else {},
        "device": device,
    }
    return settings, results


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description="Three steps of every stage with the gpt2 preset.")
    parser.add_argument("--size", choices=list(SHAPES), default="gpt2")
    parser.add_argument("--batches", choices=["small", "preset"], default="small")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--recipes", nargs="+", choices=["hh", "sentiment"], default=["hh", "sentiment"])
    parser.add_argument("--out", type=Path, help="where the results go (default: results, of --size tiny nowhere)")
    given = parser.parse_args(arguments)
    settings, results = run_all(given.size, given.recipes, batches=given.batches, device=given.device)
    report = {**real.circumstances(**settings), "results": results}
    text = page(results, report)
    out = given.out or (Path(__file__).parent / "results" if given.size == "gpt2" else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if out:
        stem = out / f"{datetime.date.today()}-gpt2-steps"
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return results


if __name__ == "__main__":
    main()

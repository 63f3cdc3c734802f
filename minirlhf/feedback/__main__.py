"""Gather feedback: sample K answers to each prompt from the SFT model and have a simulated person rank them.

    python -m minirlhf.feedback             # after train_sft.py; writes <run>/feedback/rankings.jsonl

With real people or judges it goes in steps, each a command (`--help` after its name tells more):

    python -m minirlhf.feedback collect     # several answers to each prompt
    python -m minirlhf.feedback label       # compare them by hand, in the terminal or on a page
    python -m minirlhf.feedback label --by reward-model     # or simulated, judge-model, endpoint: by machine
    python -m minirlhf.feedback export      # or in Label Studio, and `import` what people chose there
    python -m minirlhf.feedback stats       # what the labels are worth
    python -m minirlhf.feedback pairs       # labels to training data

The simulated labeller knows the embedded world's judge and errs as people do: it prefers the better answer with a
probability that grows with the difference (Boltzmann-rational), and can be made noisier or fond of length.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minirlhf import data
from minirlhf.config import AtLeastTwo, Count, Finite, Fraction, NotNegative, RunConfig, Settings, run_script
from minirlhf.encode import Record, pairs_from_ranks
from minirlhf.feedback import collect, endpoint, label, label_studio, machine, pairs, stats
from minirlhf.files import write_records
from minirlhf.runs.stage import Stage
from minirlhf.runtime import project_file
from minirlhf.world import TEMPERATURE, Labeller, judge


@dataclass
class Config(RunConfig):
    preset: Literal["tiny"] = "tiny"
    """Set of defaults; the simulated labeller knows the embedded world alone."""
    policy: Path | None = None
    """Folder of the model that answers, by default `<run>/sft/model`."""
    prompts: Path = project_file("world", "prompts.train.jsonl")
    """JSONL file of prompts."""
    max_prompts: Count = 4096
    """Use at most this many prompts, from the start of the file."""
    candidates: AtLeastTwo = 4
    """Answers sampled for each prompt; equal ones are kept once."""
    max_new_tokens: Count = 32
    """Length limit of an answer in tokens."""
    temperature: NotNegative = 1.0
    """Sampling temperature; higher gives more varied candidates."""
    labeller_temperature: NotNegative = TEMPERATURE
    """Of the simulated labeller, in units of the judge's score: 0 always prefers the better answer."""
    noise: Fraction = 0.0
    """Probability that the labeller reverses a ranking."""
    length_bias: Finite = 0.0
    """What a word more adds to an answer's score in the labeller's eyes."""


PRESETS = {"tiny": Config()}


def main(config: Config) -> Path:
    """Run the stage; returns the file of rankings."""
    folder = config.policy or config.run / "sft" / "model"
    output = config.run / "feedback" / "rankings.jsonl"
    stage = Stage(config, "feedback", inputs=(config.prompts,), models=(folder,))
    if stage.finished:
        return output
    prompts = [r["prompt"] for r in data.load(config.prompts, "prompts")][: config.max_prompts]
    encoding, sources = collect.load_sources((str(folder),), (config.temperature,), device=config.device)

    with stage.begin(None, steps=1):
        candidates = collect.collect(
            sources,
            encoding,
            prompts,
            count=config.candidates,
            rounds=1,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        labeller = Labeller(config.labeller_temperature, config.noise, config.length_bias, config.seed)
        origin = {"seed": config.seed, "policy": sources[0].digest, "temperature": config.temperature}
        records = []
        for number, sampled in enumerate(candidates):
            record = {name: sampled[name] for name in ("prompt", "responses", "response_ids")}
            ranks = labeller.rank(record["prompt"], record["responses"], key=number)
            records.append({**record, "ranks": ranks, "labeller": "simulated", **origin})
        write_records(output, [r for r in records if len(r["responses"]) >= 2])
        tokens = sum(len(ids) for r in records for ids in r["response_ids"])
        reencoded = sum(collect.reencoded_differently(encoding, r) for r in records)
        stage.finish(0, {**statistics(records), "reencoded_differently": reencoded}, tokens=tokens)
    return output


def statistics(records: list[Record]) -> dict:
    """Counts, and how often the labels agree with the judge on pairs whose judge scores differ."""
    agreed = differing = pairs = 0
    for record in records:
        totals = [judge(record["prompt"], text).total for text in record["responses"]]
        for better, worse in pairs_from_ranks(record["ranks"]):
            pairs += 1
            differing += totals[better] != totals[worse]
            agreed += totals[better] > totals[worse]
    return {
        "prompts": len(records),
        "prompts_with_one_distinct_answer": sum(len(r["responses"]) == 1 for r in records),
        "pairs": pairs,
        "pairs_that_differ": differing,
        "agreement_with_judge": agreed / max(differing, 1),
    }


# Name, then what it runs, its settings, and what --help says first.
COMMANDS: dict[str, tuple[Callable[[Any], object], Settings, str | None]] = {
    "collect": (collect.main, collect.Config(), collect.__doc__),
    "label": (label.main, label.Config(), label.__doc__),
    "label --by simulated": (machine.simulated, machine.Simulated(), machine.simulated.__doc__),
    "label --by reward-model": (machine.reward_model, machine.ByReward(), machine.reward_model.__doc__),
    "label --by judge-model": (machine.judge_model, machine.ByJudge(), machine.judge_model.__doc__),
    "label --by endpoint": (endpoint.main, endpoint.Config(), endpoint.__doc__),
    "export": (label_studio.export_tasks, label_studio.ExportConfig(), label_studio.__doc__),
    "import": (label_studio.import_labels, label_studio.ImportConfig(), label_studio.__doc__),
    "stats": (stats.main, stats.Config(), stats.__doc__),
    "pairs": (pairs.main, pairs.Config(), pairs.__doc__),
    "": (main, PRESETS["tiny"], __doc__),
}


def take_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of a command, `--by NAME` included, and the other arguments; "" where they begin with a flag."""
    if not arguments or arguments[0].startswith("-"):
        return "", arguments
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--by", nargs="?", const="")
    chosen, rest = words.parse_known_args(arguments[1:])
    name = arguments[0] if chosen.by is None else f"{arguments[0]} --by {chosen.by}"
    if name not in COMMANDS:
        alike = [command for command in COMMANDS if command and (" --by " in command) == (" --by " in name)]
        print(f"error: {name}: not one of {', '.join(alike)}", file=sys.stderr)
        sys.exit(2)
    return name, rest


if __name__ == "__main__":
    name, sys.argv[1:] = take_command(sys.argv[1:])
    command, default, text = COMMANDS[name]
    __doc__ = inspect.cleandoc(text or "")
    run_script(command, {"tiny": default})

"""Collect candidates: K different answers to each prompt, from one or several models, at one or several temperatures.

    python -m minirlhf.feedback collect      # after train_sft.py; writes <run>/labels/candidates.jsonl
    python -m minirlhf.feedback collect --policies runs/tiny/sft/model runs/tiny/dpo/model --temperatures 0.7 1.0

Answers are drawn in turn from every (temperature, model), so that with K of at least their number each is among them.
A text that came before is dropped and another one drawn, in at most `--rounds` rounds. One record a prompt:

    prompt, responses, response_ids, sources ("model@temperature"), policies (SHA-256 of the weights), temperatures,
    logprobs (nats, summed over the answer's tokens, of the distribution it was drawn from), seed

Every later step reads this file. Left out: top-p and beam search, whose answers have no log-probability to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tiktoken

from minirlhf import data, tokenizer
from minirlhf.config import AtLeastTwo, Count, NotNegative, Seed, Settings
from minirlhf.encode import Record, encode_prompts
from minirlhf.evaluate.judges import ModelFolder
from minirlhf.feedback.labels import new_file
from minirlhf.files import source_hash, write_records
from minirlhf.generate import SLOTS, Samples, generate
from minirlhf.model import GPT
from minirlhf.runtime import Stream, project_file, require, resolve_device
from minirlhf.tokenizer import response_text


@dataclass
class Config(Settings):
    run: Path = Path("runs/tiny")
    """Folder of the run; writes `<run>/labels/candidates.jsonl`."""
    policies: tuple[str, ...] = ()
    """Folders or hub names of the models that answer, with one tokenizer; by default `<run>/sft/model`."""
    temperatures: tuple[NotNegative, ...] = (0.7, 1.0, 1.3)
    """Sampling temperatures; several give more varied candidates."""
    prompts: str = str(project_file("world", "prompts.train.jsonl"))
    """Prompts: a file of any known format, or a hub name."""
    split: str = ""
    """Part of `prompts`, e.g. [:100]."""
    max_prompts: Count = 200
    """Use at most this many prompts, from the start."""
    candidates: AtLeastTwo = 4
    """Different answers to collect for each prompt."""
    rounds: Count = 3
    """Draws of so many answers at most; a prompt with enough different ones is not asked again."""
    max_new_tokens: Count = 32
    """Length limit of an answer in tokens."""
    output: Path | None = None
    """File to write, by default `<run>/labels/candidates.jsonl`; an existing one is never overwritten."""
    seed: Seed = 0
    """Seed of the answers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to sample; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class Source:
    """A model at a temperature. `name` is "model@temperature", `digest` the SHA-256 of its weights."""

    name: str
    policy: GPT
    digest: str
    temperature: float


def main(config: Config) -> Path:
    """Collect the candidates; returns the file."""
    output = new_file(config.output or config.run / "labels" / "candidates.jsonl")
    require(len(config.temperatures) > 0, "--temperatures: give at least one")
    policies = config.policies or (str(config.run / "sft" / "model"),)
    encoding, sources = load_sources(policies, config.temperatures, device=config.device)
    prompts = [r["prompt"] for r in data.load(config.prompts, "prompts", split=config.split)][: config.max_prompts]
    every = collect(
        sources,
        encoding,
        prompts,
        count=config.candidates,
        rounds=config.rounds,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    records = [record for record in every if len(record["responses"]) >= 2]
    require(len(records) > 0, "every prompt got the same answer each time; raise --temperatures or --rounds")
    write_records(output, records)
    full = sum(len(record["responses"]) == config.candidates for record in records)
    print(f"{output}: {len(records)} prompts, {full} with {config.candidates} different answers")
    if len(records) < len(every):
        print(f"{len(every) - len(records)} prompts with a single distinct answer left out")
    return output


def load_sources(
    policies: Sequence[str], temperatures: Sequence[float], *, device: str
) -> tuple[tiktoken.Encoding, list[Source]]:
    """The tokenizer, and every model at every temperature; neighbours are different models."""
    folders = [ModelFolder.find(policy, GPT, flag="--policies") for policy in policies]
    encoding = folders[0].encoding
    for policy, folder in zip(policies, folders, strict=True):
        same = tokenizer.same_ids(folder.encoding, encoding)
        require(same, f"{policy}: has another tokenizer than {policies[0]}; collect from each by itself")
    models = [(folder.load(GPT, resolve_device(device)), source_hash(folder.path)) for folder in folders]
    return encoding, [
        Source(f"{policy}@{temperature:g}", model, digest, temperature)
        for temperature in temperatures
        for policy, (model, digest) in zip(policies, models, strict=True)
    ]


def collect(
    sources: Sequence[Source],
    encoding: tiktoken.Encoding,
    prompts: Sequence[str],
    *,
    count: int,
    rounds: int,
    max_new_tokens: int,
    seed: int,
) -> list[Record]:
    """A record a prompt with at most `count` answers, no two the same text; see the head of this file.

    Draw n of a prompt comes from source n mod S, in the stream of (seed, prompt, n): a record depends on no other
    prompt. A prompt is asked for as many answers as it lacks, until it has them or `rounds` times `count` are drawn.
    Of equal texts the first draw counts. Later stages train on `response_ids`, the ids as they were sampled (EOS
    included where the model wrote it): a model may write a word in other pieces than the tokenizer would.
    """
    room = min(source.policy.config.n_positions for source in sources) - max_new_tokens
    ids = encode_prompts(encoding, prompts, max_length=room)
    answers: list[dict[str, dict[str, Any]]] = [{} for _ in prompts]  # of each prompt, by their texts
    draws = [0] * len(prompts)
    while True:
        wanted = [min(count - len(texts), rounds * count - n) for texts, n in zip(answers, draws, strict=True)]
        rows = [(i, draws[i] + k) for i in range(len(prompts)) for k in range(wanted[i])]
        if not rows:
            return [_record(prompt, texts, seed) for prompt, texts in zip(prompts, answers, strict=True)]
        drawn: dict[tuple[int, int], dict[str, Any]] = {}
        for place, source in enumerate(sources):
            asked = [(i, n) for i, n in rows if n % len(sources) == place]
            if asked:
                samples = generate(
                    source.policy,
                    [ids[i] for i, _ in asked],
                    max_new_tokens=max_new_tokens,
                    eos_id=encoding.eot_token,
                    temperature=source.temperature,
                    seed=seed,
                    keys=[(Stream.FEEDBACK, i, n) for i, n in asked],
                    slots=SLOTS,
                )
                drawn |= zip(asked, _answers(source, samples), strict=True)
        for i, n in rows:
            answers[i].setdefault(response_text(encoding, drawn[i, n]["response_ids"]), drawn[i, n])
        draws = [n + more for n, more in zip(draws, wanted, strict=True)]


def _answers(source: Source, samples: Samples) -> list[dict[str, Any]]:
    """The part of a record about each answer."""
    origin = {"sources": source.name, "policies": source.digest, "temperatures": source.temperature}
    logprobs = samples.logprobs.cpu().double().sum(dim=1).tolist()
    both = zip(samples.response_ids(), logprobs, strict=True)
    return [{"response_ids": ids, **origin, "logprobs": round(logprob, 4)} for ids, logprob in both]


def _record(prompt: str, answers: dict[str, dict[str, Any]], seed: int) -> Record:
    names = next(iter(answers.values()))
    columns = {name: [answer[name] for answer in answers.values()] for name in names}
    return {"prompt": prompt, "responses": list(answers), **columns, "seed": seed}


def reencoded_differently(encoding: tiktoken.Encoding, record: Record) -> int:
    """Number of a record's responses that the tokenizer would encode to other ids than were sampled."""
    return sum(
        [i for i in ids if i != encoding.eot_token] != tokenizer.encode(encoding, text)
        for text, ids in zip(record["responses"], record["response_ids"], strict=True)
    )

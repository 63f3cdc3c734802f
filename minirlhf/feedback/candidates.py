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
from minirlhf.config import Count, NotNegative, Seed, Settings
from minirlhf.data.formats import text_of
from minirlhf.encode import Record, encode_prompts
from minirlhf.feedback import lines
from minirlhf.feedback.collect import SLOTS
from minirlhf.files import source_hash, write_records
from minirlhf.generate import generate
from minirlhf.hf.hub import model_folder
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
    candidates: Count = 4
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


PRESETS = {"collect": Config()}


@dataclass(frozen=True)
class Source:
    """A model at a temperature. `name` is "model@temperature", `digest` the SHA-256 of its weights."""

    name: str
    policy: GPT
    digest: str
    temperature: float


@dataclass(frozen=True)
class Candidates:
    """Responses to one prompt that can be compared; ids and sources where they are known."""

    prompt: str
    responses: tuple[str, ...]
    response_ids: tuple[list[int], ...] | None = None
    sources: tuple[str, ...] | None = None


def read_candidates(path: Path) -> list[Candidates]:
    """The candidates in a file that `collect` or the simulated labeller wrote; raises UserError with file:line."""
    return lines.read_lines(path, _parse)


def _parse(row: lines.Row) -> Candidates:
    prompt, responses = text_of(row, "prompt"), lines.responses_of(row)
    sources = lines.texts_of(row, "sources", count=len(responses)) if "sources" in row else None
    return Candidates(prompt, responses, lines.response_ids_of(row, len(responses)), sources)


def main(config: Config) -> Path:
    """Collect the candidates; returns the file."""
    output = config.output or config.run / "labels" / "candidates.jsonl"
    require(not output.exists(), f"{output}: exists already; give another --output, or move it away")
    require(config.candidates >= 2, f"--candidates {config.candidates}: a comparison needs at least 2")
    require(config.rounds >= 1, f"--rounds {config.rounds}: at least 1 is needed")
    require(len(config.temperatures) > 0, "--temperatures: give at least one")
    encoding, sources = load_sources(config)
    prompts = [r["prompt"] for r in data.load(config.prompts, "prompts", split=config.split)][: config.max_prompts]
    records = sample_candidates(
        sources,
        encoding,
        prompts,
        count=config.candidates,
        rounds=config.rounds,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    kept = [record for record in records if len(record["responses"]) >= 2]
    require(len(kept) > 0, "every prompt got the same answer each time; raise --temperatures or --rounds")
    write_records(output, kept)
    full = sum(len(record["responses"]) == config.candidates for record in kept)
    print(f"{output}: {len(kept)} prompts, {full} with {config.candidates} different answers")
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} prompts with a single distinct answer left out")
    return output


def load_sources(config: Config) -> tuple[tiktoken.Encoding, list[Source]]:
    """The tokenizer, and every model at every temperature; neighbours are different models."""
    device = resolve_device(config.device)
    policies = config.policies or (str(config.run / "sft" / "model"),)
    folders = [model_folder(policy) for policy in policies]
    encodings = [tokenizer.load(folder) for folder in folders]
    for policy, encoding in zip(policies, encodings, strict=True):
        same = _vocabulary(encoding) == _vocabulary(encodings[0])
        require(same, f"{policy}: has another tokenizer than {policies[0]}; collect from each by itself")
    models = [GPT.from_pretrained(folder).to(device).eval().requires_grad_(False) for folder in folders]
    for folder, encoding, model in zip(folders, encodings, models, strict=True):
        tokenizer.check_fits(encoding, model.config.vocab_size, folder)
    sources = [
        Source(f"{policy}@{temperature:g}", model, source_hash(folder), temperature)
        for temperature in config.temperatures
        for policy, folder, model in zip(policies, folders, models, strict=True)
    ]
    return encodings[0], sources


def sample_candidates(
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
    prompt. Of equal texts the first draw is kept.
    """
    room = sources[0].policy.config.n_positions - max_new_tokens
    ids = encode_prompts(encoding, prompts, max_length=room)
    drawn: list[dict[str, dict[str, Any]]] = [{} for _ in prompts]
    for n in range(rounds * count):
        lacking = [i for i in range(len(prompts)) if len(drawn[i]) < count]
        if not lacking:
            break
        keys: list[tuple[int, ...]] = [(Stream.FEEDBACK, i, n) for i in lacking]
        rows = [ids[i] for i in lacking]
        answers = _draw(sources[n % len(sources)], encoding, rows, keys, max_new_tokens=max_new_tokens, seed=seed)
        for i, answer in zip(lacking, answers, strict=True):
            drawn[i].setdefault(response_text(encoding, answer["response_ids"]), answer)
    return [_record(prompt, answers, seed) for prompt, answers in zip(prompts, drawn, strict=True)]


def _draw(
    source: Source,
    encoding: tiktoken.Encoding,
    prompts: list[list[int]],
    keys: list[tuple[int, ...]],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One answer to each prompt, with what is kept of it."""
    samples = generate(
        source.policy,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_id=encoding.eot_token,
        temperature=source.temperature,
        seed=seed,
        keys=keys,
        slots=SLOTS,
    )
    logprobs = samples.logprobs.cpu().double().sum(dim=1).tolist()
    origin = {"sources": source.name, "policies": source.digest, "temperatures": source.temperature}
    return [
        {"response_ids": ids, **origin, "logprobs": round(logprob, 4)}
        for ids, logprob in zip(samples.response_ids(), logprobs, strict=True)
    ]


def _record(prompt: str, answers: dict[str, dict[str, Any]], seed: int) -> Record:
    names = next(iter(answers.values()))
    columns = {name: [answer[name] for answer in answers.values()] for name in names}
    return {"prompt": prompt, "responses": list(answers), **columns, "seed": seed}


def _vocabulary(encoding: tiktoken.Encoding) -> dict[bytes, int]:
    return {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}

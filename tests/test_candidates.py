"""Collecting candidates from several models at several temperatures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from tiny import ENCODING, EOS

from minirlhf import tokenizer
from minirlhf.encode import encode_prompt
from minirlhf.feedback import collect as command
from minirlhf.feedback.collect import Source, collect
from minirlhf.feedback.labels import read_candidates
from minirlhf.files import file_hash, write_records
from minirlhf.generate import generate
from minirlhf.model import GPT, GPTConfig
from minirlhf.runtime import Stream, UserError
from minirlhf.tokenizer import response_text

SETTINGS = {"max_new_tokens": 6, "seed": 5}


def sources() -> list[Source]:
    models = {name: GPT.from_pretrained(tiny.finished_run() / name / "model") for name in ("sft", "dpo")}
    return [Source(f"{name}@{t:g}", models[name], name, t) for t in (0.7, 1.5) for name in ("sft", "dpo")]


def test_answers_come_in_turn_from_every_source_without_duplicates() -> None:
    """Against the definition: draw n from source n mod 4 in the stream of its key, the first of equal texts kept."""
    prompts, made = tiny.PROMPTS[:12], sources()
    records = collect(made, ENCODING, prompts, count=3, rounds=2, **SETTINGS)
    refilled = set()
    for i, (prompt, record) in enumerate(zip(prompts, records, strict=True)):
        distinct: dict[str, tuple] = {}
        for n in range(6):
            source, ids = made[n % 4], [encode_prompt(ENCODING, prompt)]
            keys = [(Stream.FEEDBACK, i, n)]
            sample = generate(source.policy, ids, eos_id=EOS, temperature=source.temperature, keys=keys, **SETTINGS)
            (answer,) = sample.response_ids()
            logprob = source.policy.logprobs(sample.tokens, sample.mask, temperature=source.temperature).sum().item()
            if len(distinct) < 3:
                refilled |= {i} if n > 2 else set()
                distinct.setdefault(response_text(ENCODING, answer), (answer, source, logprob))
        assert record["prompt"] == prompt and record["seed"] == 5
        assert record["responses"] == list(distinct)
        assert record["response_ids"] == [answer for answer, _, _ in distinct.values()]
        assert record["sources"] == [source.name for _, source, _ in distinct.values()]
        assert record["policies"] == [source.digest for _, source, _ in distinct.values()]
        assert record["temperatures"] == [source.temperature for _, source, _ in distinct.values()]
        assert record["logprobs"] == pytest.approx([x for *_, x in distinct.values()], abs=6e-5)  # 4 decimals are kept
    assert refilled and refilled != set(range(len(refilled))), "some duplicate was replaced, after a prompt without one"


def test_a_prompts_answers_depend_on_no_other_prompts_duplicates() -> None:
    made = sources()
    several = collect(made, ENCODING, tiny.PROMPTS[:4], count=3, rounds=3, **SETTINGS)
    assert collect(made, ENCODING, tiny.PROMPTS[:1], count=3, rounds=3, **SETTINGS) == several[:1]


def config(run: Path, **changes: object) -> command.Config:
    base = command.Config(run=run, prompts=str(run / "train.jsonl"), max_new_tokens=6, device="cpu")
    return replace(base, **changes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "dpo")


def test_the_command_keeps_where_answers_come_from(run: Path, capsys: pytest.CaptureFixture) -> None:
    policies = tuple(str(run / name / "model") for name in ("sft", "dpo"))
    file = command.main(config(run, policies=policies, temperatures=(0.7, 1.5), max_prompts=7, split="[2:]"))
    assert file == run / "labels" / "candidates.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["prompt"] for r in records] == tiny.PROMPTS[2:9]
    hashes = {policy: file_hash(Path(policy) / "model.safetensors") for policy in policies}
    for record in records:
        assert 2 <= len(set(record["responses"])) == len(record["responses"]) <= 4
        for source, policy, temperature in zip(
            record["sources"], record["policies"], record["temperatures"], strict=True
        ):
            name, _, at = source.rpartition("@")
            assert policy == hashes[name] and float(at) == temperature
    assert {s for r in records for s in r["sources"]} == {f"{p}@{t}" for p in policies for t in (0.7, 1.5)}
    assert [c.responses for c in read_candidates(file)] == [tuple(r["responses"]) for r in records]
    assert "7 prompts" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        command.main(config(run))


def test_prompts_with_a_single_answer_are_left_out_and_said(run: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="the same answer each time; raise --temperatures or --rounds"):
        command.main(config(run, temperatures=(0.0,)))
    assert not (run / "labels").exists()
    command.main(config(run, temperatures=(0.0, 0.3), candidates=2, rounds=1))
    kept = len(read_candidates(run / "labels" / "candidates.jsonl"))
    assert 0 < kept < 20 and f"{20 - kept} prompts with a single distinct answer left out" in capsys.readouterr().out


def test_models_with_other_tokenizers_are_refused(run: Path) -> None:
    other = run / "other"
    spelled = tokenizer.load("bytes")
    size = {"n_positions": 96, "n_layer": 1, "n_head": 1, "n_embd": 4}
    GPT(GPTConfig(vocab_size=spelled.n_vocab, **size)).save_pretrained(other)
    tokenizer.save(spelled, other)
    with pytest.raises(UserError, match="other: has another tokenizer"):
        command.main(config(run, policies=(str(run / "sft" / "model"), str(other))))


def test_prompts_too_long_for_the_model_are_cut(run: Path, capsys: pytest.CaptureFixture) -> None:
    write_records(run / "long.jsonl", [{"prompt": f"\n\nHuman: {'lion ' * 200}?\n\nAssistant:"}])
    (record,) = read_candidates(command.main(config(run, prompts=str(run / "long.jsonl"), temperatures=(1.5,))))
    assert len(record.responses) >= 2 and "lost the start of their prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, words",
    [({"candidates": 1}, "--candidates 1"), ({"rounds": 0}, "--rounds 0"), ({"temperatures": ()}, "--temperatures")],
)
def test_settings_out_of_range(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        command.main(config(tmp_path, **changes))


def test_the_real_prompts(real_data: Path, run: Path) -> None:
    prompts = str(real_data / "prompts" / "oasst-en-prompts.jsonl")
    file = command.main(config(run, prompts=prompts, split="[:8]", temperatures=(1.5,), candidates=2))
    assert all(c.prompt.startswith("\n\nHuman: ") for c in read_candidates(file))

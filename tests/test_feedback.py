"""Candidates from a policy, and their rankings by the simulated labeller."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny import ENCODING, EOS

from minirlhf import data, world
from minirlhf.batch import Example, pad
from minirlhf.config import run_script
from minirlhf.encode import encode_prompt
from minirlhf.feedback import __main__ as feedback
from minirlhf.feedback import collect as collecting
from minirlhf.feedback.collect import Source, collect, reencoded_differently
from minirlhf.files import file_hash
from minirlhf.generate import Samples, generate
from minirlhf.model import GPT
from minirlhf.runs.log import read_rows
from minirlhf.runtime import Stream, UserError
from minirlhf.tokenizer import response_text
from minirlhf.world import Labeller
from minirlhf.world.zoo import dialogue


def sft() -> GPT:
    return GPT.from_pretrained(tiny.finished_run() / "sft" / "model")


def source(policy: GPT, temperature: float) -> Source:
    return Source("", policy, "", temperature)


def test_candidates_are_those_of_each_prompts_own_streams() -> None:
    settings = {"count": 3, "rounds": 1, "max_new_tokens": 6, "seed": 5}
    records = collect([source(sft(), 0.7)], ENCODING, tiny.PROMPTS[:4], **settings)
    for i, record in enumerate(records):
        alone = generate(
            sft(),
            [encode_prompt(ENCODING, tiny.PROMPTS[i])] * 3,
            max_new_tokens=6,
            eos_id=EOS,
            temperature=0.7,
            seed=5,
            keys=[(Stream.FEEDBACK, i, k) for k in range(3)],
        )
        distinct = {response_text(ENCODING, ids): ids for ids in reversed(alone.response_ids())}
        assert record["prompt"] == tiny.PROMPTS[i]
        assert sorted(record["responses"]) == sorted(distinct)
        assert record["response_ids"] == [distinct[text] for text in record["responses"]]


def test_equal_texts_are_kept_once_with_the_ids_that_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    (yes,) = ENCODING.encode_ordinary(" Yes")
    pieces = [ENCODING.encode_single_token(bytes([byte])) for byte in b" Yes"]
    sampled = [[*pieces, EOS], [yes, EOS], [yes], [yes, yes], [yes, EOS], [yes, EOS], [yes, EOS], [yes]]
    batch = pad([Example([1], ids) for ids in sampled])
    samples = Samples(batch.tokens, batch.prompt_lengths, batch.lengths, torch.zeros(8, 5), torch.zeros(8) > 0)
    monkeypatch.setattr(collecting, "generate", lambda *args, **kwargs: samples)
    settings = {"count": 4, "rounds": 1, "max_new_tokens": 9, "seed": 0}
    first, second = collect([source(sft(), 1.0)], ENCODING, ["a", "b"], **settings)
    assert first["responses"] == [" Yes", " Yes Yes"] and first["response_ids"] == [[*pieces, EOS], [yes, yes]]
    assert second["responses"] == [" Yes"] and second["response_ids"] == [[yes, EOS]]
    assert reencoded_differently(ENCODING, first) == 1 and reencoded_differently(ENCODING, second) == 0


def test_the_text_of_a_response_has_no_eos() -> None:
    ids = ENCODING.encode_ordinary(" The lion.")
    assert response_text(ENCODING, [*ids, EOS]) == response_text(ENCODING, ids) == " The lion."


@pytest.mark.parametrize(
    "settings",
    [
        {"labeller_temperature": 0.5, "length_bias": 0.1},
        {"labeller_temperature": 0.0, "noise": 0.5, "length_bias": -0.2, "seed": 11, "temperature": 0.6},
    ],
)
def test_rankings_are_those_of_the_labeller_with_these_settings(settings: dict, tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft")
    config = replace(tiny.feedback_config(run), **settings)
    file = feedback.main(config)
    assert file == run / "feedback" / "rankings.jsonl"
    labeller = Labeller(
        temperature=config.labeller_temperature,
        noise=config.noise,
        length_bias=config.length_bias,
        seed=config.seed,
    )
    candidates = collect(
        [source(sft(), config.temperature)],
        ENCODING,
        tiny.PROMPTS[: config.max_prompts],
        count=3,
        rounds=1,
        max_new_tokens=tiny.LONGEST,
        seed=config.seed,
    )
    written = iter(data.load(file, "pairs"))
    for number, expected in enumerate(candidates):
        if len(expected["responses"]) > 1:
            record = next(written)
            assert all(record[name] == expected[name] for name in ("prompt", "responses", "response_ids"))
            assert record["ranks"] == labeller.rank(record["prompt"], record["responses"], key=number)
            assert record["seed"] == config.seed and record["temperature"] == config.temperature
            assert record["policy"] == file_hash(run / "sft" / "model" / "model.safetensors")
            assert record["labeller"] == "simulated"
    assert next(written, None) is None
    (row,) = read_rows(run / "feedback")
    assert row["prompts"] == config.max_prompts
    assert row["prompts_with_one_distinct_answer"] == sum(len(c["responses"]) == 1 for c in candidates)


def test_a_policy_may_be_named_and_greedy_answers_make_no_ranking(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path)
    policy = tiny.finished_run() / "dpo" / "model"
    feedback.main(replace(tiny.feedback_config(run), policy=policy, temperature=0.0))
    assert (run / "feedback" / "rankings.jsonl").read_bytes() == b""
    (row,) = read_rows(run / "feedback")
    assert row["prompts_with_one_distinct_answer"] == row["prompts"] == 18 and row["pairs"] == 0


def test_agreement_with_the_judge_by_hand() -> None:
    """Good scores 1 and wrong is worse; an empty claim of another animal makes a third level."""
    prompt = dialogue("What does the lion eat?")
    good, wrong = world.ideal(prompt), " I do not know."
    assert world.judge(prompt, good).total > world.judge(prompt, wrong).total
    same = " I do not know what the lion eats."
    assert world.judge(prompt, wrong).total == world.judge(prompt, same).total
    records = [
        {"prompt": prompt, "responses": [good, wrong, same], "ranks": [0, 1, 2]},  # 3 pairs, 2 that differ, both right
        {"prompt": prompt, "responses": [good, wrong], "ranks": [1, 0]},  # the label is wrong
        {"prompt": prompt, "responses": [good, wrong], "ranks": [0, 0]},  # a tie is no pair
        {"prompt": prompt, "responses": [good], "ranks": [0]},
    ]
    assert feedback.statistics(records) == {
        "prompts": 4,
        "prompts_with_one_distinct_answer": 1,
        "pairs": 4,
        "pairs_that_differ": 3,
        "agreement_with_judge": 2 / 3,
    }


def test_a_comparison_needs_two_candidates(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft")
    with pytest.raises(UserError, match="at least 2"):
        feedback.main(replace(tiny.feedback_config(run), candidates=1))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft")
    flags = ["--run", str(run), "--prompts", str(run / "prompts.jsonl"), "--candidates", "2", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["feedback", *flags, "--seed", "4", "--device", "cpu"])
    run_script(feedback.main, feedback.PRESETS)
    records = data.load(run / "feedback" / "rankings.jsonl", "pairs")
    assert records and all(len(r["responses"]) == 2 and r["seed"] == 4 for r in records)
    description = json.loads((run / "feedback" / "run.json").read_text())
    assert description["inputs"] == {str(run / "prompts.jsonl"): file_hash(run / "prompts.jsonl")}

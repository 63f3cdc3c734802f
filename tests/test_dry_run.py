"""`--dry-run` says what a run does, takes about as much memory as it says, reads no weights and writes nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_bad_commands import tree
from torch.profiler import ProfilerActivity, profile

import train_sft
from minirlhf import online_dpo, tokenizer
from minirlhf.config import run_script
from minirlhf.hf import folder
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.runs import plan
from minirlhf.runs.plan import Plan, activations, parameters
from minirlhf.runtime import UserError

NAMES = ("sft", "reward", "ppo", "dpo")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("dry"), "sft", "feedback", "reward")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECONDS", 1e-4)


def no_weights(patch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    patch.setattr(folder, "safe_open", loaded)
    patch.setattr(GPT, "_initialise", loaded)
    for kind in (GPT, RewardModel):
        patch.setattr(kind, "from_pretrained", loaded)


def planned(patch: pytest.MonkeyPatch, work: Callable[[], object]) -> tuple[Plan, int]:
    """The plan that a stage shows, and the bytes that it says."""
    with patch.context() as inner:
        seen = tiny.spy(inner, plan, "memory_bytes")
        work()
    (call,) = seen
    return call.arguments["plan"], call.result


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_is_done_and_changes_nothing(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = tree(run)
    with monkeypatch.context() as patch:
        no_weights(patch)
        plan, _ = planned(patch, lambda: tiny.run_stage(name, run, dry_run=True))
    assert tree(run) == before
    out, said = capsys.readouterr()
    assert said == "" and "nothing is written" in out

    done = tiny.finished_run() / name
    rows = [json.loads(line) for line in (done / "timing.jsonl").read_text().splitlines()]
    tokens = sum(row["seconds"] * row["tokens_per_second"] for row in rows)
    assert plan.steps == len(rows) and f"steps       {plan.steps:,} of" in out
    if name == "ppo":  # what is sampled is at most as long as its limit
        config = tiny.ppo_config(run)
        assert 1.0 <= plan.learned / (config.epochs * tokens) < 1.5
    else:
        whole_epochs = 0.02 if name == "sft" else 1e-6  # its last epoch is cut, and may have the longer rows
        assert plan.learned == pytest.approx(tokens, rel=whole_epochs)
    trained = sum(map(parameters, plan.trained))
    assert f"{trained:,} in training" in out and re.search(r"memory      about [\d.]+ GiB on cpu", out)
    assert re.search(r"time        about \d\d:\d\d with matrix products at [\d,]+ GFLOP/s", out)


def test_parameters_are_those_of_the_model() -> None:
    for tied in (True, False):
        shape = GPTConfig(vocab_size=11, n_positions=8, n_layer=2, n_head=2, n_embd=8, tie_word_embeddings=tied)
        weights = dict(GPT(shape).named_parameters())
        assert parameters(shape) == sum(w.numel() for w in weights.values())
        assert parameters(shape, positions=False) == parameters(shape) - weights["wpe.weight"].numel()


def test_a_new_run_gets_no_folder(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line on, to the exit; what does not fit is named."""
    new = tmp_path / "new" / "run"
    line = f"--run {new} --train {run}/train.jsonl --validation {run}/validation.jsonl --batch-size 8 --device cpu"
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *line.split(), "--dry-run"])
    run_script(train_sft.main, train_sft.PRESETS)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_named(run: Path, capsys: pytest.CaptureFixture) -> None:
    tiny.run_stage("sft", run, n_positions=6, dry_run=True)
    out = capsys.readouterr().out
    assert re.search(r"demonstrations: \d+ of 20 lost the start of their prompt to fit 6 tokens", out)
    assert re.search(r"demonstrations: \d+ of 20 left out", out)


def test_a_run_that_goes_on_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "feedback", "dpo")
    (run / "dpo" / "stage.json").write_text('{"finished": false}')
    before = tree(run)
    tiny.run_stage("dpo", run, resume=True, dry_run=True)
    assert tree(run) == before and "nothing is written" in capsys.readouterr().out


def test_a_mistake_is_found_by_a_dry_run(run: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 21: larger than the 20"):
        tiny.run_stage("sft", run, batch_size=21, dry_run=True)


def test_responses_to_a_prompt_count_each(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = planned(monkeypatch, lambda: tiny.run_stage("ppo", run, dry_run=True, iterations=5))
    settings = {"advantages": "rloo", "group_size": 2, "gamma": 1.0}
    two, _ = planned(monkeypatch, lambda: tiny.run_stage("ppo", run, dry_run=True, iterations=5, **settings))
    # Of 10 prompts, 6 and 4 in turn: 2.5 epochs; 3, 3, 3 and 1 in turn, twice each: 5/4 of an epoch, twice.
    assert one.learned == 2.5 * 2 * sum(one.rows) and two.learned == 1.25 * 2 * 2 * sum(two.rows)
    assert len(one.trained) == 2 and len(two.trained) == 1  # no value model


def test_online_dpo_samples_two_answers_to_each_prompt(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, before = replace(tiny.online_dpo_config(run), rollout_size=7, iterations=6), tree(run)
    with monkeypatch.context() as patch:
        no_weights(patch)
        plan, _ = planned(patch, lambda: online_dpo.main(replace(config, dry_run=True)))
    assert tree(run) == before and "nothing is written" in capsys.readouterr().out
    prompts = [len(tiny.ENCODING.encode(prompt)) for prompt in tiny.PROMPTS]
    assert sorted(plan.rows) == sorted(n + config.max_new_tokens for n in prompts)
    # 20 prompts, 7, 7 and 6 in turn: 6 iterations go through them twice, with two answers each time, `epochs` times
    assert plan.steps == 6 and plan.learned == 2 * 2 * config.epochs * sum(plan.rows)
    assert len(plan.trained) == 1 and len(plan.frozen) == 2
    mean = sum(plan.rows) / len(plan.rows)
    assert plan.scored == pytest.approx(3 * 6 * 14 * mean)  # sampled, and read by reference and reward model


# -------------------------------------------------------------------------------------------------------------- memory
def peak(work: Callable[[], object]) -> int:
    """The most bytes of tensors that were held at a time, beyond those from before, as torch's allocator counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


SHAPE = {"n_layer": 4, "n_embd": 128, "n_head": 4}
WIDE = SHAPE | {"epochs": 2.0, "batch_size": 20}


def wide_models(folder: Path) -> dict[str, str]:
    """A policy and a reward model of that width, as settings of PPO."""
    gpt = GPT(GPTConfig(vocab_size=tiny.ENCODING.n_vocab, n_positions=96, eos_token_id=tiny.EOS, **SHAPE))
    gpt.save_pretrained(folder / "policy")
    RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(0)).save_pretrained(folder / "reward-model")
    for name in ("policy", "reward-model"):
        tokenizer.save(tiny.ENCODING, folder / name)
    return {"policy": str(folder / "policy"), "reward_model": str(folder / "reward-model")}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sft", WIDE | {"micro_batch_tokens": 2048}),  # half of it activations
        ("sft", WIDE | {"micro_batch_tokens": 2048, "gradient_checkpointing": True}),
        ("ppo", {"iterations": 1, "micro_batch_tokens": 2048}),  # four models
    ],
)
def test_memory_is_about_what_is_said(
    name: str, changes: dict[str, object], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, config = tiny.STAGES[name]
    own = tiny.copy_of(run, tmp_path)
    settings = replace(config(own), **changes, **(wide_models(tmp_path) if name == "ppo" else {}))
    _, said = planned(monkeypatch, lambda: main(replace(settings, dry_run=True)))
    # At most that much, because not everything is held at the same moment; and not twice as much as there is.
    assert 0.5 < peak(lambda: main(settings)) / said < 1.0


def test_half_types_keep_less_and_checkpointing_least() -> None:
    shape = GPTConfig(vocab_size=11, n_positions=8, n_layer=12, n_head=2, n_embd=8)
    whole, half = (activations(shape, 100, dtype, checkpointed=False) for dtype in (torch.float32, torch.bfloat16))
    assert (whole, half) == (64 * 100 * 12 * 8, 38 * 100 * 12 * 8)  # as in docs/using.md
    assert activations(shape, 100, torch.float32, checkpointed=True) == 4 * 100 * 12 * 8 + 64 * 100 * 8

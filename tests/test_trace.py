"""The judge's marks while PPO trains: measured when they should be, right, without effect, the same after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import train_ppo
from minirlhf import data
from minirlhf.evaluate import trace
from minirlhf.evaluate.trace import Trace
from minirlhf.files import read_records
from minirlhf.model import GPT
from minirlhf.runtime import project_file
from minirlhf.tokenizer import response_text
from minirlhf.world import judge

FEW = 5  # prompts


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "PROMPTS", FEW)


def base(folder: Path) -> Path:
    return tiny.copy_of(tiny.finished_run(), folder, "sft", "reward")


def test_it_measures_before_the_first_every_nth_and_after_the_last_and_changes_nothing(tmp_path: Path) -> None:
    run = base(tmp_path / "run")
    tiny.run_stage("ppo", run, trace_every=2)
    rows = read_records(run / "ppo" / "trace.jsonl")
    assert [row["iteration"] for row in rows] == [0, 2, 3]
    assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[-1]["kl"])  # float32 against itself, recomputed by another forward
    assert all(len(row["marks"]) == FEW for row in rows)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (run / "ppo" / name).read_bytes() == (tiny.finished_run() / "ppo" / name).read_bytes()


def test_no_trace_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert train_ppo.Config().trace_every == 0
    assert not (tiny.finished_run() / "ppo" / "trace.jsonl").exists()


def test_a_measurement_is_what_judge_and_reward_say_of_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.finished_run()
    reference = GPT.from_pretrained(run / "sft" / "model").eval()
    policy = GPT.from_pretrained(run / "ppo" / "model").eval()
    collected = tiny.spy(monkeypatch, trace, "collect")
    config = train_ppo.Config(run=tmp_path, seed=1, max_new_tokens=6, temperature=0.8, trace_every=1)
    row = Trace(config).measure(policy, reference, lambda batch: batch.lengths.float(), tiny.ENCODING)

    (rollout,) = [call.result for call in collected]
    prompts = data.load(project_file("world", "prompts.validation.jsonl"), "prompts")[:FEW]
    assert [tiny.ENCODING.decode(ids) for ids, _ in tiny.prompt_and_response(rollout)] == [p["prompt"] for p in prompts]
    marks, kl = [], 0.0
    for prompt, (ids, response) in zip(prompts, tiny.prompt_and_response(rollout), strict=True):
        marks.append(judge(prompt["prompt"], response_text(tiny.ENCODING, response)))
        kl += tiny.response_logprobs(policy, ids, response, 0.8).sum().item()
        kl -= tiny.response_logprobs(reference, ids, response, 0.8).sum().item()
    assert row["marks"] == pytest.approx([m.total for m in marks], abs=1e-6)  # six decimals are kept
    assert row["judge"] == pytest.approx(sum(m.total for m in marks) / FEW)
    for part in ("helpful", "honest", "harmless"):
        assert row[part] == pytest.approx(sum(getattr(m, part) for m in marks) / FEW)
    assert row["kl"] == pytest.approx(kl / FEW, rel=1e-4)  # float32 sums against float64
    assert row["reward"] == rollout.lengths.float().mean().item()
    assert row["length"] == pytest.approx((rollout.lengths - rollout.prompt_lengths).float().mean().item())


@pytest.mark.parametrize("measured", [True, False])
def test_a_stopped_run_has_the_trace_of_one_that_was_never_stopped(measured: bool, tmp_path: Path) -> None:
    whole, stopped = base(tmp_path / "whole"), base(tmp_path / "stopped")
    tiny.run_stage("ppo", whole, trace_every=1, checkpoint_every=1)

    class Stop(Exception):
        pass

    def stop(state: train_ppo.State, *_: object) -> None:
        if state.iteration == 2:
            raise Stop

    config = tiny.ppo_config(stopped)
    config.trace_every, config.checkpoint_every = 1, 1
    with pytest.raises(Stop):
        train_ppo.main(config, observe=stop)
    path = stopped / "ppo" / "trace.jsonl"
    if not measured:  # as if it had been stopped between the checkpoint and the measurement
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    config.resume = True
    train_ppo.main(config)
    assert [row["iteration"] for row in read_records(path)] == [0, 1, 2, 3]
    assert path.read_text() == (whole / "ppo" / "trace.jsonl").read_text()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_in_place(tmp_path: Path) -> None:
    run = base(tmp_path / "run")
    (run / "ppo").mkdir()
    for name in ("run.json", "metrics.jsonl", "timing.jsonl", "trace.jsonl"):
        (run / "ppo" / name).write_text("")
    tiny.run_stage("ppo", run, trace_every=3, resume=True)
    assert [row["iteration"] for row in read_records(run / "ppo" / "trace.jsonl")] == [0, 3]
    assert not (run / "ppo.1").exists() and torch.is_grad_enabled()

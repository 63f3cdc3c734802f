"""The ablation study: each switch changes what it says and nothing else, and the tables are made from the results."""

from __future__ import annotations

import copy
import csv
import json
import sys
import typing
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))
import ablate
from ablate import AS_TRAINED, DETAILS
from ablation_report import CURVES, HELD_OUT, WHOLE, changed, interval, report, table

import train_ppo
from minirlhf import ops, ppo
from minirlhf.evaluate.statistics import bootstrap_interval
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.rollout import Experience
from minirlhf.runtime import UserError

SMALL = {"iterations": 2, "rollout_size": 6, "learning_rate": 1e-2, "prompts": 5, "every": 1}


# -------------------------------------------------------------------------------------------------------- the switches
def test_each_detail_is_one_setting_of_ppo_and_every_detail_can_be_named() -> None:
    whole = train_ppo.Config()
    for name, changes in DETAILS.items():
        other = train_ppo.Config(**changes)
        differing = [f.name for f in fields(whole) if getattr(whole, f.name) != getattr(other, f.name)]
        assert differing == list(changes) and len(changes) == 1, name
        own = name.replace("-", "_")
        assert not hasattr(whole, own) or differing == [own]
    assert len({field for changes in DETAILS.values() for field in changes}) == len(DETAILS)
    kind = typing.get_args(typing.get_type_hints(ablate.Config)["details"])[0]
    named = [name for literal in typing.get_args(kind) for name in typing.get_args(literal)]
    assert tuple(named) == tuple(DETAILS) == ablate.Config().details


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A stage without whitening and with constant rates: the end of its iterations and its optimizer steps."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("ppo"), "sft", "reward")
    with pytest.MonkeyPatch.context() as patch:
        calls = tiny.spy(patch, train_ppo, "end_iteration")
        optimizers = ("policy_optimizer", "value_optimizer")
        updates = tiny.spy(
            patch,
            train_ppo,
            "train_step",
            before=lambda arguments: [tiny.learning_rates(getattr(arguments["state"], name)) for name in optimizers],
        )
        off = {"whiten_advantages": False, "schedule": "constant", "adam_eps": 3e-7}
        tiny.run_stage("ppo", run, **off)
    return SimpleNamespace(calls=calls, updates=updates)


def test_without_whitening_the_advantages_are_those_of_gae(learned: SimpleNamespace) -> None:
    rollout: Experience = learned.calls[0].arguments["experience"]
    mask = rollout.mask
    rewards = ppo.kl_penalised_rewards(rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask, beta=0.2)
    advantages, returns = ppo.gae(rewards, rollout.values, mask, gamma=0.99, lam=0.9)
    torch.testing.assert_close(rollout.advantages, advantages)
    torch.testing.assert_close(rollout.returns, returns)
    assert abs(ops.masked_mean(advantages, mask)) > 0.01  # whitened they would be others


def test_the_rates_rise_over_the_warm_up_and_then_follow_their_schedule() -> None:
    """Over two of six iterations: a half, the whole, then in equal steps to 0 at the end, or no further change."""
    for schedule, factors in (("linear", [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]), ("constant", [1 / 2, 1, 1, 1, 1, 1])):
        assert rates_of(iterations=6, warmup_iterations=2, schedule=schedule) == factors
    assert rates_of(iterations=4) == [1, 3 / 4, 1 / 2, 1 / 4]


def rates_of(**settings: Any) -> list[float]:
    """The policy's learning rate in each iteration, of a peak of 1; the value model's is twice as large throughout."""
    config = train_ppo.Config(learning_rate=1.0, value_learning_rate=2.0, **settings)
    policy, values = (torch.optim.SGD([torch.zeros(1)], lr=9.0) for _ in range(2))
    state, rates = train_ppo.State(None, None, policy, values, None), []
    for state.iteration in range(config.iterations):
        train_ppo.set_learning_rates(state, config)
        (rate,), (other,) = tiny.learning_rates(policy), tiny.learning_rates(values)
        assert other == 2 * rate
        rates.append(rate)
    return rates


def test_a_constant_schedule_leaves_both_rates_and_the_epsilon_reaches_both_optimizers(
    learned: SimpleNamespace,
) -> None:
    assert [update.before for update in learned.updates] == [[[1e-2] * 2, [2e-2] * 2]] * 12
    state = learned.updates[-1].arguments["state"]
    for optimizer in (state.policy_optimizer, state.value_optimizer):
        assert {group["eps"] for group in optimizer.param_groups} == {3e-7}


@pytest.mark.parametrize("switch", ["clip", "value_clip"])
def test_without_a_clip_its_loss_is_the_plain_one_and_the_other_stays(switch: str, learned: SimpleNamespace) -> None:
    state, e = (copy.deepcopy(learned.calls[0].arguments[name]) for name in ("state", "experience"))
    mask = e.mask
    e.old_logprobs = e.old_logprobs - 0.7 * mask  # so far that the clips act at most tokens
    e.values = e.values + 0.9 * mask
    config = tiny.ppo_config(Path())

    clipped, plain = (
        train_ppo.train_step(copy.deepcopy(state), e, c, beta=0.2, max_tokens=1000)
        for c in (config, replace(config, **{switch: None}))
    )
    assert clipped["clip_fraction"] > 0 and clipped["value_clip_fraction"] > 0
    logprobs = state.policy.logprobs(e.tokens, mask, temperature=config.temperature)
    ratio = (logprobs - e.old_logprobs).exp()
    values = state.value_model(e.tokens, mask)
    expected = {
        "clip": ("policy_loss", "clip_fraction", -(e.advantages * ratio)[mask].mean()),
        "value_clip": ("value_loss", "value_clip_fraction", 0.5 * (values - e.returns)[mask].square().mean()),
    }
    loss, fraction, value = expected.pop(switch)
    torch.testing.assert_close(plain[loss], value.detach())
    assert abs(plain[loss] - clipped[loss]) > 1e-3 and plain[fraction] == 0
    for name in expected.popitem()[1][:2]:
        assert plain[name] == clipped[name]


@pytest.mark.parametrize("start", ["reward-model", "policy"])
def test_the_value_model_starts_from_what_was_named(start: str) -> None:
    run = tiny.finished_run()
    policy = GPT.from_pretrained(run / "sft" / "model")
    reward_model = RewardModel.from_pretrained(run / "reward" / "model")
    config = replace(tiny.ppo_config(run), value_init=start)
    trunk = train_ppo.initial_state(config, policy, [reward_model]).value_model.gpt
    origin = {"reward-model": reward_model.gpt, "policy": policy}[start]
    names = [name for name in tiny.weights(trunk) if name != "lm_head.weight"]
    assert all(torch.equal(tiny.weights(trunk)[name], tiny.weights(origin)[name]) for name in names)
    assert not torch.equal(policy.wte.weight, reward_model.gpt.wte.weight)
    assert trunk.wte.weight.data_ptr() != origin.wte.weight.data_ptr()


def test_a_reward_model_gives_again_the_scores_that_it_was_trained_to_give(tmp_path: Path) -> None:
    run = tiny.finished_run()
    folder, before = ablate.unnormalised(run, tmp_path / "model")
    assert before == json.loads((run / "reward" / "normalisation.json").read_text())["before"]
    batch = (torch.randint(0, 100, (9, 12), generator=torch.Generator().manual_seed(0)), torch.arange(3, 12))
    with torch.no_grad():
        normalised = RewardModel.from_pretrained(run / "reward" / "model")(*batch)
        trained = RewardModel.from_pretrained(folder)(*batch)
    assert abs(before["std"] - 1) > 0.1  # else this says nothing
    # The weights were rounded to float32 twice more, and the sum over the channels carries that along.
    torch.testing.assert_close(trained, normalised * before["std"] + before["mean"], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="normalisation.json: no such file"):
        ablate.unnormalised(tmp_path, tmp_path / "other")


# ----------------------------------------------------------------------------------------------------------- the study
def config_of(work: Path, **changes: Any) -> ablate.Config:
    return replace(
        ablate.PRESETS["smoke"], runs=(tiny.finished_run(),), work=work, out=work, details=("kl",), **SMALL, **changes
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The recipe and one detail, run in their own process."""
    config = config_of(tmp_path_factory.mktemp("study"))
    return SimpleNamespace(config=config, done=ablate.main(config))


def test_a_study_writes_tables_curves_and_a_figure(study: SimpleNamespace) -> None:
    done, out = study.done, study.config.out
    (page,), (figure,), (curves,) = (list(out.glob(f"*-ablations.{kind}")) for kind in ("md", "png", "csv"))
    assert table(done) in page.read_text() and figure.stat().st_size > 1000
    with curves.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["without"], r["seed"], r["iteration"]) for r in rows] == [
        (name, "0", i) for name in (WHOLE, "kl") for i in ("1", "2")
    ]
    for row in rows:
        found = done[row["without"]][0]
        index = int(row["iteration"]) - 1
        for name in CURVES:
            assert float(row[name]) == pytest.approx(found["curves"][name][index], rel=1e-4)
        assert float(row["held_out_judge"]) == pytest.approx(found["held_out"][index + 1]["judge"], rel=1e-4)


def test_figures_of_a_trial(study: SimpleNamespace) -> None:
    whole, without = study.done[WHOLE][0], study.done["kl"][0]
    for found in (whole, without):
        assert list(found["held_out"]) == [0, 1, 2] and found["held_out"][0]["win_rate"] == 0.5
        assert abs(found["held_out"][0]["kl"]) < 1e-3  # the SFT model itself
        assert all(len(found["end"][name]) == 5 for name in HELD_OUT) and len(found["answers"]) == 5
        for name in HELD_OUT:
            assert found["held_out"][2][name] == pytest.approx(np.mean(found["end"][name]))
    assert whole["held_out"][0] == without["held_out"][0]
    start = ablate.HeldOut(study.config.runs[0], 5, 0)
    before = start.measured(start.sft)["total"].round(4)  # as the marks are kept
    after = np.array(whole["end"]["judge"])
    assert whole["end"]["win_rate"] == ((after > before) + 0.5 * (after == before)).tolist() != [0.5] * 5
    assert whole["curves"]["score"][0] == without["curves"]["score"][0]  # the first rollout is of one policy
    runs = [json.loads((study.config.work / f"{name}-seed-0" / "ppo" / "run.json").read_text()) for name in study.done]
    configs = [run["config"] for run in runs]
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} == {"run", "beta"}
    assert [c["beta"] for c in configs] == [0.1, 0.0] and configs[0]["iterations"] == 2


def test_what_is_finished_is_read_back_and_rows_without_results_are_left_out(
    study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "learn", None)
    more = replace(study.config, details=("kl", "epochs"), seeds=(0, 1), minutes=1e-9)
    again = ablate.main(more)
    assert {name: list(figures) for name, figures in again.items()} == {WHOLE: [0], "kl": [0]}
    assert table(again) == table(study.done)


def test_without_the_normalisation_the_score_is_logged_in_the_same_unit(tmp_path: Path) -> None:
    settings = {**SMALL, "iterations": 1, "run": str(tiny.finished_run()), "seed": 0}
    every = {"missing_eos_score": None}  # that score is in the unit of the reward
    folders = [tmp_path / name for name in ("whole", "raw")]
    for folder in folders:
        folder.mkdir()
    whole = ablate.learn(folders[0], {**settings, "changes": every})
    raw = ablate.learn(folders[1], {**settings, "changes": {"reward_model": AS_TRAINED, **every}})
    assert raw["curves"]["score"] == pytest.approx(whole["curves"]["score"], abs=1e-4)  # rounded weights, as above
    assert raw["curves"]["value_grad_norm"] != pytest.approx(whole["curves"]["value_grad_norm"], rel=0.1)
    row = json.loads((folders[1] / "ppo" / "metrics.jsonl").read_text())
    assert row["score"] != pytest.approx(whole["curves"]["score"][0], abs=0.01)


def test_trials_go_seed_by_seed_and_each_seed_has_its_run(tmp_path: Path) -> None:
    runs = []
    for i in range(3):
        runs.append(tmp_path / f"seed-{i}")
        for stage in ("sft", "reward"):
            (runs[-1] / stage / "model").mkdir(parents=True)
    config = ablate.Config(runs=tuple(runs), seeds=(0, 2), details=("adam-eps",))
    found = [(t.name, t.settings["run"], t.settings["seed"], t.settings["changes"]) for t in ablate.study(config)]
    assert found == [
        (f"{name}-seed-{seed}", str(runs[seed]), seed, changes)
        for seed in (0, 2)
        for name, changes in ((WHOLE, {}), ("adam-eps", {"adam_eps": 1e-8}))
    ]
    alone = ablate.study(replace(config, runs=(runs[1],)))
    assert {t.settings["run"] for t in alone} == {str(runs[1])}
    with pytest.raises(UserError, match="--seeds 2: --runs has 2, of seed 0 to 1"):
        ablate.study(replace(config, runs=tuple(runs[:2])))
    with pytest.raises(UserError, match="--seeds: give at least one"):
        ablate.study(replace(config, seeds=()))
    (runs[2] / "reward" / "model").rmdir()
    with pytest.raises(UserError, match="seed-2: no reward/model; run `python -m minirlhf --run .*seed-2` first"):
        ablate.study(config)


# ---------------------------------------------------------------------------------------------------------- the tables
def figures(judge: list[float], *, win: float = 0.5, **curves: float) -> dict[str, Any]:
    """A finished trial: the judge's mark of each prompt, and curves that stay at a number."""
    end = {"judge": judge, "win_rate": [win] * len(judge), **{name: [2.0] * len(judge) for name in HELD_OUT[2:]}}
    means = {name: float(np.mean(values)) for name, values in end.items()}
    constant = {name: [curves.get(name, 1.0)] * 2 for name in CURVES}
    return {"curves": constant, "held_out": {"0": means, "2": means}, "end": end, "answers": []}


def test_the_table_pairs_by_seed_and_prompt() -> None:
    # Seed 0: 1.0 and 0.0 against 0.5 and -0.5; seed 1: all 0.75 against 0.5. Differences 0.5 and 0.25, mean 0.375.
    done = {
        WHOLE: {0: figures([0.5, -0.5]), 1: figures([0.5, 0.5])},
        "kl": {0: figures([1.0, 0.0], win=0.75), 1: figures([0.75, 0.75], win=0.25)},
    }
    _, _, whole, without = table(done).splitlines()
    cells = [cell.strip() for cell in without.strip("|").split("|")]
    assert cells[:2] == ["kl", "0.625"]
    assert cells[3:] == ["+0.375", "+0.25 to +0.50", "+0.50, +0.25", "50%", "25% to 75%", "2.00", "2.00", "2.00"]
    assert [cell.strip() for cell in whole.strip("|").split("|")][:6:3] == [WHOLE, ""]
    only = table({"kl": done["kl"]}).splitlines()[-1]
    assert [cell.strip() for cell in only.strip("|").split("|")][3:6] == [""] * 3


def test_the_interval_is_over_seeds_and_prompts() -> None:
    marks = np.random.default_rng(0).normal(size=30)
    assert interval(np.tile(marks, (3, 1))) == pytest.approx(bootstrap_interval(marks, seed=0))
    # Seeds alone differ: 0 and 1, drawn twice, give 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4.
    assert interval(np.array([[0.0] * 4, [1.0] * 4])) == (0.0, 1.0)


def test_a_curve_is_named_where_every_seed_moved_it_the_same_way() -> None:
    done = {
        WHOLE: {0: figures([0.0], entropy=2.0), 1: figures([0.0])},
        "kl": {
            0: figures([0.0], entropy=0.5, kl=1.3, clip_fraction=1.3, eos_rate=1.2),
            1: figures([0.0], entropy=0.5, kl=1.5, clip_fraction=0.5, eos_rate=9.0),
        },
    }
    assert changed(done, "kl") == ["kl 1 to 1.4", "entropy 1.5 to 0.5"]
    page = report(done, "the command")
    assert "- kl: kl 1 to 1.4; entropy 1.5 to 0.5" in page and "the command" in page
    assert "| kl | 1 | 0.9 | 1 | 1 | 0.5 |" in page  # means over iterations and seeds
    assert "judge 0.00, reward 2.00, length 2.00" in page

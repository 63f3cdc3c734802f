"""Advantages without a value model: arithmetic by hand, slow definitions, laws, and exact expected gradients.

The expected gradients are enumerated. A policy of 3 tokens writes responses of at most 2, so all 7 responses and all
groups of K of them can be gone through with their probabilities, and compared with the derivative of the objective.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import half_law, normal
from torch import Tensor

import train_ppo
import train_sft
from minirlhf import ppo
from minirlhf.batch import Example, pad
from minirlhf.grpo import RunningBaseline, grpo, grpo_no_std, kl_loss, per_token, reinforce, rloo
from minirlhf.model import GPT
from minirlhf.optim import adamw
from minirlhf.rollout import Rollout
from minirlhf.runs import checkpoint
from minirlhf.runs.log import read_rows
from minirlhf.runtime import Stream, UserError

GROUPED = {"rloo": rloo, "grpo": grpo, "grpo-no-std": grpo_no_std}
every_estimator = pytest.mark.parametrize("name", GROUPED)


def doubles(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------- by hand and by a loop
def test_by_hand() -> None:
    rewards, groups = doubles([1, 5, 3, 5, 2]), torch.tensor([7, 4, 7, 4, 4])  # {1, 3} and {5, 5, 2}
    # The others' means: of 1 it is 3, of 3 it is 1; of each 5 it is 3.5, of 2 it is 5.
    torch.testing.assert_close(rloo(rewards, groups), doubles([-2, 1.5, 2, 1.5, -3]))
    # The groups' means are 2 and 4.
    torch.testing.assert_close(grpo_no_std(rewards, groups), doubles([-1, 1, 1, 1, -2]))
    # Their variances are 1 and (1 + 1 + 4) / 3 = 2; the eps of 1e-8 is below the default tolerance.
    root = math.sqrt(2)
    expected = doubles([-1, 1 / root, 1, 1 / root, -2 / root])
    torch.testing.assert_close(grpo(rewards, groups), expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(reinforce(rewards, baseline=2.0), doubles([-1, 3, 1, 3, 0]))


def slow(name: str, rewards: list[float], groups: list[int]) -> Tensor:
    """The definitions, one response at a time."""
    result = []
    for i, r in enumerate(rewards):
        mine = [rewards[j] for j in range(len(rewards)) if groups[j] == groups[i]]
        others = [rewards[j] for j in range(len(rewards)) if groups[j] == groups[i] and j != i]
        mean = sum(mine) / len(mine)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in mine) / len(mine) + 1e-8)
        result.append({"rloo": r - sum(others) / len(others), "grpo": (r - mean) / deviation}.get(name, r - mean))
    return doubles(result)


@st.composite
def grouped_rewards(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Groups of 2 to 5 with numbers of their own, their rows in any order."""
    labels = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
    rows = [(label, draw(st.integers(-8, 8)) / 4) for label in labels for _ in range(draw(st.integers(2, 5)))]
    rows = draw(st.permutations(rows))
    return [reward for _, reward in rows], [label for label, _ in rows]


@every_estimator
@given(case=grouped_rewards())
def test_the_definition_and_the_laws(name: str, case: tuple[list[float], list[int]]) -> None:
    rewards, groups = doubles(case[0]), torch.tensor(case[1])
    advantages = GROUPED[name](rewards, groups)
    torch.testing.assert_close(advantages, slow(name, *case))
    for group in groups.unique():
        torch.testing.assert_close(advantages[groups == group].sum(), doubles(0.0), atol=1e-6, rtol=0)  # grpo's eps
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(len(rewards)))
    torch.testing.assert_close(GROUPED[name](rewards[order], groups[order]), advantages[order])
    renamed = 1000 - 3 * groups
    torch.testing.assert_close(GROUPED[name](rewards, renamed), advantages)
    shifted = rewards + 10.0 * groups  # what is common to the responses to a prompt says nothing
    torch.testing.assert_close(GROUPED[name](shifted, groups), advantages, atol=1e-6, rtol=1e-6)  # 1e3 - 1e3


@given(case=grouped_rewards())
def test_leave_one_out_baselines(case: tuple[list[float], list[int]]) -> None:
    """Advantages sum to 0 in a group, hence baselines sum to the rewards; no baseline holds its own reward."""
    rewards, groups = doubles(case[0]), torch.tensor(case[1])
    baselines = rewards - rloo(rewards, groups)
    changed = rewards.clone()
    changed[0] += 7.0
    after = changed - rloo(changed, groups)
    torch.testing.assert_close(after[0], baselines[0])
    same = groups == groups[0]
    torch.testing.assert_close(baselines[same].sum(), rewards[same].sum())
    size = same.sum()
    torch.testing.assert_close(grpo_no_std(rewards, groups)[same], rloo(rewards, groups)[same] * (size - 1) / size)


@every_estimator
def test_float32_with_large_rewards_and_equal_ones(name: str) -> None:
    groups = torch.tensor([0, 1, 0, 1])
    near = GROUPED[name](torch.tensor([1000.0, 5.0, 1001.0, 5.0]), groups)
    assert near.dtype == torch.float32 and not near.requires_grad
    assert near[0] == -near[2] != 0 and near[1] == near[3] == 0


def test_grpo_does_not_see_the_scale_of_rewards() -> None:
    rewards, groups = doubles([1.0, 4.0, 2.0]), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(grpo(50 * rewards, groups), grpo(rewards, groups), atol=1e-7, rtol=1e-7)  # eps


@every_estimator
def test_a_group_of_one_and_wrong_shapes_are_refused(name: str) -> None:
    estimator = GROUPED[name]
    with pytest.raises(ValueError, match="a group has one response"):
        estimator(torch.zeros(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="shape"):
        estimator(torch.zeros(3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="shape"):
        estimator(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="integers"):
        estimator(torch.zeros(2), torch.zeros(2))


EVERY: dict[str, Callable[[Tensor], Tensor]] = {
    "rloo": lambda x: rloo(x, torch.tensor([0, 1, 0, 1])),
    "grpo": lambda x: grpo(x, torch.tensor([0, 1, 0, 1])),
    "grpo-no-std": lambda x: grpo_no_std(x, torch.tensor([0, 1, 0, 1])),
    "reinforce": lambda x: reinforce(x, baseline=0.3),
    "per token": lambda x: per_token(x, torch.ones(4, 2, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", EVERY)
def test_half_types_are_computed_in_float32_and_nothing_carries_a_gradient(name: str) -> None:
    half_law(EVERY[name], [9 * normal(4, seed=0)])
    assert not EVERY[name](normal(4, seed=1).requires_grad_()).requires_grad


def test_per_token_is_0_off_the_mask_whatever_stands_in_a_row() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    spread = per_token(torch.tensor([2.0, -1.0, math.nan]), mask)
    assert spread.tolist() == [[0, 2, 2], [-1, 0, 0], [0, 0, 0]]
    with pytest.raises(TypeError):
        per_token(torch.zeros(3), mask.float())


def test_the_running_baseline() -> None:
    baseline = RunningBaseline(decay=0.5)
    assert baseline.value == 0
    for reward, expected in ((4.0, 4.0), (1.0, (0.5 * 4 + 1) / 1.5), (0.0, (0.25 * 4 + 0.5 * 1) / 1.75)):
        baseline.update(reward)
        assert baseline.value == pytest.approx(expected, rel=1e-12)
    last = RunningBaseline(decay=0.0)
    last.update(3.0)
    last.update(5.0)
    assert last.value == 5
    mean = RunningBaseline(decay=1.0)
    for reward in (1.0, 2.0, 6.0):
        mean.update(reward)
    assert mean.value == pytest.approx(3, rel=1e-12)
    for decay in (-0.5, 1.5):
        with pytest.raises(ValueError, match="decay"):
            RunningBaseline(decay=decay)
    with pytest.raises(ValueError, match="shape"):
        reinforce(torch.zeros(2, 2), baseline=0.0)


# -------------------------------------------------------------------------------------------- exact expected gradients
EOS, BETA = 2, 0.3
RESPONSES = [[EOS], *([first, second] for first in range(2) for second in range(3))]
REWARDS = doubles([0.2, 1.5, -0.7, 0.4, 2.0, 0.0, -1.1])
MASK = torch.tensor([[True, len(ids) > 1] for ids in RESPONSES])


def logits(seed: int) -> Tensor:
    """(3, 3): of the first token, and of the second after first token 0 and 1."""
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()


def logprobs_of(theta: Tensor) -> Tensor:
    """(7, 2) log-probabilities of the tokens of every response; nan in the padding."""
    table = theta.log_softmax(-1)
    rows = [[table[0, ids[0]], table[1 + ids[0], ids[1]] if len(ids) > 1 else doubles(math.nan)] for ids in RESPONSES]
    return torch.stack([torch.stack(row) for row in rows])


def sequence_logprobs(theta: Tensor) -> Tensor:
    return torch.where(MASK, logprobs_of(theta), 0.0).sum(1)


def exact_gradient(theta: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Of E_pi[r] - beta KL(pi || ref) over whole responses."""
    logp, ref = sequence_logprobs(theta), sequence_logprobs(reference).detach()
    objective = (logp.exp() * (REWARDS - beta * (logp - ref))).sum()
    return torch.autograd.grad(objective, theta)[0]


def expected_gradient(
    theta: Tensor, reference: Tensor, k: int, estimate: Callable[[Tensor], Tensor], beta: float
) -> Tensor:
    """The mean of the ascent direction over all groups of k responses, by the functions that the stage uses."""
    old, ref = logprobs_of(theta).detach(), logprobs_of(reference).detach()
    probabilities = sequence_logprobs(theta).exp().detach()
    total = torch.zeros(())
    for group in itertools.product(range(len(RESPONSES)), repeat=k):
        rows = torch.tensor(group)
        mask = MASK[rows]
        rewards = ppo.kl_penalised_rewards(REWARDS[rows], old[rows], ref[rows], mask, beta=beta).sum(1)
        advantages = per_token(estimate(rewards), mask)
        logprobs = logprobs_of(theta)[rows]
        loss = ppo.policy_loss(logprobs, old[rows], advantages, mask, clip=0.2, denominator=k)
        total = total + probabilities[rows].prod() * loss
    return -torch.autograd.grad(total, theta)[0]


def of_one_group(estimator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda rewards: estimator(rewards, torch.zeros(len(rewards), dtype=torch.long))


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_rloo_has_the_exact_expected_gradient(k: int, beta: float) -> None:
    theta, reference = logits(0), logits(1)
    exact = exact_gradient(theta, reference, beta)
    torch.testing.assert_close(expected_gradient(theta, reference, k, of_one_group(rloo), beta), exact)
    without = expected_gradient(theta, reference, k, of_one_group(grpo_no_std), beta)
    torch.testing.assert_close(without, exact * (k - 1) / k)


@pytest.mark.parametrize("baseline", [0.0, 1.7, -30.0])
def test_reinforce_has_the_exact_expected_gradient_with_any_baseline(baseline: float) -> None:
    theta, reference = logits(2), logits(3)
    found = expected_gradient(theta, reference, 1, lambda r: reinforce(r, baseline=baseline), BETA)
    torch.testing.assert_close(found, exact_gradient(theta, reference, BETA), atol=1e-9, rtol=1e-6)


def test_the_division_of_grpo_weighs_the_gradient() -> None:
    """Of rewards 0 and 1 it is c(p) grad p, c(p) = E[A | right] - E[A | wrong] over the other K - 1 answers."""
    theta, k = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True), 4
    logp = theta.log_softmax(0)
    p = logp[0].exp().item()
    total = torch.zeros(())
    for group in itertools.product((0, 1), repeat=k):
        rewards = doubles([1.0 - choice for choice in group])
        chosen = logp[list(group)]
        total = total + chosen.sum().exp().detach() * (of_one_group(grpo)(rewards) * chosen).mean()
    weight = 0.0
    for right in range(k):  # of the other k - 1
        chance = math.comb(k - 1, right) * p**right * (1 - p) ** (k - 1 - right)
        for mine, sign in ((1, 1), (0, -1)):
            mean = (right + mine) / k
            if 0 < mean < 1:
                weight += sign * chance * (mine - mean) / math.sqrt(mean * (1 - mean) + 1e-8)
    of_p = torch.autograd.grad(logp[0].exp(), theta, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total, theta)[0], weight * of_p)
    assert weight == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=0.3)  # which it is for many responses


# --------------------------------------------------------------------------------------------------- the KL in the loss
def kl_gradients(theta: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of KL(pi || ref) and KL(ref || pi) of one distribution over three tokens."""
    p, q = theta.log_softmax(0), reference.log_softmax(0).detach()
    forward, reverse = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    return torch.autograd.grad(forward, theta, retain_graph=True)[0], torch.autograd.grad(reverse, theta)[0]


def test_what_the_estimators_are_the_gradient_of() -> None:
    theta, reference = logits(4)[0].detach().requires_grad_(), logits(5)[0].detach()
    p, q = theta.log_softmax(0), reference.log_softmax(0)
    weights = p.exp().detach()
    towards, away = kl_gradients(theta, reference)
    every = torch.ones(1, 1, dtype=torch.bool)

    def expected(kind: str) -> Tensor:
        terms = [kl_loss(p[i].view(1, 1), q[i].view(1, 1), every, estimator=kind) for i in range(3)]
        return torch.autograd.grad((weights * torch.stack(terms)).sum(), theta, retain_graph=True)[0]

    torch.testing.assert_close(expected("k2"), towards)
    torch.testing.assert_close(expected("k3"), away)
    assert not torch.allclose(towards, away, rtol=0.1)
    k1 = torch.autograd.grad((weights * (p - q)).sum(), theta, retain_graph=True)[0]
    torch.testing.assert_close(k1, torch.zeros(3, dtype=torch.float64))
    in_reward = torch.autograd.grad((weights * (p - q).detach() * p).sum(), theta)[0]  # what k1 in the reward descends
    torch.testing.assert_close(in_reward, towards)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_padding_reaches_neither_the_kl_nor_its_gradient(kind: str) -> None:
    mask = torch.tensor([[True, True, False], [False, True, False]])
    clean = doubles([[-1.0, -2.0, 0.0], [0.0, -0.5, 0.0]])
    ref = doubles([[-1.5, -1.0, 0.0], [0.0, -0.7, 0.0]])
    results = []
    for junk in (0.0, math.nan, -math.inf, 1e4):
        logprobs = torch.where(mask, clean, junk).requires_grad_()
        reference = torch.where(mask, ref, -junk).requires_grad_()
        loss = kl_loss(logprobs, reference, mask, estimator=kind)
        loss.backward()
        assert reference.grad is None
        results.append((loss.detach(), logprobs.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    # log-ratios 0.5, -1, 0.2: k2 is their squares' half, k3 is exp(-x) - 1 + x; over 3 tokens.
    ratios = (0.5, -1.0, 0.2)
    by_hand = {"k2": sum(x * x / 2 for x in ratios) / 3, "k3": sum(math.exp(-x) - 1 + x for x in ratios) / 3}
    assert results[0][0].item() == pytest.approx(by_hand[kind], rel=1e-12)
    parts = [kl_loss(clean[i : i + 1], ref[i : i + 1], mask[i : i + 1], estimator=kind, denominator=3) for i in (0, 1)]
    torch.testing.assert_close(sum(parts), results[0][0])


def test_k1_in_the_loss_and_wrong_masks_are_refused() -> None:
    one, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="no gradient in expectation"):
        kl_loss(one, one, mask, estimator="k1")
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(1, 2\) but mask has shape \(2, 2\)"):
        kl_loss(one.expand(2, 2), one, mask.expand(2, 2), estimator="k2")
    with pytest.raises(TypeError, match="bool mask"):
        kl_loss(one, one, mask.long(), estimator="k2")


# -------------------------------------------------------------------------------------------------------- in the stage
PAIRS = {"group_size": 2, "gamma": 1.0}
SETTINGS = {
    "rloo": {"advantages": "rloo", **PAIRS},
    "grpo": {"advantages": "grpo", "kl_in": "loss", "kl_estimator": "k3", **PAIRS},
    "grpo-no-std": {"advantages": "grpo-no-std", "kl_in": "loss", **PAIRS},
    "reinforce": {"advantages": "reinforce", "gamma": 1.0},
}


@pytest.fixture(scope="module", autouse=True)
def finished() -> None:
    """The small run is there before a test looks into a stage."""
    tiny.finished_run()


def stage(folder: Path, **changes: Any) -> Path:
    """The PPO stage of the finished small run, again, in a run of its own; its folder."""
    run = tiny.copy_of(tiny.finished_run(), folder, "sft", "reward")
    tiny.run_stage("ppo", run, **changes)
    return run / "ppo"


@pytest.mark.parametrize("name", SETTINGS)
def test_no_value_model_is_built_and_the_policy_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(train_ppo, "ValueModel")
    states: list[train_ppo.State] = []
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward")
    config = replace(tiny.ppo_config(run), **SETTINGS[name])
    train_ppo.main(config, observe=lambda state, *_: states.append(state))
    assert states[-1].value_model is None and states[-1].value_optimizer is None
    rows = read_rows(run / "ppo")
    assert len(rows) == 3 and not any("value" in key or "variance" in key for row in rows for key in row)
    assert all(math.isfinite(number) for row in rows for number in row.values())
    assert rows[0]["first_ratio_deviation"] < 1e-4
    assert ("kl_loss" in rows[0]) == (config.kl_in == "loss")
    before, after = (GPT.from_pretrained(run / s / "model") for s in ("sft", "ppo"))
    assert not tiny.equal(tiny.weights(before), tiny.weights(after))


def test_each_candidate_has_a_stream_of_its_own_and_its_prompt_as_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = tiny.spy(monkeypatch, train_ppo, "collect")
    stage(tmp_path, **SETTINGS["rloo"], iterations=2)
    seen = []
    for iteration, call in enumerate(rollouts):
        keys, groups = call.arguments["keys"], call.arguments["groups"]
        assert [key[:2] for key in keys] == [(Stream.ROLLOUT, iteration)] * 6
        assert [key[2] for key in keys] == list(groups) == call.result.groups.tolist()
        assert sorted(key[3] for key in keys) == [0, 0, 0, 1, 1, 1] and len(set(keys)) == 6
        prompts = [prompt for prompt, _ in tiny.prompt_and_response(call.result)]
        assert all((prompts[i] == prompts[j]) == (groups[i] == groups[j]) for i in range(6) for j in range(6))
        seen += keys
    assert len(set(seen)) == 12


def rollout_of(groups: list[int], scores: list[float]) -> Rollout:
    """Responses of unequal length, with log-probabilities that differ from the reference's."""
    batch = pad([Example([1, 2], [3] * (1 + i % 3)) for i in range(len(groups))])
    mask = batch.mask
    old = torch.where(mask, -1.0, 0.0).double()
    ref = torch.where(mask, -1.0 - 0.25 * torch.arange(len(groups))[:, None], 0.0).double()
    zeros = torch.zeros_like(old)
    number = torch.tensor(groups)
    known = {"finished": number >= 0, "old_logprobs": old, "ref_logprobs": ref, "values": zeros}
    known |= {"scores": doubles(scores), "sampling_gap": zeros[:, 0], "groups": number}
    return Rollout(batch.tokens, batch.prompt_lengths, batch.lengths, **known)


def advantages_of(name: str, rollout: Rollout) -> Tensor:
    """(B, T-1) of the rollout, at a beta of 0.2."""
    config = train_ppo.Config(advantages=name, group_size=2)
    state = train_ppo.State(None, None, None, None, None)
    logprobs = (rollout.old_logprobs, rollout.ref_logprobs)
    rewards = ppo.kl_penalised_rewards(rollout.scores, *logprobs, rollout.mask, beta=0.2)
    return train_ppo.response_advantages(state, rewards, rollout, config)


@every_estimator
def test_groups_cannot_be_mixed_up_by_the_order_of_rows(name: str) -> None:
    rollout = rollout_of([5, 8, 5, 8, 8, 5], [0.1, 2.0, -1.0, 0.5, 3.0, 0.7])
    found = advantages_of(name, rollout)
    kl = [0.25 * i * (1 + i % 3) for i in range(6)]  # log-ratio a token times tokens
    rewards = [score - 0.2 * k for score, k in zip(rollout.scores.tolist(), kl, strict=True)]
    expected = slow(name, rewards, rollout.groups.tolist())
    torch.testing.assert_close(found, torch.where(rollout.mask, expected[:, None], 0.0))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(advantages_of(name, rollout.rows(order)), found[order])


def test_a_group_of_one_response_is_refused() -> None:
    rollout = rollout_of([1, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="a group has one response"):
        advantages_of("rloo", replace(rollout, groups=torch.tensor([0, 1])))


def test_the_running_baseline_holds_the_rollouts_before_and_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    calls = tiny.spy(monkeypatch, train_ppo, "response_advantages", before=lambda a: a["state"].baseline.value)
    whole = stage(tmp_path / "whole", **SETTINGS["reinforce"], checkpoint_every=1)
    rows = read_rows(whole)
    expected, first, second = 0.0, rows[0]["objective"], rows[1]["objective"]
    assert [calls[0].before, calls[1].before] == [expected, pytest.approx(first, rel=1e-5)]
    assert calls[2].before == pytest.approx((0.9 * first + second) / 1.9, rel=1e-5)
    rollout = calls[2].arguments["rollout"]
    rewards = rollout.scores - 0.2 * (rollout.old_logprobs - rollout.ref_logprobs).sum(1)
    expected_advantages = torch.where(rollout.mask, (rewards - calls[2].before)[:, None], 0.0)
    torch.testing.assert_close(calls[2].result, expected_advantages)

    run = tiny.copy_of(tiny.finished_run(), tmp_path / "stopped", "sft", "reward")
    config = replace(tiny.ppo_config(run), **SETTINGS["reinforce"], checkpoint_every=1)

    def stop(state: train_ppo.State, *_: object) -> None:
        if state.iteration == 2:
            raise Stop

    with pytest.raises(Stop):
        train_ppo.main(config, observe=stop)
    newest = checkpoint.latest(run / "ppo" / "checkpoints")
    assert newest is not None
    train_ppo.main(replace(config, resume=True))
    assert calls[-1].before == calls[2].before
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (run / "ppo" / file).read_bytes() == (whole / file).read_bytes()


def test_a_kl_in_the_loss_is_not_in_the_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = tiny.spy(monkeypatch, ppo, "kl_penalised_rewards")
    iterations = tiny.spy(monkeypatch, train_ppo, "end_iteration")
    once = {"iterations": 2, "epochs": 1, "minibatches": 1}
    for name, kind in (("grpo", "k3"), ("grpo-no-std", "k2")):
        folder = stage(tmp_path / name, **SETTINGS[name], **once)
        for row, call, iteration in zip(read_rows(folder), rewards[-2:], iterations[-2:], strict=True):
            assert call.arguments["beta"] == 0.0
            rollout = iteration.arguments["experience"]  # at the first step the policy is the one that sampled
            kl = kl_loss(rollout.old_logprobs, rollout.ref_logprobs, rollout.mask, estimator=kind)
            assert row["kl_loss"] == pytest.approx(0.2 * kl.item(), rel=1e-3, abs=1e-7)  # cached and full forward
    assert row["kl_loss"] > 0  # the second rollout: the policy has left the reference
    stage(tmp_path / "gae", kl_in="loss", **once)
    assert rewards[-1].arguments["beta"] == 0.0
    stage(tmp_path / "reward", **SETTINGS["rloo"], **once)
    assert rewards[-1].arguments["beta"] == 0.2


def test_the_gradient_of_the_kl_in_the_loss_pulls_to_the_reference(tmp_path: Path) -> None:
    """With rewards that are all equal only the KL is left to learn from: a heavy one keeps the policy where it is."""
    far = stage(tmp_path / "far", **SETTINGS["rloo"], beta=0.0, iterations=3)
    near = stage(tmp_path / "near", **SETTINGS["rloo"], beta=20.0, kl_in="loss", iterations=3)
    assert read_rows(near)[-1]["kl"] < 0.5 * read_rows(far)[-1]["kl"]


# ------------------------------------------------------------------------------------------------------------- PPO-ptx
def test_ptx_adds_the_gradient_of_the_pretraining_loss() -> None:
    """A minibatch whose advantages are 0 leaves that gradient alone: Adam's first step is the one of train_sft.py."""
    run = tiny.finished_run()
    texts = [Example([1], [2, 3, 4]), Example([5, 6], [7]), Example([3], [9, 8])]
    rollout = rollout_of([0, 0, 1], [1.0, 1.0, 1.0])
    known = {name: value.float() if value.is_floating_point() else value for name, value in vars(rollout).items()}
    zeros = torch.zeros_like(known["values"])
    minibatch = train_ppo.Experience(**known, advantages=zeros, returns=zeros)
    expected = GPT.from_pretrained(run / "sft" / "model")
    sft = train_sft.State(expected, adamw(expected, learning_rate=1e-2, eps=1e-5))
    seen = train_sft.train_step(sft, pad(texts), train_sft.Config(max_grad_norm=1e9), max_tokens=1000)
    for tokens in (1, 1000):
        policy = GPT.from_pretrained(run / "sft" / "model")
        state = train_ppo.State(policy, None, adamw(policy, learning_rate=1e-2, eps=1e-5), None, None)
        changes = {"ptx_coefficient": 2.5, "ptx_data": "texts", "max_grad_norm": 1e9}
        config = replace(tiny.ppo_config(run), **SETTINGS["rloo"], **changes)
        metrics = train_ppo.train_step(state, minibatch, config, beta=0.2, max_tokens=tokens, texts=texts)
        assert metrics["ptx_loss"].item() == pytest.approx(2.5 * seen["loss"].item(), rel=1e-5)
        assert float(metrics["policy_grad_norm"]) == pytest.approx(2.5 * float(seen["grad_norm"]), rel=1e-4)
    with_policy = torch.where(rollout.mask, doubles([1.0, -1.0, 0.5])[:, None], 0.0).float()
    norms = []
    for pretraining in ([], texts):
        policy = GPT.from_pretrained(run / "sft" / "model")
        state = train_ppo.State(policy, None, adamw(policy, learning_rate=0.0), None, None)
        learned = replace(minibatch, advantages=with_policy)
        metrics = train_ppo.train_step(state, learned, config, beta=0.2, max_tokens=1000, texts=pretraining)
        norms.append({name: p.grad.clone() for name, p in policy.named_parameters()})
        assert ("ptx_loss" in metrics) == bool(pretraining)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(norms[1][name] - norms[0][name], 2.5 * p.grad, atol=1e-4, rtol=1e-3)  # float32 sums


def test_ptx_texts_are_drawn_anew_each_step_and_by_the_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = tiny.spy(monkeypatch, train_ppo, "train_step")
    drawn = []
    for name, seed in (("a", tiny.SEED), ("b", tiny.SEED), ("c", 9)):
        run = tiny.copy_of(tiny.finished_run(), tmp_path / name, "sft", "reward")
        settings = {**SETTINGS["rloo"], "ptx_coefficient": 0.5, "ptx_data": str(run / "train.jsonl"), "seed": seed}
        tiny.run_stage("ppo", run, **settings, iterations=1)
        drawn.append([call.arguments["texts"] for call in steps[-4:]])
        rows = read_rows(run / "ppo")
        assert rows[0]["ptx_loss"] > 0
        inputs = json.loads((run / "ppo" / "run.json").read_text())["inputs"]
        assert str(run / "train.jsonl") in inputs
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({str(texts) for texts in drawn[0]}) == 4 and all(len(texts) == 3 for texts in drawn[0])
    stage(tmp_path / "none", **SETTINGS["rloo"], iterations=1)
    assert steps[-1].arguments["texts"] == []


# ------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"advantages": "rloo"}, "--group-size 1: --advantages rloo compares a prompt's responses"),
        ({"advantages": "grpo-no-std"}, "--group-size 1: --advantages grpo-no-std compares"),
        ({"group_size": 4}, "--group-size 4: must divide --rollout-size 6"),
        ({**SETTINGS["rloo"], "gamma": 0.9}, "--gamma 0.9: is for rewards per token"),
        ({**SETTINGS["reinforce"], "whiten_rewards": True}, "--whiten-rewards: is for rewards per token"),
        ({"ptx_coefficient": 1.0}, "--ptx-data and --ptx-coefficient: belong together"),
        ({"ptx_data": "x.jsonl"}, "--ptx-data and --ptx-coefficient: belong together"),
        ({**SETTINGS["rloo"], "rollout_size": 22}, "--rollout-size in groups of 2, prompts 11: larger than the 10"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_ppo.main(replace(tiny.ppo_config(tiny.finished_run()), stage="refused", **changes))
    assert not (tiny.finished_run() / "refused" / "run.json").exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_change_nothing(name: str, tmp_path: Path) -> None:
    results = []
    for tokens in (1, 100_000):
        run = tiny.copy_of(tiny.finished_run(), tmp_path / str(tokens), "sft", "reward")
        for part in ("sft", "reward"):
            kind = GPT if part == "sft" else train_ppo.RewardModel
            model = kind.from_pretrained(run / part / "model")
            model.double().save_pretrained(run / part / "model")
        settings = {**SETTINGS[name], "micro_batch_tokens": tokens, "iterations": 2}
        settings |= {"ptx_coefficient": 0.5, "ptx_data": str(run / "train.jsonl")}
        tiny.run_stage("ppo", run, **settings)
        results.append(tiny.weights(GPT.from_pretrained(run / "ppo" / "model")))
    for key, weight in results[0].items():
        torch.testing.assert_close(results[1][key], weight, atol=1e-7, rtol=1e-6, msg=lambda m, k=key: f"{k}: {m}")

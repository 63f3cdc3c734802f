"""Every stage's optimizer steps against the plain re-implementation in `oracle`, in float64, to 1e-9.

The rows are of unequal length and the micro-batches small, so a wrong shift, mask, denominator, pairing or clipping
shows; the oracle has no batches, no padding and no masks.
"""

from __future__ import annotations

import copy

import oracle
import pytest
import tiny
import torch
from torch import Tensor

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf.batch import Example, pad
from minirlhf.comparisons import Comparison, with_reference
from minirlhf.model import GPT, GPTConfig
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import Rollout

HEADS = 2
EXAMPLES = [
    Example([1, 2, 3], [4, 5, 0]),
    Example([7], [8, 9, 10, 1, 2, 0]),
    Example([3, 3], [0]),
    Example([5, 6, 7, 8], [9]),
    Example([2, 4], [6, 8, 0]),
    Example([9], [1, 1]),
]
STEPS = 10
CPU = torch.device("cpu")


def new_gpt(seed: int) -> GPT:
    config = GPTConfig(vocab_size=11, n_positions=8, n_layer=2, n_head=HEADS, n_embd=8, eos_token_id=0)
    model = GPT(config, seed=seed).double()
    with torch.no_grad():  # weights that matter: at 0.02 all attention is near uniform
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)).double()
    return model


def new_reward_model(gpt: GPT) -> RewardModel:
    return RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(5)).double()


def assert_same(module: torch.nn.Module, p: oracle.Params) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, p[name], atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def halves(step: int) -> list[int]:
    """Three of the six items, other ones every step."""
    return [[0, 1, 2], [3, 4, 5], [1, 3, 5], [0, 2, 4]][step % 4]


@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_sft_steps(micro_batch_tokens: int) -> None:
    model = new_gpt(0)
    p = oracle.parameters_of(model)
    state = train_sft.State(model, adamw(model, learning_rate=1e-2, weight_decay=0.1))
    adam = oracle.AdamW(p, eps=1e-8, weight_decay=0.1)
    for step in range(STEPS):
        rows = [EXAMPLES[i] for i in halves(step)]
        tokens = sum(len(e.response_ids) for e in rows)
        loss = -sum(oracle.response_logprobs(p, e.prompt_ids, e.response_ids, HEADS).sum() for e in rows) / tokens
        metrics = train_sft.train_step(
            state, pad(rows), train_sft.Config(max_grad_norm=0.5), max_tokens=micro_batch_tokens
        )
        torch.testing.assert_close(metrics["loss"].double(), loss.detach(), atol=1e-9, rtol=1e-9)
        adam.step(loss, learning_rate=1e-2, max_norm=0.5)
    assert_same(model, p)
    assert state.step == STEPS


COMPARISONS = [
    Comparison([Example([1, 2], r) for r in ([3, 0], [4, 5, 6, 0], [7])], [(0, 1), (2, 1), (0, 2)]),
    Comparison([Example([8], r) for r in ([9, 9, 0], [10, 0])], [(1, 0)]),
    Comparison([Example([5, 5, 5], r) for r in ([1, 0], [2, 2, 2])], [(0, 1)]),
]


DIFFERING = [[3, 4, 2], [2], [3]]  # tokens in which the two responses of each pair above differ


@pytest.mark.parametrize("contrast", [0.0, 2.0])
@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_reward_steps(micro_batch_tokens: int, contrast: float) -> None:
    model = new_reward_model(new_gpt(1))
    p = oracle.parameters_of(model)
    state = train_reward.State(model, adamw(model, learning_rate=1e-2, weight_decay=0.01))
    adam = oracle.AdamW(p, eps=1e-8, weight_decay=0.01)
    for step in range(STEPS):
        batch = COMPARISONS[: 2 + step % 2]
        losses, weights = [], []
        for c, differing in zip(batch, DIFFERING, strict=False):
            scores = [oracle.score(p, e.prompt_ids, e.response_ids, HEADS) for e in c.examples]
            losses += [torch.log(1 + torch.exp(-(scores[i] - scores[j]))) for i, j in c.pairs]
            weights += [1 / d**contrast for d in differing]
        loss = sum(w * value for w, value in zip(weights, losses, strict=True)) / sum(weights)
        metrics = train_reward.train_step(
            state, batch, train_reward.Config(), CPU, max_tokens=micro_batch_tokens, contrast=contrast
        )
        torch.testing.assert_close(metrics["loss"].double(), loss.detach(), atol=1e-9, rtol=1e-9)
        adam.step(loss, learning_rate=1e-2, max_norm=1.0)
    assert_same(model, p)


@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_dpo_steps(micro_batch_tokens: int) -> None:
    policy = new_gpt(2)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    p, ref = oracle.parameters_of(policy), oracle.parameters_of(reference)
    config = train_dpo.Config(beta=0.3, label_smoothing=0.1, max_grad_norm=1.0)
    state = train_dpo.State(policy, adamw(policy, learning_rate=1e-2))
    adam = oracle.AdamW(p, eps=1e-8, weight_decay=0.0)
    comparisons = with_reference(reference, COMPARISONS, CPU, max_tokens=micro_batch_tokens)
    for step in range(STEPS):
        losses = []
        for c in COMPARISONS[: 2 + step % 2]:
            ratios = [
                oracle.response_logprobs(p, e.prompt_ids, e.response_ids, HEADS).sum()
                - oracle.response_logprobs(ref, e.prompt_ids, e.response_ids, HEADS).sum().detach()
                for e in c.examples
            ]
            for i, j in c.pairs:
                h = 0.3 * (ratios[i] - ratios[j])
                losses.append(0.9 * torch.log(1 + torch.exp(-h)) + 0.1 * torch.log(1 + torch.exp(h)))
        loss = sum(losses) / len(losses)
        metrics = train_dpo.train_step(state, comparisons[: 2 + step % 2], config, CPU, max_tokens=micro_batch_tokens)
        if step == 0:
            torch.testing.assert_close(metrics["loss"].item(), 0.6931471805599453, atol=1e-12, rtol=0)
        torch.testing.assert_close(metrics["loss"].double(), loss.detach(), atol=1e-9, rtol=1e-9)
        adam.step(loss, learning_rate=1e-2, max_norm=1.0)
    assert_same(policy, p)
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, ref[name]), name


# ----------------------------------------------------------------------------------------------------------------- PPO
BETA, GAMMA, LAM, CLIP, TEMPERATURE = 0.2, 0.9, 0.8, 0.1, 0.7
SCORES = [1.5, -0.5, 0.3, -1.0, 2.0, -1.0]


def oracle_logprobs(p: oracle.Params, e: Example) -> Tensor:
    """At the sampling temperature: scaling the tied head's logits is scaling the final norm's output."""
    states = oracle.hidden(p, e.prompt_ids + e.response_ids, HEADS)
    logits = states[len(e.prompt_ids) - 1 : -1] @ p["wte.weight"].T / TEMPERATURE
    return torch.stack(
        [row[token] - torch.logsumexp(row, 0) for row, token in zip(logits, e.response_ids, strict=True)]
    )


def oracle_experience(
    old: list[Tensor], ref: list[Tensor], old_values: list[Tensor]
) -> tuple[list[list[float]], list[list[float]]]:
    """Whitened advantages and returns of each row, by the double sum of GAE's definition."""
    advantages, returns = [], []
    for score, lp, ref_lp, v in zip(SCORES, old, ref, old_values, strict=True):
        rewards = [-BETA * (a - b).item() for a, b in zip(lp, ref_lp, strict=True)]
        rewards[-1] += score
        v = [*v.tolist(), 0.0]
        n = len(rewards)
        delta = [rewards[t] + GAMMA * v[t + 1] - v[t] for t in range(n)]
        a = [sum((GAMMA * LAM) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        advantages.append(a)
        returns.append([a[t] + v[t] for t in range(n)])
    flat = [x for row in advantages for x in row]
    mean = sum(flat) / len(flat)
    deviation = (sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8) ** 0.5
    return [[(x - mean) / deviation for x in row] for row in advantages], returns


def padded(rows: list[Tensor]) -> Tensor:
    """(B, T-1) with each row's numbers where its response is scored."""
    batch = pad(EXAMPLES)
    result = torch.zeros(batch.mask.shape, dtype=torch.float64)
    result[batch.mask] = torch.cat([row.detach() for row in rows])
    return result


@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_ppo_steps(micro_batch_tokens: int) -> None:
    policy, reference = new_gpt(3), new_gpt(4)
    value_model = ValueModel.from_reward_model(new_reward_model(new_gpt(5))).double()
    with torch.no_grad():
        value_model.value.weight.add_(0.1)  # old values that are not all 0
    p, ref = oracle.parameters_of(policy), oracle.parameters_of(reference)
    v = oracle.parameters_of(value_model)
    old = [oracle_logprobs(p, e).detach() for e in EXAMPLES]
    ref_logprobs = [oracle_logprobs(ref, e).detach() for e in EXAMPLES]
    old_values = [oracle.values(v, e.prompt_ids, e.response_ids, HEADS).detach() for e in EXAMPLES]
    advantages, returns = oracle_experience(old, ref_logprobs, old_values)

    batch = pad(EXAMPLES)
    rollout = Rollout(
        batch.tokens,
        batch.prompt_lengths,
        batch.lengths,
        finished=torch.tensor([e.response_ids[-1] == 0 for e in EXAMPLES]),
        old_logprobs=padded(old),
        ref_logprobs=padded(ref_logprobs),
        values=padded(old_values),
        scores=torch.tensor(SCORES, dtype=torch.float64),
        sampling_gap=torch.zeros(len(EXAMPLES), dtype=torch.float64),
        groups=torch.arange(len(EXAMPLES)),
    )
    experience = tiny.learn_from(rollout, beta=BETA, gamma=GAMMA, lam=LAM)
    config = train_ppo.Config(clip=CLIP, value_clip=0.05, temperature=TEMPERATURE, max_grad_norm=0.5)
    state = train_ppo.State(
        policy,
        value_model,
        adamw(policy, learning_rate=1e-2, eps=1e-5),
        adamw(value_model, learning_rate=2e-2, eps=1e-5),
        None,
    )
    adam = oracle.AdamW(p, eps=1e-5, weight_decay=0.0)
    value_adam = oracle.AdamW(v, eps=1e-5, weight_decay=0.0)
    clipped = 0.0
    for step in range(STEPS):
        index = halves(step)
        policy_losses, value_losses = [], []
        for i in index:
            e = EXAMPLES[i]
            ratio = (oracle_logprobs(p, e) - old[i]).exp()
            new_values = oracle.values(v, e.prompt_ids, e.response_ids, HEADS)
            for t in range(len(e.response_ids)):
                a, r, before = advantages[i][t], returns[i][t], old_values[i][t].item()
                policy_losses.append(torch.maximum(-a * ratio[t], -a * ratio[t].clamp(1 - CLIP, 1 + CLIP)))
                near = before + (new_values[t] - before).clamp(-0.05, 0.05)
                value_losses.append(0.5 * torch.maximum((new_values[t] - r) ** 2, (near - r) ** 2))
        loss, value_loss = sum(policy_losses) / len(policy_losses), sum(value_losses) / len(value_losses)
        metrics = train_ppo.train_step(
            state, experience.rows(torch.tensor(index)), config, beta=BETA, max_tokens=micro_batch_tokens
        )
        torch.testing.assert_close(metrics["policy_loss"].double(), loss.detach(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(metrics["value_loss"].double(), value_loss.detach(), atol=1e-9, rtol=1e-9)
        adam.step(loss, learning_rate=1e-2, max_norm=0.5)
        value_adam.step(value_loss, learning_rate=2e-2, max_norm=0.5)
        clipped += metrics["clip_fraction"].item()
    assert clipped > 0  # the clipping was exercised
    assert_same(policy, p)
    assert_same(value_model, v)

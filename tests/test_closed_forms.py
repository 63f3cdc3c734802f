"""PPO and DPO converge to the optimum of the objective that they share.

max E_pi[r(x, y)] - beta KL(pi || ref) has the solution pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x)
(Rafailov et al. 2023, eq. 4). Over a handful of tokens and at most three of them a response, all responses can be
enumerated, so the distance to pi* is exact. PPO goes through the real rollout, GAE and update; DPO through its real
loss on every pair, each weighted by its Bradley-Terry probability.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tiny import learn_from, update
from torch import Tensor

import train_ppo
from minirlhf.batch import Batch, Example, pad
from minirlhf.comparisons import Comparison, pad_comparisons, seq_logprobs
from minirlhf.dpo import dpo_loss
from minirlhf.model import GPT, GPTConfig
from minirlhf.optim import adamw, linear_schedule, set_learning_rate
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import collect

V, LONGEST, EOS = 3, 3, 2
PROMPT = [0, 1]
STEPS = 100  # of DPO


def tiny(seed: int) -> GPT:
    model = GPT(GPTConfig(vocab_size=V, n_positions=8, n_layer=1, n_head=1, n_embd=16, eos_token_id=EOS), seed=seed)
    with torch.no_grad():
        model.wte.weight.mul_(6)  # a reference that is not uniform
    return model


def all_responses() -> list[list[int]]:
    """Every response that sampling can end with: up to the first EOS, or LONGEST tokens."""
    responses = []
    for ids in itertools.product(range(V), repeat=LONGEST):
        end = ids.index(EOS) + 1 if EOS in ids else LONGEST
        if list(ids[:end]) not in responses:
            responses.append(list(ids[:end]))
    return responses


RESPONSES = all_responses()
EXAMPLES = [Example(PROMPT, ids) for ids in RESPONSES]
EVERYTHING = pad(EXAMPLES)
COMPARED = pad_comparisons([Comparison(EXAMPLES, [])])
REWARDS = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(3))


def probabilities(model: GPT) -> Tensor:
    """pi(y|x) of every response."""
    with torch.no_grad():
        return model.logprobs(EVERYTHING.tokens, EVERYTHING.mask).sum(1).double().exp()


def optimum(reference: GPT, beta: float) -> Tensor:
    return torch.softmax(probabilities(reference).log() + REWARDS.double() / beta, dim=0)


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def reward(batch: Batch) -> Tensor:
    return torch.stack([REWARDS[RESPONSES.index(ids)] for ids in batch.response_ids()])


def test_the_responses_are_all_there_is() -> None:
    assert len(RESPONSES) == 1 + 2 + 2 * 2 * 3
    torch.testing.assert_close(probabilities(tiny(0)).sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_ppo_converges_to_the_optimum(beta: float) -> None:
    policy = tiny(0)
    reference = copy.deepcopy(policy).requires_grad_(False)
    value_model = ValueModel.from_reward_model(RewardModel.from_gpt(policy, generator=torch.Generator().manual_seed(1)))
    config = train_ppo.Config(
        epochs=2, minibatches=2, rollout_size=256, iterations=60, beta=beta, temperature=1.0, seed=0
    )
    state = train_ppo.State(
        policy, value_model, adamw(policy, learning_rate=0, eps=1e-5), adamw(value_model, learning_rate=0), None
    )
    best = optimum(reference, beta)
    assert total_variation(probabilities(policy), best) > 0.1  # there is something to learn
    for iteration in range(config.iterations):
        state.iteration = iteration
        for optimizer in (state.policy_optimizer, state.value_optimizer):
            set_learning_rate(optimizer, 1e-2 * linear_schedule(iteration, config.iterations))
        rollout = collect(
            policy,
            reference,
            value_model,
            reward,
            [PROMPT] * config.rollout_size,
            keys=[(iteration, i) for i in range(config.rollout_size)],
            seed=0,
            eos_id=EOS,
            max_new_tokens=LONGEST,
            temperature=1.0,
            missing_eos_score=None,
            rescore=False,
            max_tokens=10_000,
        )
        experience = learn_from(rollout, beta=beta, gamma=1.0, lam=0.95)
        metrics = update(state, experience, config)
        assert metrics["first_ratio_deviation"] < 1e-4
    assert total_variation(probabilities(policy), best) < 0.05


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_dpo_converges_to_the_optimum(beta: float) -> None:
    policy = tiny(0)
    reference = copy.deepcopy(policy).requires_grad_(False)
    best = optimum(reference, beta)
    assert total_variation(probabilities(policy), best) > 0.1
    ref = seq_logprobs(reference, COMPARED).detach()
    optimizer = adamw(policy, learning_rate=0)
    for step in range(STEPS):
        set_learning_rate(optimizer, 2e-2 * linear_schedule(step, STEPS))
        optimizer.zero_grad()
        expected_dpo_loss(seq_logprobs(policy, COMPARED), ref, beta).backward()
        optimizer.step()
    assert total_variation(probabilities(policy), best) < 0.05


def expected_dpo_loss(logprobs: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Mean over all pairs of the DPO loss, its label drawn from Bradley-Terry on the true rewards.

    The first of a pair is preferred with probability w = sigmoid(difference), so the expectation over labels is
    w loss(first, second) + (1 - w) loss(second, first).
    """
    pairs = torch.tensor(list(itertools.permutations(range(len(RESPONSES)), 2)))  # both ways
    chosen, rejected = pairs.unbind(dim=1)
    four = (logprobs[chosen], logprobs[rejected], ref[chosen], ref[rejected])
    losses = torch.vmap(lambda *one: dpo_loss(*(x[None] for x in one), beta=beta, denominator=1))(*four)
    probability = torch.sigmoid(REWARDS[chosen] - REWARDS[rejected])
    return 2 * (probability * losses).mean()

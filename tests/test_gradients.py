"""Expected gradients by enumeration: what an update does on average over everything the policy may sample.

A policy small enough to write down all of its responses: no sampling error hides a wrong sign or a biased estimator.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import close, normal, seeds, some
from torch import Tensor

from minirlhf import ops, ppo

VOCABULARY = 3
EOS = 0
MAX_LENGTH = 3


# ---- KL estimators as a loss, on one softmax ---------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def expected_gradient(estimator, logits: Tensor, ref_logits: Tensor) -> Tensor:
    """E_{y ~ pi} of the gradient of estimator(y): the sample is fixed, so the weight carries no gradient."""
    logprobs, ref_logprobs = logits.log_softmax(0), ref_logits.log_softmax(0)
    weighted = logprobs.detach().exp() * estimator(logprobs, ref_logprobs)
    return torch.autograd.grad(weighted.sum(), logits)[0]


@given(seeds, st.integers(2, 6))
@some
def test_kl_estimators_as_a_loss(seed, vocabulary):
    """k1 regularises nothing, k2 is the gradient of KL(pi || ref), k3 that of KL(ref || pi)."""
    logits, ref_logits = normal(vocabulary, seed=seed).requires_grad_(), normal(vocabulary, seed=seed + 1)
    pi, ref = logits.softmax(0), ref_logits.softmax(0)
    (reverse,) = torch.autograd.grad(kl(pi, ref), logits, retain_graph=True)
    (forward,) = torch.autograd.grad(kl(ref, pi), logits)
    close(expected_gradient(ops.kl_k1, logits, ref_logits), torch.zeros_like(logits))
    close(expected_gradient(ops.kl_k2, logits, ref_logits), reverse)
    close(expected_gradient(ops.kl_k3, logits, ref_logits), forward)


def test_the_two_directions_are_not_the_same():
    logits, ref_logits = normal(5, seed=0).requires_grad_(), normal(5, seed=1)
    k2, k3 = (expected_gradient(k, logits, ref_logits) for k in (ops.kl_k2, ops.kl_k3))
    assert (k2 - k3).abs().max() > 0.01


# ---- PPO on all responses of up to three tokens ------------------------------------------------------------------


def all_responses() -> tuple[Tensor, Tensor]:
    """Every response that ends with EOS or at the length limit, behind the prompt token 0: tokens and mask."""
    rows = []
    for length in range(1, MAX_LENGTH + 1):
        for response in itertools.product(range(VOCABULARY), repeat=length):
            ended = EOS in response
            if EOS not in response[:-1] and (ended or length == MAX_LENGTH):
                rows.append(response)
    tokens = torch.tensor([[0, *row, *[0] * (MAX_LENGTH - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(MAX_LENGTH) < lengths[:, None]


TOKENS, MASK = all_responses()


class TablePolicy:
    """A free softmax for every prefix of a response: the most general policy on this vocabulary."""

    def __init__(self, seed: int) -> None:
        self.table = normal(VOCABULARY**MAX_LENGTH, VOCABULARY, seed=seed).requires_grad_()

    def prefixes(self) -> Tensor:
        """The row of the table for the state before each action: the prefix read as a number, its length in front."""
        states = torch.zeros(len(TOKENS), MAX_LENGTH, dtype=torch.long)
        for t in range(1, MAX_LENGTH):
            states[:, t] = states[:, t - 1] * VOCABULARY + TOKENS[:, t] + 1
        return states

    def logprobs(self) -> Tensor:
        logits = self.table[self.prefixes()]  # (B, T-1, V)
        logits = torch.cat([logits, torch.zeros(len(TOKENS), 1, VOCABULARY)], dim=1)  # the last column scores nothing
        return torch.where(MASK, ops.token_logprobs(logits, TOKENS), 0.0)


def sequence_probabilities(logprobs: Tensor) -> Tensor:
    return logprobs.sum(1).exp()


def objective(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    """E[r] - beta KL(pi || ref), by summation over all responses."""
    probabilities = sequence_probabilities(logprobs)
    return (probabilities * (scores - beta * (logprobs - ref_logprobs).sum(1))).sum()


def exact_values(probabilities: Tensor, to_go: Tensor, states: Tensor) -> Tensor:
    """V(s) = E[rewards to go | s], by summation over the responses that pass through s."""
    values = torch.zeros_like(to_go)
    for b, t in MASK.nonzero().tolist():
        here = MASK[:, t] & (states[:, t] == states[b, t])
        values[b, t] = (probabilities[here] * to_go[here, t]).sum() / probabilities[here].sum()
    return values


def expected_policy_gradient(policy: TablePolicy, advantages: Tensor) -> Tensor:
    """The gradient of PPO's loss at ratio 1, weighted with the probability of each response."""
    logprobs = policy.logprobs()
    probabilities = sequence_probabilities(logprobs).detach()
    old_logprobs = logprobs.detach()
    total = sum(
        probabilities[b]
        * ppo.policy_loss(logprobs[[b]], old_logprobs[[b]], advantages[[b]], MASK[[b]], clip=0.2, denominator=1)
        for b in range(len(TOKENS))
    )
    return torch.autograd.grad(total, policy.table)[0]


def test_the_enumeration_is_complete():
    policy = TablePolicy(0)
    close(sequence_probabilities(policy.logprobs()).sum(), torch.ones((), dtype=torch.float64))
    assert len(TOKENS) == 1 + 2 + 4 * VOCABULARY
    states = policy.prefixes()
    assert len({(t, s) for t in range(MAX_LENGTH) for s in states[MASK[:, t], t].tolist()}) == 1 + 2 + 4
    assert len({s for t in range(MAX_LENGTH) for s in states[MASK[:, t], t].tolist()}) == 1 + 2 + 4


@pytest.mark.parametrize(
    ("lam", "baseline"), [(1.0, "zero"), (1.0, "any"), (1.0, "exact"), (0.95, "exact"), (0.0, "exact")]
)
@given(seed=seeds, beta=st.floats(0, 1))
@some
def test_the_per_token_reward_form_gives_the_policy_gradient(lam, baseline, seed, beta):
    """The expected PPO gradient is that of -(E[r] - beta KL).

    With lam = 1 for every baseline that depends on the state alone, with any lam for the true values.
    """
    policy, ref_logprobs = TablePolicy(seed), TablePolicy(seed + 1).logprobs().detach()
    scores = normal(len(TOKENS), seed=seed + 2)
    logprobs = policy.logprobs()
    (expected,) = torch.autograd.grad(-objective(logprobs, ref_logprobs, scores, beta), policy.table)

    logprobs, states = logprobs.detach(), policy.prefixes()
    rewards = ppo.kl_penalised_rewards(scores, logprobs, ref_logprobs, MASK, beta=beta)
    zero = torch.zeros_like(rewards)
    to_go = ppo.gae(rewards, zero, MASK, gamma=1.0, lam=1.0)[1]
    values = {
        "zero": lambda: zero,
        "any": lambda: normal(len(policy.table), seed=seed + 3)[states],
        "exact": lambda: exact_values(sequence_probabilities(logprobs), to_go, states),
    }[baseline]()
    advantages, _ = ppo.gae(rewards, values, MASK, gamma=1.0, lam=lam)
    close(expected_policy_gradient(policy, advantages), expected)


@given(seed=seeds, beta=st.floats(0.2, 2))
@some
def test_at_the_optimum_the_expected_gradient_is_zero(seed, beta):
    """pi*(y) = ref(y) exp(r(y) / beta) / Z: there every response has the same r - beta log pi/ref."""
    ref_logprobs = TablePolicy(seed + 1).logprobs().detach()
    scores = normal(len(TOKENS), seed=seed + 2)
    optimum = (ref_logprobs.sum(1) + scores / beta).softmax(0)
    policy = TablePolicy(seed)
    states = policy.prefixes()
    with torch.no_grad():
        for b, t in MASK.nonzero().tolist():  # conditional probabilities of the next token, by summation
            here = MASK[:, t] & (states[:, t] == states[b, t])
            taken = here & (TOKENS[:, t + 1] == TOKENS[b, t + 1])
            policy.table[states[b, t], TOKENS[b, t + 1]] = (optimum[taken].sum() / optimum[here].sum()).log()
    logprobs = policy.logprobs().detach()
    close(sequence_probabilities(logprobs), optimum)
    rewards = ppo.kl_penalised_rewards(scores, logprobs, ref_logprobs, MASK, beta=beta)
    advantages, _ = ppo.gae(rewards, torch.zeros_like(rewards), MASK, gamma=1.0, lam=1.0)
    close(expected_policy_gradient(policy, advantages), torch.zeros_like(policy.table))


@given(seed=seeds)
@some
def test_sequence_kl_has_the_kl_as_its_expectation(seed):
    policy, ref_policy = TablePolicy(seed), TablePolicy(seed + 1)
    logprobs, ref_logprobs = policy.logprobs().detach(), ref_policy.logprobs().detach()
    probabilities, ref_probabilities = sequence_probabilities(logprobs), sequence_probabilities(ref_logprobs)
    rows = [ops.sequence_kl(logprobs[[b]], ref_logprobs[[b]], MASK[[b]]) for b in range(len(TOKENS))]
    close((probabilities * torch.stack(rows)).sum(), kl(probabilities, ref_probabilities))

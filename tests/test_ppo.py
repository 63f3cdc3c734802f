"""The maths of PPO: rewards, advantages, the two losses, the KL controller, the diagnostics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Padded,
    close,
    contiguous_mask,
    equal,
    few,
    garbage,
    half_law,
    normal,
    padded,
    padding_content_law,
    padding_width_law,
    permutation_law,
    rowwise_law,
    seeds,
    some,
    split_law,
    value_and_gradient,
)
from torch.autograd import gradcheck

from minirlhf import ops, ppo

NAN, INF = float("nan"), float("inf")
CLIP = 0.3
POLICY_METRICS = ["approximate_kl", "clip_fraction", "ratio", "ratio_deviation"]
VALUE_METRICS = ["value_clip_fraction", "value_error"]


def call_rewards(case, denominator):
    return ppo.kl_penalised_rewards(case.scores, *case.inputs[:2], case.mask, beta=0.5)


def call_gae(output):
    return lambda case, denominator: ppo.gae(*case.inputs[:2], case.mask, gamma=0.9, lam=0.8)[output]


def call_loss(function):
    return lambda case, denominator: function(*case.inputs[:3], case.mask, clip=CLIP, denominator=denominator)


def call_metric(function, name):
    return lambda case, denominator: call_loss(function)(case, denominator)[name]


PER_TOKEN = {"kl_penalised_rewards": call_rewards, "advantages": call_gae(0), "returns": call_gae(1)}
TOKEN_MEANS = {
    "policy_loss": call_loss(ppo.policy_loss),
    "value_loss": call_loss(ppo.value_loss),
    **{name: call_metric(ppo.policy_diagnostics, name) for name in POLICY_METRICS[:-1]},
    **{name: call_metric(ppo.value_diagnostics, name) for name in VALUE_METRICS},
}
MASKED = {
    **PER_TOKEN,
    **TOKEN_MEANS,
    "ratio_deviation": call_metric(ppo.policy_diagnostics, "ratio_deviation"),
    "sequence_kl": lambda case, denominator: ops.sequence_kl(*case.inputs[:2], case.mask, denominator=denominator),
    "explained_variance": lambda case, denominator: ppo.explained_variance(*case.inputs[:2], case.mask),
}


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def positions(mask):
    """For each row, the masked columns in order."""
    return [[t for t in range(mask.shape[1]) if mask[b, t]] for b in range(len(mask))]


# ---- the laws of the mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKED)
@given(case=padded(), filler=garbage)
@few
def test_padding_content_changes_nothing(name, case, filler):
    padding_content_law(MASKED[name], case, filler)


@pytest.mark.parametrize("name", MASKED)
@given(case=padded(), left=st.integers(0, 2), right=st.integers(0, 3), filler=garbage)
@few
def test_padding_width_changes_nothing(name, case, left, right, filler):
    padding_width_law(MASKED[name], case, left, right, filler)


@pytest.mark.parametrize("name", MASKED)
@given(case=padded(), seed=seeds)
@few
def test_row_order_changes_nothing(name, case, seed):
    permutation_law(MASKED[name], case, seed)


@pytest.mark.parametrize("name", TOKEN_MEANS)
@given(case=padded(min_rows=2), size=st.integers(1, 2))
@few
def test_micro_batches_add_up(name, case, size):
    split_law(TOKEN_MEANS[name], case, case.mask.sum().clamp(min=1), size)


@pytest.mark.parametrize("name", [*TOKEN_MEANS, "sequence_kl"])
def test_a_denominator_takes_the_place_of_the_count(name):
    inputs = [normal(2, 5, seed=seed) for seed in range(4)]
    case = Padded(contiguous_mask([(0, 4), (1, 5)], 5), inputs, normal(2, seed=4))
    count = 2 if name == "sequence_kl" else 8
    value = MASKED[name](case, None)
    assert value != 0
    close(MASKED[name](case, 5 * count), value / 5)


@given(case=padded(min_rows=2), size=st.integers(1, 2))
@some
def test_sequence_kl_of_micro_batches_adds_up(case, size):
    split_law(MASKED["sequence_kl"], case, len(case.mask), size)


@pytest.mark.parametrize("name", PER_TOKEN)
@given(case=padded())
@few
def test_rows_do_not_see_each_other(name, case):
    rowwise_law(PER_TOKEN[name], case)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("width", [0, 3])
def test_an_empty_mask_gives_zero_and_a_zero_gradient(name, width):
    inputs = [torch.full((2, width), NAN, dtype=torch.float64) for _ in range(4)]
    case = Padded(torch.zeros(2, width, dtype=torch.bool), inputs, torch.ones(2))
    value, gradient = value_and_gradient(MASKED[name], case)
    assert not value.any() and not gradient.any()
    assert value.shape == (case.mask.shape if name in PER_TOKEN else ())


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_must_be_bool_and_all_shapes_equal(name):
    case = Padded(torch.ones(2, 3, dtype=torch.bool), [torch.ones(2, 3) for _ in range(4)], torch.ones(2))
    with pytest.raises(TypeError, match="pass a bool mask"):
        MASKED[name](Padded(case.mask.long(), case.inputs, case.scores), None)
    needed = 2 if name in (*PER_TOKEN, "sequence_kl", "explained_variance") else 3
    for position in range(needed):
        inputs = [x[:1] if i == position else x for i, x in enumerate(case.inputs)]
        with pytest.raises(ValueError, match=r"has shape \(1, 3\) but mask has shape \(2, 3\)"):
            MASKED[name](Padded(case.mask, inputs, case.scores), None)


@pytest.mark.parametrize("name", MASKED)
def test_half_types_are_computed_in_float32(name):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    inputs = [normal(2, 3, seed=seed) for seed in range(4)]
    half_law(lambda *x: MASKED[name](Padded(mask, list(x[:4]), x[4]), None), [*inputs, normal(2, seed=4)])


def test_mixed_dtypes_take_the_wider_one():
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards, values = double([0.1, 0.2]), torch.zeros(1, 2)
    assert ppo.gae(rewards.float(), values.double(), mask, gamma=1.0, lam=1.0)[0].dtype == torch.float64
    close(ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)[0], double([0.1 + 0.2, 0.2]))


@pytest.mark.parametrize("function", [ppo.policy_loss, ppo.value_loss, ppo.policy_diagnostics, ppo.value_diagnostics])
@pytest.mark.parametrize("clip", [0.0, -0.2, NAN])
def test_a_clip_that_is_not_positive_is_refused(function, clip):
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="clip is .*; it must be above 0"):
        function(ones, ones, ones, ones.bool(), clip=clip)


# ---- rewards -----------------------------------------------------------------------------------------------------


def test_rewards_by_hand():
    # beta 0.1. Row 0: kl = (1, -2), score 5 at its second and last action. Row 1: one action, kl = 3, score -1.
    logprobs = double([NAN, -1.0, -3.0, INF], [-1.0, NAN, NAN, NAN])
    ref_logprobs = double([NAN, -2.0, -1.0, NAN], [-4.0, 0.0, NAN, -INF])
    mask = contiguous_mask([(1, 3), (0, 1)], 4)
    rewards = ppo.kl_penalised_rewards(double(5.0, -1.0), logprobs, ref_logprobs, mask, beta=0.1)
    close(rewards, double([0.0, -0.1, 5.2, 0.0], [-1.3, 0.0, 0.0, 0.0]))


@given(padded(), st.floats(0, 2))
@some
def test_rewards_follow_their_definition(case, beta):
    logprobs, ref_logprobs = case.inputs[:2]
    expected = torch.zeros_like(logprobs)
    for b, columns in enumerate(positions(case.mask)):
        for t in columns:
            expected[b, t] = -beta * (logprobs[b, t].item() - ref_logprobs[b, t].item())
        if columns:
            expected[b, columns[-1]] += case.scores[b].item()
    close(ppo.kl_penalised_rewards(case.scores, logprobs, ref_logprobs, case.mask, beta=beta), expected)


@given(padded(min_length=1), st.floats(0, 2))
@some
def test_rewards_of_a_row_sum_to_the_score_less_beta_kl(case, beta):
    rewards = ppo.kl_penalised_rewards(case.scores, *case.inputs[:2], case.mask, beta=beta)
    kl = torch.where(case.mask, case.inputs[0] - case.inputs[1], 0.0).sum(1)
    close(rewards.sum(1), case.scores - beta * kl)
    close(ops.sequence_kl(*case.inputs[:2], case.mask), kl.mean())


@given(padded(min_length=1))
@some
def test_without_penalty_every_return_is_the_score(case):
    rewards = ppo.kl_penalised_rewards(case.scores, *case.inputs[:2], case.mask, beta=0.0)
    advantages, returns = ppo.gae(rewards, torch.zeros_like(rewards), case.mask, gamma=1.0, lam=1.0)
    expected = torch.where(case.mask, case.scores[:, None], 0.0)
    close(advantages, expected)
    close(returns, expected)


def test_rewards_carry_no_gradient():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    scores = torch.ones(1, requires_grad=True)
    rewards = ppo.kl_penalised_rewards(scores, logprobs, logprobs, torch.ones(1, 2).bool(), beta=0.1)
    assert not rewards.requires_grad


def test_rewards_refuse_what_would_be_nonsense():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for shape in [(1,), (2, 1), (3,), ()]:
        with pytest.raises(ValueError, match=r"scores has shape .*; pass one per row, \(2,\)"):
            ppo.kl_penalised_rewards(torch.zeros(shape), x, x, mask, beta=0.1)
    for beta in (-0.1, NAN):
        with pytest.raises(ValueError, match="beta is .*; it must lie between 0.0 and inf"):
            ppo.kl_penalised_rewards(torch.zeros(2), x, x, mask, beta=beta)


# ---- generalised advantage estimation ----------------------------------------------------------------------------


def test_gae_by_hand():
    # gamma 1/2, lam 1/2, rewards (1, 2), values (4, 8); columns 0 and 3 are padding.
    # t=2: delta = 2 + 0 - 8 = -6, A = -6.  t=1: delta = 1 + 4 - 4 = 1, A = 1 + 1/4 * -6 = -1/2.  R = A + V = 7/2, 2.
    mask = contiguous_mask([(1, 3)], 4)
    rewards, values = double([NAN, 1.0, 2.0, INF]), double([INF, 4.0, 8.0, NAN])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    equal(advantages, double([0.0, -0.5, -6.0, 0.0]))
    equal(returns, double([0.0, 3.5, 2.0, 0.0]))


@given(padded(), st.floats(0, 1), st.floats(0, 1))
@some
def test_gae_is_the_double_sum(case, gamma, lam):
    rewards, values = case.inputs[:2]
    expected = torch.zeros_like(rewards)
    for b, columns in enumerate(positions(case.mask)):
        r = [rewards[b, t].item() for t in columns]
        v = [values[b, t].item() for t in columns] + [0.0]
        for i, t in enumerate(columns):
            deltas = [r[j] + gamma * v[j + 1] - v[j] for j in range(i, len(columns))]
            expected[b, t] = math.fsum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
    advantages, returns = ppo.gae(rewards, values, case.mask, gamma=gamma, lam=lam)
    close(advantages, expected)
    close(returns, torch.where(case.mask, expected + values, 0.0))


@given(padded(), st.floats(0, 1))
@some
def test_lam_one_is_monte_carlo(case, gamma):
    """Returns are the discounted rewards to go, whatever the values say."""
    rewards, values = case.inputs[:2]
    advantages, returns = ppo.gae(rewards, values, case.mask, gamma=gamma, lam=1.0)
    for b, columns in enumerate(positions(case.mask)):
        for i, t in enumerate(columns):
            to_go = math.fsum(gamma**k * rewards[b, u].item() for k, u in enumerate(columns[i:]))
            assert returns[b, t].item() == pytest.approx(to_go, rel=1e-12, abs=1e-12)
            assert advantages[b, t].item() == pytest.approx(to_go - values[b, t].item(), rel=1e-12, abs=1e-12)


@given(padded(), st.floats(0, 1))
@some
def test_lam_zero_is_the_one_step_error(case, gamma):
    rewards, values = case.inputs[:2]
    advantages, _ = ppo.gae(rewards, values, case.mask, gamma=gamma, lam=0.0)
    for b, columns in enumerate(positions(case.mask)):
        for i, t in enumerate(columns):
            next_value = values[b, columns[i + 1]].item() if i + 1 < len(columns) else 0.0
            delta = rewards[b, t].item() + gamma * next_value - values[b, t].item()
            assert advantages[b, t].item() == pytest.approx(delta, rel=1e-12, abs=1e-12)


@given(padded(), st.floats(0, 1), st.floats(0, 1))
@some
def test_values_that_are_right_leave_no_advantage(case, gamma, lam):
    _, values = ppo.gae(*case.inputs[:2], case.mask, gamma=gamma, lam=1.0)
    advantages, returns = ppo.gae(case.inputs[0], values, case.mask, gamma=gamma, lam=lam)
    close(advantages, torch.zeros_like(advantages))
    close(returns, values)


def test_a_gap_in_the_response_is_passed_over():
    """Actions that are not the policy's own (a tool's answer) neither act nor discount."""
    rewards, values = normal(1, 5, seed=0), normal(1, 5, seed=1)
    mask = torch.tensor([[True, True, False, False, True]])
    advantages, _ = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    dense, _ = ppo.gae(rewards[mask][None], values[mask][None], torch.ones(1, 3).bool(), gamma=0.9, lam=0.8)
    close(advantages[mask], dense[0])


def test_gae_carries_no_gradient_and_leaves_its_inputs_alone():
    rewards, values = torch.ones(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 3).bool(), gamma=1.0, lam=0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    equal(rewards.detach(), torch.ones(1, 3))
    equal(values.detach(), torch.ones(1, 3))


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("number", [-0.01, 1.01, NAN])
def test_gae_refuses_discounts_outside_zero_and_one(name, number):
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match=f"{name} is .*; it must lie between 0.0 and 1.0"):
        ppo.gae(x, x, x.bool(), **{"gamma": 1.0, "lam": 1.0, name: number})


# ---- the policy loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 1.5, -2.4, 0.0),  # gained enough: -2 * 1.2, flat
        (2.0, 0.5, -1.0, -1.0),  # lost, must come back: -2 * 0.5
        (-2.0, 1.5, 3.0, 3.0),  # gained, must go back: 2 * 1.5
        (-2.0, 0.5, 1.6, 0.0),  # lost enough: 2 * 0.8, flat
        (2.0, 1.1, -2.2, -2.2),  # inside the interval the clip is not there
        (-2.0, 0.9, 1.8, 1.8),
    ],
)
def test_the_four_quadrants_of_the_clip_by_hand(advantage, ratio, loss, gradient):
    """The gradient with respect to the log-probability is -A ratio, or 0 in two of the quadrants."""
    logprobs = double([math.log(ratio)]).requires_grad_()
    value = ppo.policy_loss(logprobs, double([0.0]), double([advantage]), torch.tensor([[True]]), clip=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)
    metrics = ppo.policy_diagnostics(logprobs, double([0.0]), double([advantage]), torch.tensor([[True]]), clip=0.2)
    assert metrics["clip_fraction"].item() == (gradient == 0.0)


@given(padded(), st.floats(0.05, 0.6))
@some
def test_policy_loss_and_gradient_follow_their_definition(case, clip):
    logprobs, old_logprobs, advantages = case.inputs[:3]
    count = max(int(case.mask.sum()), 1)
    losses, expected, clipped = [], torch.zeros_like(logprobs), 0
    for b, t in case.mask.nonzero().tolist():
        a, ratio = advantages[b, t].item(), math.exp(logprobs[b, t].item() - old_logprobs[b, t].item())
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(a * ratio, a * bounded))  # the paper's objective, negated
        free = a * ratio <= a * bounded
        expected[b, t] = -a * ratio / count if free else 0.0
        clipped += not free
    leaf = logprobs.clone().requires_grad_()
    value = ppo.policy_loss(leaf, old_logprobs, advantages, case.mask, clip=clip)
    value.backward()
    close(value.detach(), torch.tensor(math.fsum(losses) / count, dtype=torch.float64))
    close(leaf.grad, expected)
    metrics = ppo.policy_diagnostics(logprobs, old_logprobs, advantages, case.mask, clip=clip)
    assert metrics["clip_fraction"].item() == pytest.approx(clipped / count, rel=1e-12)


@given(padded())
@some
def test_at_ratio_one_the_gradient_is_that_of_reinforce(case):
    logprobs, advantages = case.inputs[0].clone().requires_grad_(), case.inputs[2]
    value = ppo.policy_loss(logprobs, case.inputs[0], advantages, case.mask, clip=0.2)
    close(value.detach(), -ops.masked_mean(advantages, case.mask))
    (gradient,) = torch.autograd.grad(value, logprobs)
    (reinforce,) = torch.autograd.grad(-ops.masked_mean(advantages * logprobs, case.mask), logprobs)
    close(gradient, reinforce)
    whitened = ops.whiten(advantages, case.mask)
    close(
        ppo.policy_loss(logprobs, case.inputs[0], whitened, case.mask, clip=0.2).detach(),
        torch.zeros((), dtype=torch.float64),
    )


@given(padded(), st.floats(0.05, 0.6))
@some
def test_the_clipped_loss_bounds_the_plain_one_from_above(case, clip):
    call = case.inputs[:3]
    plain = ppo.policy_loss(*call, case.mask, clip=math.inf)
    ratio = (call[0] - call[1]).exp()
    close(plain, ops.masked_mean(-call[2] * ratio, case.mask))
    assert ppo.policy_loss(*call, case.mask, clip=clip) >= plain - 1e-12


def test_policy_loss_is_the_token_mean_and_not_the_mean_of_rows():
    # -A at ratio 1: row 0 has one token with A = 6, row 1 has two with A = 0; the token mean is -2, that of rows -3
    zeros, mask = torch.zeros(2, 2), contiguous_mask([(0, 1), (0, 2)], 2)
    advantages = torch.tensor([[6.0, NAN], [0.0, 0.0]])
    assert ppo.policy_loss(zeros, zeros, advantages, mask, clip=0.2).item() == -2.0


# ---- the value loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "clipped"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0, 0),  # not moved: 1/2 (1 - 3)^2
        (2.0, 1.0, 3.0, 1.62, 0.0, 1),  # moved too far the right way: counted as 1.2, flat
        (0.0, 1.0, 3.0, 4.5, -3.0, 0),  # moved too far the wrong way: the plain term is larger
        (1.1, 1.0, 3.0, 1.805, -1.9, 0),  # moved within the clip
        (4.0, 5.0, 3.0, 1.62, 0.0, 1),  # from above: counted as 4.8, flat
        (6.0, 5.0, 3.0, 4.5, 3.0, 0),
    ],
)
def test_the_value_clip_by_hand(value, old, target, loss, gradient, clipped):
    values, mask = double([value]).requires_grad_(), torch.tensor([[True]])
    result = ppo.value_loss(values, double([old]), double([target]), mask, clip=0.2)
    result.backward()
    assert result.item() == pytest.approx(loss, abs=1e-12)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-12)
    metrics = ppo.value_diagnostics(values, double([old]), double([target]), mask, clip=0.2)
    assert metrics["value_clip_fraction"].item() == clipped
    assert metrics["value_error"].item() == pytest.approx(abs(value - target), abs=1e-12)


@given(padded(), st.floats(0.05, 1.5))
@some
def test_value_loss_and_gradient_follow_their_definition(case, clip):
    values, old_values, returns = case.inputs[:3]
    count = max(int(case.mask.sum()), 1)
    losses, expected, clipped, errors = [], torch.zeros_like(values), 0, []
    for b, t in case.mask.nonzero().tolist():
        v, old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
        bounded = min(max(v, old - clip), old + clip)
        losses.append(max((v - target) ** 2, (bounded - target) ** 2) / 2)
        flat = (bounded - target) ** 2 > (v - target) ** 2
        expected[b, t] = 0.0 if flat else (v - target) / count
        clipped += flat
        errors.append(abs(v - target))
    leaf = values.clone().requires_grad_()
    value = ppo.value_loss(leaf, old_values, returns, case.mask, clip=clip)
    value.backward()
    close(value.detach(), torch.tensor(math.fsum(losses) / count, dtype=torch.float64))
    close(leaf.grad, expected)
    metrics = ppo.value_diagnostics(values, old_values, returns, case.mask, clip=clip)
    assert metrics["value_clip_fraction"].item() == pytest.approx(clipped / count, rel=1e-12)
    assert metrics["value_error"].item() == pytest.approx(math.fsum(errors) / count, rel=1e-12, abs=1e-12)


@given(padded())
@some
def test_without_a_clip_the_value_loss_is_half_the_squared_error(case):
    values, old_values, returns = case.inputs[:3]
    squares = (values - returns).square()
    expected = ops.masked_mean(squares, case.mask) / 2
    close(ppo.value_loss(values, old_values, returns, case.mask, clip=math.inf), expected)
    close(ppo.value_loss(values, values, returns, case.mask, clip=0.2), expected)


# ---- both losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [ppo.policy_loss, ppo.value_loss])
def test_only_the_first_argument_gets_gradient(function):
    inputs = [normal(2, 3, seed=seed).requires_grad_() for seed in range(3)]
    function(*inputs, torch.ones(2, 3).bool(), clip=0.2).backward()
    assert inputs[0].grad.any()
    assert inputs[1].grad is None and inputs[2].grad is None


@pytest.mark.parametrize("function", [ppo.policy_loss, ppo.value_loss])
@pytest.mark.parametrize("clip", [0.2, 5.0])
def test_gradients_are_those_of_finite_differences(function, clip):
    inputs = [normal(3, 4, seed=seed) for seed in range(3)]
    mask = contiguous_mask([(0, 4), (1, 3), (2, 2)], 4)
    gradcheck(lambda x: function(x, *inputs[1:], mask, clip=clip), inputs[0].requires_grad_())
    gradcheck(lambda x: function(x, *inputs[1:], mask, clip=clip, denominator=7), inputs[0])


# ---- the KL controller -------------------------------------------------------------------------------------------


def test_the_controller_by_hand():
    controller = ppo.AdaptiveKL(0.1, target=6.0, horizon=1000.0)
    controller.update(6.6, 100)  # error 0.1: beta * (1 + 0.1 * 0.1)
    assert controller.beta == pytest.approx(0.101, rel=1e-12)
    controller.update(60.0, 100)  # error 9, clipped to 0.2: * 1.02
    assert controller.beta == pytest.approx(0.101 * 1.02, rel=1e-12)
    controller.update(-3.0, 500)  # error -1.5, clipped to -0.2: * 0.9
    assert controller.beta == pytest.approx(0.101 * 1.02 * 0.9, rel=1e-12)
    controller.update(6.0, 500)  # on target
    assert controller.beta == pytest.approx(0.101 * 1.02 * 0.9, rel=1e-12)


@given(st.floats(0.01, 1), st.floats(0.1, 20), st.floats(-10, 50), st.integers(1, 400))
@some
def test_the_controller_follows_its_definition(beta, target, kl, n):
    controller = ppo.AdaptiveKL(beta=beta, target=target, horizon=100.0)
    controller_too = ppo.AdaptiveKL(beta, target, 100)
    controller.update(kl, n)
    controller_too.update(torch.tensor(kl, dtype=torch.float64), n)
    error = (kl - target) / target
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    assert controller.beta == pytest.approx(beta * (1 + error * n / 100), rel=1e-12)
    assert controller == controller_too and isinstance(controller_too.beta, float)


@pytest.mark.parametrize("name", ["beta", "target", "horizon"])
def test_the_controller_refuses_fields_that_are_not_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0.0; it must be above 0"):
        ppo.AdaptiveKL(**{"beta": 0.1, "target": 6.0, "horizon": 100.0, name: 0.0})


def test_the_controller_refuses_updates_that_make_no_sense():
    controller = ppo.AdaptiveKL(0.1, 6.0, 100.0)
    for kl in (NAN, INF):
        with pytest.raises(ValueError, match="kl is .*; the run has diverged"):
            controller.update(kl, 1)
    with pytest.raises(ValueError, match="n is 0; it must be above 0"):
        controller.update(6.0, 0)
    with pytest.raises(ValueError, match="n is 500 but horizon is 100.0; update more often"):
        controller.update(6.0, 500)
    assert controller.beta == 0.1
    controller.update(0.0, 499)
    assert 0 < controller.beta < 0.1


# ---- diagnostics -------------------------------------------------------------------------------------------------


def test_policy_diagnostics_by_hand():
    # log ratios ln 2 and -ln 2, so ratios 2 and 1/2 with mean 5/4 and largest deviation 1; half of ln^2 2 on average
    logprobs = double([math.log(2), -math.log(2), NAN])
    metrics = ppo.policy_diagnostics(
        logprobs, double([0.0, 0.0, INF]), double([1.0, 1.0, NAN]), contiguous_mask([(0, 2)], 3), clip=0.2
    )
    expected = {
        "approximate_kl": math.log(2) ** 2 / 2,
        "clip_fraction": 0.5,  # only the one that gained has no gradient
        "ratio": 1.25,
        "ratio_deviation": 1.0,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert all(value.dim() == 0 for value in metrics.values())


@given(padded())
@some
def test_policy_diagnostics_follow_their_definition(case):
    log_ratios = [(case.inputs[0] - case.inputs[1])[b, t].item() for b, t in case.mask.nonzero().tolist()]
    count = max(len(log_ratios), 1)
    metrics = ppo.policy_diagnostics(*case.inputs[:3], case.mask, clip=0.2)
    expected = {
        "approximate_kl": math.fsum(d * d for d in log_ratios) / 2 / count,
        "ratio": math.fsum(map(math.exp, log_ratios)) / count,
        "ratio_deviation": max((abs(math.exp(d) - 1) for d in log_ratios), default=0.0),
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(padded())
@some
def test_before_the_first_update_the_diagnostics_say_so(case):
    metrics = ppo.policy_diagnostics(case.inputs[0], case.inputs[0], case.inputs[1], case.mask, clip=0.2)
    ratio = 1.0 if case.mask.any() else 0.0
    assert {name: value.item() for name, value in metrics.items()} == {
        "approximate_kl": 0.0,
        "clip_fraction": 0.0,
        "ratio": ratio,
        "ratio_deviation": 0.0,
    }


def test_explained_variance_by_hand():
    # returns 0, 2: variance 1; errors R - V = 0, 1: variance 1/4; 1 - 1/4
    returns, values = double([0.0, 2.0, NAN]), double([0.0, 1.0, INF])
    mask = contiguous_mask([(0, 2)], 3)
    assert ppo.explained_variance(values, returns, mask).item() == 0.75
    assert ppo.explained_variance(returns, returns, mask).item() == 1.0
    assert ppo.explained_variance(torch.full_like(values, 5.0), returns, mask).item() == 0.0
    assert ppo.explained_variance(-returns, returns, mask).item() == -3.0  # errors 0, 4: variance 4
    # Three times 0.1 has a rounding error for a variance; what does not vary cannot be explained.
    assert ppo.explained_variance(torch.zeros(1, 3), torch.full((1, 3), 0.1), torch.ones(1, 3).bool()).item() == 0.0


@given(padded())
@some
def test_explained_variance_follows_its_definition(case):
    values, returns = ([x[b, t].item() for b, t in case.mask.nonzero().tolist()] for x in case.inputs[:2])

    def variance(x):
        return math.fsum((a - math.fsum(x) / len(x)) ** 2 for a in x) / len(x)

    if len(returns) > 1:
        expected = 1 - variance([r - v for r, v in zip(returns, values, strict=True)]) / variance(returns)
        # The quotient of two variances loses digits where the returns hardly vary.
        assert ppo.explained_variance(*case.inputs[:2], case.mask).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_sequence_kl_by_hand():
    # row 0: 1 + 2, row 1: -1; the mean over rows is 1 whatever their lengths
    logprobs, mask = double([1.0, 2.0, NAN], [NAN, -1.0, INF]), contiguous_mask([(0, 2), (1, 2)], 3)
    assert ops.sequence_kl(logprobs, torch.zeros_like(logprobs), mask).item() == 1.0
    assert ops.sequence_kl(logprobs, torch.zeros_like(logprobs), mask, denominator=4).item() == 0.5


@pytest.mark.parametrize("function", [ppo.policy_diagnostics, ppo.value_diagnostics])
def test_diagnostics_carry_no_gradient(function):
    inputs = [normal(2, 3, seed=seed).requires_grad_() for seed in range(3)]
    mask = torch.ones(2, 3).bool()
    assert not any(value.requires_grad for value in function(*inputs, mask, clip=0.2).values())
    assert not ops.sequence_kl(*inputs[:2], mask).requires_grad
    assert not ppo.explained_variance(*inputs[:2], mask).requires_grad

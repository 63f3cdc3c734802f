"""The direct preference losses, each against its equation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    close,
    few,
    half_law,
    normal,
    pair_gradients,
    pair_permutation_law,
    pair_split_law,
    pairs,
    seeds,
    some,
)
from torch.autograd import gradcheck

from minirlhf import dpo

LN2 = math.log(2)
BETA = 0.3
Z0 = torch.tensor(0.4, dtype=torch.float64)

WITH_REFERENCE = {
    "dpo": lambda x, d: dpo.dpo_loss(*x, beta=BETA, denominator=d),
    "cdpo": lambda x, d: dpo.dpo_loss(*x, beta=BETA, label_smoothing=0.2, denominator=d),
    "robust": lambda x, d: dpo.robust_dpo_loss(*x, beta=BETA, label_smoothing=0.2, denominator=d),
    "ipo": lambda x, d: dpo.ipo_loss(*x, beta=BETA, denominator=d),
    "hinge": lambda x, d: dpo.hinge_loss(*x, beta=BETA, denominator=d),
}


def lengths(x):
    """Response lengths out of any numbers."""
    return x.abs().long() + 1


def kto(x, denominator):
    # Two calls, so that both of the first two inputs are policy log-probabilities as in the other losses.
    count = 2 * len(x[0]) if denominator is None else 2 * denominator
    parts = [
        dpo.kto_loss(
            logprobs,
            ref_logprobs,
            ref_logprobs > 0,
            Z0,
            beta=BETA,
            desirable_weight=1.2,
            undesirable_weight=0.7,
            denominator=max(count, 1),
        )
        for logprobs, ref_logprobs in [(x[0], x[2]), (x[1], x[3])]
    ]
    return sum(parts)


WITHOUT_REFERENCE = {
    "orpo": lambda x, d: dpo.orpo_loss(-x[0].abs(), -x[1].abs(), lengths(x[2]), lengths(x[3]), lam=0.5, denominator=d),
    "simpo": lambda x, d: dpo.simpo_loss(*x[:2], lengths(x[2]), lengths(x[3]), beta=2.0, gamma=0.5, denominator=d),
}
LOSSES = {**WITH_REFERENCE, "kto": kto, **WITHOUT_REFERENCE}


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mean(numbers):
    return torch.tensor(math.fsum(numbers) / len(numbers), dtype=torch.float64)


def deltas(inputs):
    """The differences of log-ratios as Python floats."""
    return [(c - rc) - (r - rr) for c, r, rc, rr in zip(*[x.tolist() for x in inputs], strict=True)]


def with_delta(*wanted):
    """Four inputs whose differences of log-ratios are the given numbers: (2 - 1 + delta) - (5 - 4)."""
    delta = double(*wanted)
    return [2.0 + delta, torch.full_like(delta, 5.0), torch.full_like(delta, 1.0), torch.full_like(delta, 4.0)]


def check_against(function, inputs, loss_of_delta, slope_of_delta):
    """Value and gradients of a loss of the difference alone: opposite for chosen and rejected."""
    value, gradients = pair_gradients(function, inputs)
    close(value, mean([loss_of_delta(d) for d in deltas(inputs)]))
    expected = double(*[slope_of_delta(d) / len(inputs[0]) for d in deltas(inputs)])
    close(gradients[0], expected)
    close(gradients[1], -expected)


# ---- laws of a batch of pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@given(inputs=pairs(), seed=seeds)
@few
def test_pair_order_changes_nothing(name, inputs, seed):
    pair_permutation_law(LOSSES[name], inputs, seed)


@pytest.mark.parametrize("name", LOSSES)
@given(inputs=pairs(min_pairs=2), size=st.integers(1, 3))
@few
def test_micro_batches_add_up(name, inputs, size):
    pair_split_law(LOSSES[name], inputs, size)


@pytest.mark.parametrize("name", WITH_REFERENCE)
@given(inputs=pairs(), shift=st.floats(-20, 20))
@few
def test_only_the_difference_of_log_ratios_matters(name, inputs, shift):
    """What policy and reference share, and what chosen and rejected share, cancels."""
    chosen, rejected, ref_chosen, ref_rejected = inputs
    value = WITH_REFERENCE[name](inputs, None)
    both_models = [chosen + shift, rejected - shift, ref_chosen + shift, ref_rejected - shift]
    both_responses = [chosen + shift, rejected + shift, ref_chosen, ref_rejected]
    for other in (both_models, both_responses):
        # The shift of up to 20 costs two digits.
        torch.testing.assert_close(WITH_REFERENCE[name](other, None), value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_give_zero_and_no_gradient(name):
    value, gradients = pair_gradients(LOSSES[name], [torch.zeros(0)] * 4)
    assert value.item() == 0.0 and all(g.shape == (0,) for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_half_types_are_computed_in_float32(name):
    if name == "kto":
        x, y = normal(4, seed=0), normal(4, seed=1)
        desirable = torch.tensor([True, False, True, False])
        half_law(lambda *inputs: dpo.kto_loss(*inputs, desirable, Z0.float(), beta=BETA), [x, y])
        half_law(dpo.kto_reference_point, [x + 9, y])
    else:
        half_law(lambda *x: LOSSES[name](list(x), None), [normal(4, seed=seed) for seed in range(4)])


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_reference_gets_no_gradient(name):
    inputs = [normal(3, seed=seed).requires_grad_() for seed in range(4)]
    WITH_REFERENCE[name](inputs, None).backward()
    assert inputs[0].grad.any() and inputs[1].grad.any()
    assert inputs[2].grad is None and inputs[3].grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_or_per_token_logprobs_are_refused(name):
    for short in range(4):
        inputs = [torch.zeros(1 if i == short else 3) for i in range(4)]
        with pytest.raises(ValueError, match=r"has shape \((1|3),\) but .* has shape \((1|3),\)"):
            LOSSES[name](inputs, None)
    with pytest.raises(ValueError, match=r"has shape \(3, 2\); pass one number per sequence"):
        LOSSES[name]([torch.zeros(3, 2)] * 4, None)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    inputs = [normal(5, seed=seed) for seed in range(4)]
    leaves = tuple(x.requires_grad_() for x in inputs[:2])
    gradcheck(lambda a, b: LOSSES[name]([a, b, *inputs[2:]], None), leaves)


@pytest.mark.parametrize("name", [*WITH_REFERENCE, "implicit_rewards", "kto", "simpo"])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(name, beta):
    x = [torch.zeros(2)] * 4
    call = {
        "dpo": lambda: dpo.dpo_loss(*x, beta=beta),
        "cdpo": lambda: dpo.dpo_loss(*x, beta=beta, label_smoothing=0.1),
        "robust": lambda: dpo.robust_dpo_loss(*x, beta=beta, label_smoothing=0.1),
        "ipo": lambda: dpo.ipo_loss(*x, beta=beta),
        "hinge": lambda: dpo.hinge_loss(*x, beta=beta),
        "implicit_rewards": lambda: dpo.implicit_rewards(*x, beta=beta),
        "kto": lambda: dpo.kto_loss(*x[:2], x[0] > 0, Z0, beta=beta),
        "simpo": lambda: dpo.simpo_loss(*x, beta=beta, gamma=0.5),
    }[name]
    with pytest.raises(ValueError, match="beta is .*; it must be above 0"):
        call()


# ---- DPO and cDPO ------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    # beta 1/2, delta = (-4 - -6) - (-7 - -5) = 4, h = 2: -ln sigmoid(2) = ln(1 + e^-2)
    inputs = [double(-4.0), double(-7.0), double(-6.0), double(-5.0)]
    assert dpo.dpo_loss(*inputs, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-15)
    # cDPO, e = 1/4: adds a quarter of h
    smoothed = dpo.dpo_loss(*inputs, beta=0.5, label_smoothing=0.25).item()
    assert smoothed == pytest.approx(math.log1p(math.exp(-2)) + 0.25 * 2, abs=1e-15)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_dpo_starts_at_ln_2_with_gradient_half_beta(label_smoothing):
    logprobs = normal(3, seed=0)
    leaf = logprobs.clone().requires_grad_()
    value = dpo.dpo_loss(leaf, logprobs, logprobs, logprobs, beta=0.1, label_smoothing=label_smoothing)
    value.backward()
    assert value.item() == pytest.approx(LN2, abs=1e-15)
    close(leaf.grad, torch.full((3,), -(0.5 - label_smoothing) * 0.1 / 3, dtype=torch.float64))


@given(pairs(), st.floats(0.01, 1), st.floats(0, 0.5))
@some
def test_dpo_and_its_gradient_follow_their_definition(inputs, beta, e):
    check_against(
        lambda x, d: dpo.dpo_loss(*x, beta=beta, label_smoothing=e),
        inputs,
        lambda d: -(1 - e) * math.log(sigmoid(beta * d)) - e * math.log(sigmoid(-beta * d)),
        lambda d: -beta * ((1 - e) * sigmoid(-beta * d) - e * sigmoid(beta * d)),
    )


@given(st.floats(0.05, 0.45), st.floats(0.05, 1))
@some
def test_cdpo_is_least_where_the_labels_are_right_as_often_as_they_are(e, beta):
    best = math.log((1 - e) / e) / beta
    leaf = with_delta(best)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(dpo.dpo_loss(leaf, *with_delta(0.0)[1:], beta=beta, label_smoothing=e), leaf)
    assert abs(gradient.item()) < 1e-14


@given(st.floats(-20, 20))
@some
def test_labels_that_say_nothing_make_cdpo_even(delta):
    there, back = (dpo.dpo_loss(*with_delta(d), beta=0.7, label_smoothing=0.5) for d in (delta, -delta))
    close(there, back)


@pytest.mark.parametrize(("delta", "loss", "gradient"), [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)])
def test_extreme_differences_stay_finite(delta, loss, gradient):
    chosen, zero = torch.tensor([delta], requires_grad=True), torch.zeros(1)
    value = dpo.dpo_loss(chosen, zero, zero, zero, beta=1.0)
    value.backward()
    assert value.item() == loss and chosen.grad.item() == gradient


@pytest.mark.parametrize("label_smoothing", [-0.01, 0.51, float("nan")])
@pytest.mark.parametrize("function", [dpo.dpo_loss, dpo.robust_dpo_loss])
def test_label_smoothing_out_of_range_is_refused(function, label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing is .*; it must lie between 0.0 and 0.5"):
        function(*[torch.zeros(2)] * 4, beta=0.1, label_smoothing=label_smoothing)


def test_length_matters():
    """The same tokens twice have twice the log-ratio: h is a sum over tokens, not a mean."""
    # log-ratio of 0.2 a token for 5 tokens, and of 0 for the rejected: h = 1; with a mean it would be 0.2
    chosen, zero = double(5 * -1.0), double(0.0)
    assert dpo.dpo_loss(chosen, zero, double(5 * -1.2), zero, beta=1.0).item() == pytest.approx(-math.log(sigmoid(1)))


# ---- robust DPO --------------------------------------------------------------------------------------------------


def test_robust_by_hand():
    # e = 1/4, h = ln 3: [3/4 ln 4/3 - 1/4 ln 4] / (1/2) = 3/2 ln 4/3 - 1/2 ln 4
    value = dpo.robust_dpo_loss(*with_delta(math.log(3)), beta=1.0, label_smoothing=0.25).item()
    assert value == pytest.approx(1.5 * math.log(4 / 3) - 0.5 * math.log(4), abs=1e-14)


@given(pairs(), st.floats(0.01, 1), st.floats(0, 0.49))
@some
def test_robust_follows_its_definition(inputs, beta, e):
    check_against(
        lambda x, d: dpo.robust_dpo_loss(*x, beta=beta, label_smoothing=e),
        inputs,
        lambda d: (-(1 - e) * math.log(sigmoid(beta * d)) + e * math.log(sigmoid(-beta * d))) / (1 - 2 * e),
        lambda d: -beta * ((1 - e) * sigmoid(-beta * d) + e * sigmoid(beta * d)) / (1 - 2 * e),
    )


@given(pairs(), st.floats(0, 0.45))
@some
def test_robust_is_the_clean_loss_on_average_over_flips(inputs, e):
    chosen, rejected, ref_chosen, ref_rejected = inputs
    kept = dpo.robust_dpo_loss(*inputs, beta=BETA, label_smoothing=e)
    flipped = dpo.robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=BETA, label_smoothing=e)
    # Dividing by 1 - 2e (0.1 at the least) costs a digit.
    clean = dpo.dpo_loss(*inputs, beta=BETA)
    torch.testing.assert_close((1 - e) * kept + e * flipped, clean, rtol=1e-11, atol=1e-11)


def test_robust_without_flips_is_dpo_and_half_flipped_is_refused():
    inputs = with_delta(1.0, -2.0)
    close(dpo.robust_dpo_loss(*inputs, beta=BETA, label_smoothing=0.0), dpo.dpo_loss(*inputs, beta=BETA))
    with pytest.raises(ValueError, match="label_smoothing is 0.5; labels that are flipped half of the time"):
        dpo.robust_dpo_loss(*inputs, beta=BETA, label_smoothing=0.5)


# ---- IPO and hinge -----------------------------------------------------------------------------------------------


def test_ipo_by_hand():
    # beta 1/4: the target is 2; delta 5 -> 9, delta 2 -> 0
    assert dpo.ipo_loss(*with_delta(5.0, 2.0), beta=0.25).item() == 4.5
    # policy equal to reference: (1 / (2 beta))^2
    assert dpo.ipo_loss(*with_delta(0.0), beta=0.1).item() == pytest.approx(25.0, abs=1e-12)


@given(pairs(), st.floats(0.05, 1))
@some
def test_ipo_follows_its_definition(inputs, beta):
    def ipo(x, denominator):
        return dpo.ipo_loss(*x, beta=beta)

    check_against(ipo, inputs, lambda d: (d - 0.5 / beta) ** 2, lambda d: 2 * (d - 0.5 / beta))


def test_hinge_by_hand():
    # beta 1/2: h = -1, 1/2, 3 -> 2, 1/2, 0
    assert dpo.hinge_loss(*with_delta(-2.0, 1.0, 6.0), beta=0.5).item() == pytest.approx(2.5 / 3, abs=1e-15)


@given(pairs(), st.floats(0.05, 1))
@some
def test_hinge_follows_its_definition(inputs, beta):
    def hinge(x, denominator):
        return dpo.hinge_loss(*x, beta=beta)

    check_against(hinge, inputs, lambda d: max(0.0, 1 - beta * d), lambda d: -beta if beta * d < 1 else 0.0)


# ---- KTO ---------------------------------------------------------------------------------------------------------


def test_kto_by_hand():
    # beta 1/2, z0 = 1. Desirable with log-ratio 1 + 2 ln 3: gain ln 3, 1 - 3/4 = 1/4, weighted 2 -> 1/2.
    # Undesirable with the same: 1 - sigmoid(-ln 3) = 3/4, weighted 4 -> 3.  Mean 7/4.
    logprobs, ref_logprobs = double(2 * math.log(3), 1.0), double(-1.0, -2 * math.log(3))
    value = dpo.kto_loss(
        logprobs,
        ref_logprobs,
        torch.tensor([True, False]),
        double(1.0)[0],
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=4.0,
    )
    assert value.item() == pytest.approx(1.75, abs=1e-14)


@given(pairs(), st.floats(0.05, 1), st.floats(0, 2), st.floats(0.5, 2), st.floats(0.5, 2))
@some
def test_kto_and_its_gradient_follow_their_definition(inputs, beta, z0, desirable_weight, undesirable_weight):
    desirable = inputs[2] > 0
    losses, slopes = [], []
    for logprob, ref, good in zip(inputs[0].tolist(), inputs[1].tolist(), desirable.tolist(), strict=True):
        sign, weight = (1, desirable_weight) if good else (-1, undesirable_weight)
        value = sigmoid(sign * beta * (logprob - ref - z0))
        losses.append(weight * (1 - value))
        slopes.append(-weight * sign * beta * value * (1 - value) / len(desirable))
    leaf, ref_leaf = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    point = double(z0)[0].requires_grad_()
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    value = dpo.kto_loss(leaf, ref_leaf, desirable, point, beta=beta, **weights)
    value.backward()
    close(value.detach(), mean(losses))
    close(leaf.grad, double(*slopes))
    assert ref_leaf.grad is None and point.grad is None


def test_kto_starts_at_one_half():
    zeros = torch.zeros(2)
    assert dpo.kto_loss(zeros, zeros, torch.tensor([True, False]), torch.zeros(()), beta=0.1).item() == 0.5


def test_kto_keeps_its_digits_for_a_large_gain():
    # 1 - sigmoid(40) is 0 in float32; the loss is e^-40
    value = dpo.kto_loss(torch.tensor([40.0]), torch.zeros(1), torch.tensor([True]), torch.zeros(()), beta=1.0)
    assert value.item() == pytest.approx(math.exp(-40), rel=1e-5)


def test_the_kto_reference_point_by_hand():
    # log-ratios 3 and -1: mean 1; the other way round the mean is -1, and a KL is not negative
    logprobs, ref_logprobs = double(1.0, 0.0).requires_grad_(), double(-2.0, 1.0)
    point = dpo.kto_reference_point(logprobs, ref_logprobs)
    assert point.item() == 1.0 and point.dim() == 0 and not point.requires_grad
    assert dpo.kto_reference_point(ref_logprobs, logprobs).item() == 0.0


def test_kto_refuses_what_would_be_nonsense():
    x, desirable = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(TypeError, match="desirable has dtype torch.int64; pass bool"):
        dpo.kto_loss(x, x, desirable.long(), Z0, beta=0.1)
    with pytest.raises(ValueError, match=r"reference_point has shape \(2,\); pass one 0-d tensor"):
        dpo.kto_loss(x, x, desirable, x, beta=0.1)
    with pytest.raises(ValueError, match=r"desirable has shape \(1,\) but logprobs has shape \(2,\)"):
        dpo.kto_loss(x, x, desirable[:1], Z0, beta=0.1)
    for name in ("desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=f"{name} is 0.0; it must be above 0"):
            dpo.kto_loss(x, x, desirable, Z0, beta=0.1, **{name: 0.0})
    with pytest.raises(ValueError, match="N is 1; mismatched pairs need a batch of 2 or more"):
        dpo.kto_reference_point(x[:1], x[:1])
    with pytest.raises(ValueError, match=r"ref_mismatched_logprobs has shape \(1,\)"):
        dpo.kto_reference_point(x, x[:1])


# ---- ORPO and SimPO ----------------------------------------------------------------------------------------------


def test_orpo_by_hand():
    # two tokens of probability 3/4 each: odds 3; one of 1/2: odds 1. -ln 3/4 - lam ln sigmoid(ln 3) = (1 + lam) ln 4/3
    chosen, rejected = 2 * double(0.75).log(), double(0.5).log()
    value = dpo.orpo_loss(chosen, rejected, torch.tensor([2]), torch.tensor([1]), lam=0.5).item()
    assert value == pytest.approx(1.5 * math.log(4 / 3), abs=1e-15)


@given(pairs(), st.floats(0.05, 2))
@some
def test_orpo_follows_its_definition(inputs, lam):
    chosen, rejected, losses = -inputs[0].abs() - 0.01, -inputs[1].abs() - 0.01, []
    counts = lengths(inputs[2]), lengths(inputs[3])
    for c, r, n, m in zip(*[x.tolist() for x in (chosen, rejected, *counts)], strict=True):
        p, q = math.exp(c / n), math.exp(r / m)
        odds_ratio = (p / (1 - p)) / (q / (1 - q))
        losses.append(-math.log(p) - lam * math.log(odds_ratio / (1 + odds_ratio)))
    value = dpo.orpo_loss(chosen, rejected, *counts, lam=lam)
    # The naive 1 - p of this definition loses two digits where p is near 1.
    torch.testing.assert_close(value, mean(losses), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("logprob", [-1e-9, -1e-3, -0.69, -LN2, -0.70, -40.0, -800.0])
def test_orpo_keeps_its_digits_at_both_ends(logprob):
    """log odds against -40 nats: l - log(1 - e^l), with the slope 1 / (1 - e^l)."""
    one = torch.tensor([1])
    leaf = double(logprob).requires_grad_()
    value = dpo.orpo_loss(double(-1.0), leaf, one, one, lam=1.0)
    value.backward()
    log1mexp = math.log(-math.expm1(logprob)) if logprob > -1 else math.log1p(-math.exp(logprob))
    difference = -1.0 - math.log(-math.expm1(-1.0)) - (logprob - log1mexp)
    softplus = max(-difference, 0.0) + math.log1p(math.exp(-abs(difference)))
    assert value.item() == pytest.approx(1.0 + softplus, rel=1e-12)
    probability = math.exp(-softplus)  # sigmoid of the difference
    slope = (1 - probability) / -math.expm1(logprob)
    # 1 - probability loses digits where the probability is near 1.
    assert leaf.grad.item() == pytest.approx(slope, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_stays_finite_at_probability_one(dtype):
    certain = torch.zeros(1, dtype=dtype, requires_grad=True)
    other = torch.full((1,), -3.0, dtype=dtype, requires_grad=True)
    one = torch.tensor([1])
    for chosen, rejected in [(certain, other), (other, certain)]:
        value = dpo.orpo_loss(chosen, rejected, one, one, lam=1.0)
        gradients = torch.autograd.grad(value, (certain, other))
        assert all(torch.isfinite(x).all() for x in (value, *gradients))


def test_orpo_refuses_what_would_be_nonsense():
    x, one = torch.zeros(2), torch.ones(2)
    for lam in (0.0, -0.1):
        with pytest.raises(ValueError, match="lam is .*; it must be above 0"):
            dpo.orpo_loss(x, x, one, one, lam=lam)


def test_simpo_by_hand():
    # means -1 and -2, beta 2, gamma 2 - ln 3: h = 2 * 1 - gamma = ln 3, -ln 3/4
    chosen, rejected = double(-3.0), double(-4.0)
    value = dpo.simpo_loss(chosen, rejected, torch.tensor([3]), torch.tensor([2]), beta=2.0, gamma=2 - math.log(3))
    assert value.item() == pytest.approx(math.log(4 / 3), abs=1e-15)


@given(pairs(), st.floats(0.5, 3), st.floats(0, 2))
@some
def test_simpo_and_its_gradient_follow_their_definition(inputs, beta, gamma):
    counts = lengths(inputs[2]), lengths(inputs[3])
    rows = list(zip(*[x.tolist() for x in (*inputs[:2], *counts)], strict=True))
    margins = [beta * (c / n - r / m) - gamma for c, r, n, m in rows]
    value, gradients = pair_gradients(lambda x, d: dpo.simpo_loss(*x[:2], *counts, beta=beta, gamma=gamma), inputs)
    close(value, mean([-math.log(sigmoid(h)) for h in margins]))
    slopes = [-beta * sigmoid(-h) / len(rows) for h in margins]
    close(gradients[0], double(*slopes) / counts[0])
    close(gradients[1], -double(*slopes) / counts[1])


def test_simpo_takes_no_negative_margin():
    x, one = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match="gamma is -0.1; it must lie between 0.0 and inf"):
        dpo.simpo_loss(x, x, one, one, beta=2.0, gamma=-0.1)


# ---- implicit rewards --------------------------------------------------------------------------------------------


def test_implicit_rewards_by_hand():
    # beta 1/2: 1/2 (-4 - -6) = 1 and 1/2 (-7 - -5) = -1
    inputs = [double(-4.0).requires_grad_(), double(-7.0).requires_grad_(), double(-6.0), double(-5.0)]
    chosen, rejected = dpo.implicit_rewards(*inputs, beta=0.5)
    assert (chosen.tolist(), rejected.tolist()) == ([1.0], [-1.0])
    assert not chosen.requires_grad and not rejected.requires_grad


@given(pairs(), st.floats(0.05, 1))
@some
def test_dpo_is_bradley_terry_on_the_implicit_rewards(inputs, beta):
    chosen, rejected = dpo.implicit_rewards(*inputs, beta=beta)
    differences = [a - b for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    close(dpo.dpo_loss(*inputs, beta=beta), mean([-math.log(sigmoid(d)) for d in differences]))

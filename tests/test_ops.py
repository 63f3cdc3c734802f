"""The shared operations: shift, masked reductions, KL estimators, entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Padded,
    close,
    few,
    garbage,
    half_law,
    normal,
    padded,
    padding_content_law,
    padding_width_law,
    permutation_law,
    seeds,
    some,
    split_law,
    value_and_gradient,
)
from torch.autograd import gradcheck

from minirlhf import ops

NAN, INF = float("nan"), float("inf")

MASKED = {
    "masked_mean": lambda case, denominator: ops.masked_mean(case.inputs[0], case.mask, denominator=denominator),
    "whiten": lambda case, denominator: ops.whiten(case.inputs[0], case.mask),
    "rescale": lambda case, denominator: ops.rescale(case.inputs[0], case.mask),
}
KL = {"k1": ops.kl_k1, "k2": ops.kl_k2, "k3": ops.kl_k3}


def masked_numbers(x, mask):
    """The masked elements as Python floats, row by row."""
    return [x[b][t].item() for b in range(len(x)) for t in range(len(x[b])) if mask[b][t]]


def softmax(logits):
    total = math.fsum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


# ---- masked_mean and mean ----------------------------------------------------------------------------------------


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, NAN, 4.0], [INF, 7.0, -INF]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert ops.masked_mean(x, mask).item() == 4.0  # (1 + 4 + 7) / 3
    assert ops.masked_mean(x, mask, denominator=6).item() == 2.0  # 12 / 6
    assert ops.masked_mean(x, mask, denominator=torch.tensor(24)).item() == 0.5  # 12 / 24


def test_select_by_hand():
    x, mask = torch.tensor([1.5, NAN, -INF]), torch.tensor([True, False, False])
    assert ops.select(x, mask).tolist() == [1.5, 0.0, 0.0]
    assert ops.select(x.bfloat16(), mask).dtype == torch.float32


def test_mean_by_hand():
    x = torch.tensor([1.0, 2.0, 6.0])
    assert ops.mean(x).item() == 3.0
    assert ops.mean(x, denominator=0.5).item() == 18.0


@given(padded())
@some
def test_masked_mean_is_the_mean_of_the_masked_numbers(case):
    numbers = masked_numbers(case.inputs[0], case.mask)
    expected = math.fsum(numbers) / max(len(numbers), 1)
    close(ops.masked_mean(case.inputs[0], case.mask), torch.tensor(expected, dtype=torch.float64))


@given(padded())
@some
def test_masked_mean_has_the_gradient_one_over_the_count(case):
    _, gradient = value_and_gradient(MASKED["masked_mean"], case)
    close(gradient, case.mask.double() / max(int(case.mask.sum()), 1))


def test_masked_mean_counts_a_bool():
    """A share of tokens: bool input, as in clip fractions."""
    mask = torch.tensor([True, True, True, False])
    assert ops.masked_mean(torch.tensor([True, False, False, True]), mask).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", MASKED)
def test_an_empty_mask_gives_zero_and_a_zero_gradient(name):
    case = Padded(torch.zeros(2, 3, dtype=torch.bool), [torch.full((2, 3), NAN)], torch.zeros(2))
    value, gradient = value_and_gradient(MASKED[name], case)
    assert not value.any() and not gradient.any()


def test_no_elements_give_zero():
    x = torch.zeros(0, requires_grad=True)
    ops.mean(x).backward()
    assert ops.mean(x).item() == 0.0 and x.grad.shape == (0,)


@pytest.mark.parametrize("denominator", [0, -1.0, NAN])
def test_a_denominator_that_is_not_positive_is_refused(denominator):
    with pytest.raises(ValueError, match="denominator is .*; it must be above 0"):
        ops.mean(torch.ones(2), denominator=denominator)


def test_a_denominator_for_each_row_is_refused():
    with pytest.raises(ValueError, match=r"denominator has shape \(2,\)"):
        ops.mean(torch.ones(2), denominator=torch.ones(2))


# ---- whiten and rescale ------------------------------------------------------------------------------------------

NINE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)


def test_rescale_by_hand():
    # mean 1.6, biased variance (2/9)(0.16 + 0.09 + 0.04 + 0.01) = 1/15; (1.2 - 1.6) sqrt(15) + 1.6 = 0.0508
    # The unbiased variance would give 0.1394, 0.5046, 0.8697.
    result = ops.rescale(NINE, torch.ones(3, 3, dtype=torch.bool))
    expected = torch.tensor([0.0508, 0.4381, 0.8254], dtype=torch.float64)
    torch.testing.assert_close(result[0], expected, rtol=0, atol=5e-5)  # four decimals are given
    assert result.mean().item() == pytest.approx(1.6, abs=1e-12)


def test_whiten_by_hand():
    # mean 2, biased variance 1 -> -1, 1; the third element is padding
    x = torch.tensor([[1.0, 3.0, NAN]], dtype=torch.float64)
    result = ops.whiten(x, torch.tensor([[True, True, False]]))
    close(result, torch.tensor([[-1.0, 1.0, 0.0]], dtype=torch.float64) / math.sqrt(1 + 1e-8))


def test_the_epsilon_stands_inside_the_root():
    # mean 0, variance 1e-8 -> 1e-4 / sqrt(2e-8) = 1 / sqrt(2); outside the root it would be 0.9999
    x = torch.tensor([1e-4, -1e-4], dtype=torch.float64)
    close(ops.whiten(x, torch.tensor([True, True])), torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2))


@given(padded())
@some
def test_whiten_and_rescale_follow_their_definition(case):
    x, mask = case.inputs[0], case.mask
    numbers = masked_numbers(x, mask)
    mean = math.fsum(numbers) / max(len(numbers), 1)
    variance = math.fsum((n - mean) ** 2 for n in numbers) / max(len(numbers), 1)
    whitened, rescaled = torch.zeros_like(x), torch.zeros_like(x)
    for b, t in mask.nonzero().tolist():
        whitened[b, t] = (x[b, t].item() - mean) / math.sqrt(variance + 1e-8)
        rescaled[b, t] = whitened[b, t].item() + mean
    close(ops.whiten(x, mask), whitened)
    close(ops.rescale(x, mask), rescaled)


@given(padded(), st.floats(0.1, 10), st.floats(-5, 5))
@some
def test_whitening_forgets_shift_and_scale(case, scale, shift):
    x, mask = case.inputs[0], case.mask
    # The epsilon is 1e-8 of the variance's unit, so equality holds to that order and not to rounding.
    if mask.sum() > 1 and x[mask].var() > 1e-2:
        torch.testing.assert_close(ops.whiten(scale * x + shift, mask), ops.whiten(x, mask), rtol=1e-3, atol=1e-4)
    close(ops.whiten(-x, mask), -ops.whiten(x, mask))


@given(padded())
@some
def test_whitened_numbers_have_mean_zero_and_deviation_one(case):
    x, mask = case.inputs[0], case.mask
    whitened = ops.whiten(x, mask)
    close(ops.masked_mean(whitened, mask), torch.zeros((), dtype=torch.float64))
    variance = ops.masked_mean((x - ops.masked_mean(x, mask)).square(), mask)
    close(ops.masked_mean(whitened.square(), mask), variance / (variance + 1e-8))


def test_one_element_is_whitened_to_zero_and_rescaled_to_itself():
    x, mask = torch.tensor([[5.0, 3.0]]), torch.tensor([[False, True]])
    assert ops.whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert ops.rescale(x, mask).tolist() == [[0.0, 3.0]]


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


@given(case=padded(min_rows=2), size=st.integers(1, 2))
@some
def test_micro_batches_add_up(case, size):
    split_law(MASKED["masked_mean"], case, max(int(case.mask.sum()), 1), size)
    split_law(MASKED["masked_mean"], case, case.mask.sum().clamp(min=1), size)


@pytest.mark.parametrize("function", [ops.masked_mean, ops.whiten, ops.rescale])
def test_a_mask_must_be_bool_and_of_the_same_shape(function):
    with pytest.raises(TypeError, match="mask has dtype torch.int64; pass a bool mask"):
        function(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long))
    # (1, 3) would broadcast to a plausible number
    with pytest.raises(ValueError, match=r"x has shape \(1, 3\) but mask has shape \(2, 3\)"):
        function(torch.ones(1, 3), torch.ones(2, 3, dtype=torch.bool))


# ---- token_logprobs and entropy ----------------------------------------------------------------------------------


def test_token_logprobs_by_hand():
    # V = 2. Position 0 says p = (1/4, 3/4), position 1 says (1/2, 1/2); the last position scores nothing.
    logits = torch.tensor([[[0.0, math.log(3)], [2.0, 2.0], [9.0, -9.0]]], dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 0]])
    close(ops.token_logprobs(logits, tokens), torch.tensor([[0.75, 0.5]], dtype=torch.float64).log())


@given(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(2, 5), st.sampled_from([torch.int64, torch.int32]))
@some
def test_token_logprobs_follow_their_definition(seed, rows, width, vocabulary, dtype):
    logits = 3 * normal(rows, width, vocabulary, seed=seed)
    tokens = torch.randint(vocabulary, (rows, width), generator=torch.Generator().manual_seed(seed)).to(dtype)
    result = ops.token_logprobs(logits, tokens)
    assert result.shape == (rows, width - 1)
    for b in range(rows):
        for t in range(width - 1):
            expected = math.log(softmax(logits[b, t].tolist())[tokens[b, t + 1]])
            assert result[b, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(seeds, st.integers(2, 5))
@some
def test_all_next_tokens_together_have_probability_one(seed, vocabulary):
    logits = normal(1, 2, vocabulary, seed=seed).expand(vocabulary, 2, vocabulary)
    tokens = torch.stack([torch.zeros(vocabulary, dtype=torch.long), torch.arange(vocabulary)], dim=1)
    close(ops.token_logprobs(logits, tokens).exp().sum(), torch.ones((), dtype=torch.float64))


def test_a_uniform_model_pays_log_v_a_token():
    logprobs = ops.token_logprobs(torch.zeros(1, 6, 7), torch.tensor([[0, 1, 2, 3, 4, 5]]))
    assert logprobs.sum().item() == pytest.approx(-5 * math.log(7), rel=1e-6)


def test_token_logprobs_keep_their_digits_at_large_logits():
    logits = torch.tensor([[[1e4, 1e4 + 1], [0.0, 0.0]]])
    assert ops.token_logprobs(logits, torch.tensor([[0, 0]])).item() == pytest.approx(-math.log1p(math.e), rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 4), (2, 2), (3, 3)])
def test_token_logprobs_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match=r"pass \(B, T, V\) and \(B, T\)"):
        ops.token_logprobs(torch.zeros(2, 3, 5), torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"pass \(B, T, V\) and \(B, T\)"):
        ops.token_logprobs(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long))


def test_entropy_by_hand():
    # p = (1/2, 1/4, 1/4): H = 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2
    logits = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64).log()
    close(ops.entropy(logits), torch.tensor(1.5 * math.log(2), dtype=torch.float64))
    close(ops.entropy(torch.zeros(2, 3, 5, dtype=torch.float64)), torch.full((2, 3), math.log(5), dtype=torch.float64))


@given(seeds, st.integers(1, 4), st.integers(1, 6))
@some
def test_entropy_follows_its_definition(seed, rows, vocabulary):
    logits = 3 * normal(rows, vocabulary, seed=seed)
    expected = [-math.fsum(p * math.log(p) for p in softmax(row)) for row in logits.tolist()]
    close(ops.entropy(logits), torch.tensor(expected, dtype=torch.float64))
    close(ops.entropy(logits + 5.0), ops.entropy(logits))


@given(seeds, st.integers(2, 5))
@some
def test_entropy_is_the_expected_surprise_of_its_own_tokens(seed, vocabulary):
    logits = normal(vocabulary, seed=seed)
    rows = logits.expand(vocabulary, 2, vocabulary)
    tokens = torch.stack([torch.zeros(vocabulary, dtype=torch.long), torch.arange(vocabulary)], dim=1)
    logprobs = ops.token_logprobs(rows, tokens)[:, 0]
    close(-(logprobs.exp() * logprobs).sum(), ops.entropy(logits))


def test_an_impossible_token_adds_nothing_to_the_entropy_nor_to_its_gradient():
    logits = torch.tensor([0.0, 1.0, -INF], dtype=torch.float64, requires_grad=True)
    two = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    close(ops.entropy(logits), ops.entropy(two))
    ops.entropy(logits).backward()
    ops.entropy(two).backward()
    close(logits.grad, torch.cat([two.grad, torch.zeros(1, dtype=torch.float64)]))


# ---- the KL estimators -------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    # pi = 1/2, ref = 1/4: log ratio ln 2; k3 = 1/2 - 1 + ln 2
    logprobs, ref_logprobs = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    assert ops.kl_k1(logprobs, ref_logprobs).item() == pytest.approx(math.log(2), abs=1e-15)
    assert ops.kl_k2(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) ** 2 / 2, abs=1e-15)
    assert ops.kl_k3(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) - 0.5, abs=1e-15)


def test_log_ratio_by_hand():
    # in bfloat16 the difference would be rounded to 8 bits
    numerator, denominator = torch.tensor([3.0, 1.0]).bfloat16(), torch.tensor([0.01, 0.5]).bfloat16()
    assert ops.log_ratio(numerator, denominator).tolist() == [3.0 - denominator[0].item(), 0.5]


def test_kl_estimators_on_three_tokens():
    # pi = (1/2, 1/3, 1/6), ref = (1/6, 1/3, 1/2): KL = 1/2 ln 3 - 1/6 ln 3 = 1/3 ln 3;
    # E[k2] = 1/2 (1/2 + 1/6) ln^2 3 = 1/3 ln^2 3
    p = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64) / 6
    means = {name: (p * estimator(p.log(), p.flip(0).log())).sum().item() for name, estimator in KL.items()}
    kl = math.log(3) / 3
    assert means == pytest.approx({"k1": kl, "k2": kl * math.log(3), "k3": kl}, abs=1e-15)


@given(seeds, st.integers(2, 6))
@some
def test_k1_and_k3_have_the_expectation_kl(seed, vocabulary):
    p, q = (softmax((2 * normal(vocabulary, seed=s)).tolist()) for s in (seed, seed + 1))
    kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    for estimator in (ops.kl_k1, ops.kl_k3):
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(kl, rel=1e-12, abs=1e-12)


@given(padded())
@some
def test_kl_estimators_follow_their_definitions(case):
    logprobs, ref_logprobs = case.inputs[:2]
    difference = [
        [(a - b).item() for a, b in zip(*rows, strict=True)] for rows in zip(logprobs, ref_logprobs, strict=True)
    ]
    close(ops.kl_k1(logprobs, ref_logprobs), torch.tensor(difference, dtype=torch.float64))
    k2 = [[d * d / 2 for d in row] for row in difference]
    close(ops.kl_k2(logprobs, ref_logprobs), torch.tensor(k2, dtype=torch.float64))
    k3 = [[math.exp(-d) - 1 + d for d in row] for row in difference]
    close(ops.kl_k3(logprobs, ref_logprobs), torch.tensor(k3, dtype=torch.float64))


@given(padded())
@some
def test_k2_and_k3_are_never_negative_and_zero_for_equal_policies(case):
    a, b = case.inputs[:2]
    for estimator in (ops.kl_k2, ops.kl_k3):
        assert (estimator(a, b) >= 0).all()
    for estimator in KL.values():
        assert not estimator(a, a).any()


def test_k3_keeps_its_digits_for_small_differences():
    # d^2 / 2 = 5e-9 at d = 1e-4; exp(x) - 1 in float32 would be off by more than that
    value = ops.kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0001]))
    difference = torch.tensor([-1.0]) - torch.tensor([-1.0001])  # as float32 rounds it
    torch.testing.assert_close(value, difference.square() / 2, rtol=1e-2, atol=0)  # two terms of like size cancel


@pytest.mark.parametrize("estimator", KL.values())
def test_kl_estimators_refuse_unequal_shapes(estimator):
    with pytest.raises(ValueError, match=r"logprobs has shape .* but .*logprobs has shape"):
        estimator(torch.zeros(2, 3), torch.zeros(1, 3))


# ---- dtypes, gradients, checks -----------------------------------------------------------------------------------


def test_half_types_are_computed_in_float32():
    x, y = normal(2, 3, seed=0), normal(2, 3, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for estimator in KL.values():
        half_law(estimator, [x, y])
    for function in (ops.masked_mean, ops.whiten, ops.rescale):
        half_law(function, [x, mask])
    half_law(ops.mean, [x])
    half_law(ops.entropy, [x])
    half_law(ops.token_logprobs, [normal(2, 3, 5, seed=2), torch.tensor([[0, 1, 2], [3, 4, 0]])])


def test_gradients_are_those_of_finite_differences():
    x, y = normal(2, 3, seed=0).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for estimator in KL.values():
        gradcheck(estimator, (x, y))
    for function in (ops.masked_mean, ops.whiten, ops.rescale):
        gradcheck(function, (x, mask))
    gradcheck(ops.mean, (x,))
    gradcheck(ops.entropy, (x,))
    logits = normal(2, 3, 4, seed=2).requires_grad_()
    gradcheck(ops.token_logprobs, (logits, torch.tensor([[0, 1, 2], [3, 0, 0]])))


def test_checks_name_what_is_wrong():
    for number in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="beta is .*; it must be above 0"):
            ops.check_positive(lam=1e-9, beta=number)
    for number in (-1e-9, 1.5, NAN):
        with pytest.raises(ValueError, match="gamma is .*; it must lie between 0.0 and 1.0"):
            ops.check_between(0.0, 1.0, lam=0.0, gamma=number)
    ops.check_between(0.0, 1.0, lam=0.0, gamma=1.0)
    with pytest.raises(ValueError, match=r"a has shape \(2, 3\); pass one number per sequence, shape \(N,\)"):
        ops.check_pairs(a=torch.zeros(2, 3), b=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"c has shape \(1,\) but a has shape \(2,\)"):
        ops.check_pairs(a=torch.zeros(2), b=torch.zeros(2), c=torch.zeros(1))

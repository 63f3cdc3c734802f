"""The reward model's losses: Bradley-Terry with margin, centring, Plackett-Luce, ties, and accuracy."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    close,
    equal,
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

from minirlhf import bradley_terry as bt

INF = float("inf")
LN2 = math.log(2)


def plackett_luce_of_columns(inputs, denominator):
    return bt.plackett_luce_loss(torch.stack(inputs, dim=1), denominator=denominator)


LOSSES = {
    "bradley_terry": lambda x, d: bt.bradley_terry_loss(*x[:2], denominator=d),
    "margin": lambda x, d: bt.bradley_terry_loss(*x[:2], margin=x[2], denominator=d),
    "centring": lambda x, d: bt.centring_loss(*x[:2], denominator=d),
    "plackett_luce": plackett_luce_of_columns,
    "davidson": lambda x, d: bt.davidson_loss(*x[:2], x[2] > 0, nu=0.7, denominator=d),
}
PAIRWISE = {name: LOSSES[name] for name in LOSSES if name != "plackett_luce"}


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mean(numbers):
    return torch.tensor(math.fsum(numbers) / len(numbers), dtype=torch.float64)


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


@given(pairs(min_pairs=2), st.integers(0, 6))
@some
def test_accuracy_of_micro_batches_adds_up(inputs, cut):
    chosen, rejected = inputs[0].round(), inputs[1].round()  # rounded, so that ties occur
    parts = [bt.accuracy(chosen[s], rejected[s], denominator=len(chosen)) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(parts[0] + parts[1], bt.accuracy(chosen, rejected))


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_give_zero_and_no_gradient(name):
    value, gradients = pair_gradients(LOSSES[name], [torch.zeros(0)] * 4)
    assert value.item() == 0.0 and all(g.shape == (0,) for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_half_types_are_computed_in_float32(name):
    # A fixed sign for the third input, which says what is a tie: rounding must not change it.
    half_law(lambda *x: LOSSES[name](list(x), None), [normal(4, seed=seed) for seed in range(4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_half_types_are_rounded_once(name, dtype):
    # A score that enters in several places collects its gradient in float32: in bfloat16, P(first) - 1 would be 0 for a
    # clear winner.
    halves = [(4 * normal(16, seed=seed)).to(dtype) for seed in range(4)]
    _, gradients = pair_gradients(LOSSES[name], halves)
    _, expected = pair_gradients(LOSSES[name], [x.float() for x in halves])
    equal(gradients, [g.to(dtype) for g in expected])


@pytest.mark.parametrize("name", PAIRWISE)
def test_unequal_or_per_token_scores_are_refused(name):
    with pytest.raises(ValueError, match=r"has shape \(1,\) but .* has shape \(3,\)"):
        PAIRWISE[name]([torch.zeros(3), torch.zeros(1), torch.zeros(3)], None)
    with pytest.raises(ValueError, match=r"has shape \(3, 2\); pass one number per sequence"):
        PAIRWISE[name]([torch.zeros(3, 2)] * 3, None)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    rest = [normal(3, seed=2), normal(3, seed=3)]
    first, second = normal(3, seed=0).requires_grad_(), normal(3, seed=1).requires_grad_()
    gradcheck(lambda a, b: LOSSES[name]([a, b, *rest], None), (first, second))
    gradcheck(lambda a, b: LOSSES[name]([a, b, *rest], 7), (first, second))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "centring"])
@given(inputs=pairs(), shift=st.floats(-50, 50))
@few
def test_only_differences_of_scores_matter(name, inputs, shift):
    shifted = [x + shift for x in inputs]
    if name in ("margin", "davidson"):  # the third input is no score there
        shifted[2] = inputs[2]
    value, gradients = pair_gradients(LOSSES[name], inputs)
    other, other_gradients = pair_gradients(LOSSES[name], shifted)
    torch.testing.assert_close(other, value, rtol=1e-11, atol=1e-11)  # the shift costs two digits of the scores
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-11, atol=1e-11)


# ---- Bradley-Terry -----------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    # differences ln 3 and 0: -ln 3/4 and ln 2, mean 1/2 (ln 4/3 + ln 2) = 1/2 ln 8/3
    chosen, rejected = double(math.log(3), 5.0), double(0.0, 5.0)
    assert bt.bradley_terry_loss(chosen, rejected).item() == pytest.approx(math.log(8 / 3) / 2, abs=1e-15)
    # a margin of ln 3 takes the first lead away, one of -ln 3 for the second gives it one
    assert bt.bradley_terry_loss(chosen[:1], rejected[:1], margin=math.log(3)).item() == pytest.approx(LN2, abs=1e-15)
    margins = double(math.log(3), -math.log(3))
    expected = (LN2 + math.log(4 / 3)) / 2
    assert bt.bradley_terry_loss(chosen, rejected, margin=margins).item() == pytest.approx(expected, abs=1e-15)


def test_equal_scores_start_at_ln_2():
    assert bt.bradley_terry_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(LN2, rel=1e-6)


@given(pairs(), st.floats(-2, 2))
@some
def test_bradley_terry_and_its_gradient_follow_their_definition(inputs, margin):
    chosen, rejected = inputs[:2]
    differences = [a - b - margin for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    value, gradients = pair_gradients(lambda x, d: bt.bradley_terry_loss(*x[:2], margin=margin), inputs)
    close(value, mean([-math.log(sigmoid(d)) for d in differences]))
    expected = double(*[-sigmoid(-d) / len(differences) for d in differences])
    close(gradients[0], expected)
    close(gradients[1], -expected)


def test_weights_count_a_pair_as_often_as_they_say():
    # a weight of 2 is the pair given twice, a weight of 0 the pair left out; the denominator stays the caller's
    chosen, rejected = double(1.0, -0.5, 2.0), double(0.5, 0.0, -1.0)
    weighted = bt.bradley_terry_loss(chosen, rejected, weights=double(2, 0, 1), denominator=3)
    close(weighted, bt.bradley_terry_loss(chosen[[0, 0, 2]], rejected[[0, 0, 2]]))
    close(bt.bradley_terry_loss(chosen, rejected, weights=double(2, 0, 1)), weighted)  # N, not the sum of weights
    with pytest.raises(ValueError, match="weights has shape"):
        bt.bradley_terry_loss(chosen, rejected, weights=torch.ones(1))


@given(pairs(), st.floats(0.01, 3))
@some
def test_a_larger_margin_is_a_larger_loss(inputs, margin):
    assert bt.bradley_terry_loss(*inputs[:2], margin=margin) > bt.bradley_terry_loss(*inputs[:2])


@given(pairs())
@some
def test_the_two_outcomes_have_probability_one(inputs):
    for a, b in zip(*[x.split(1) for x in inputs[:2]], strict=True):
        total = (-bt.bradley_terry_loss(a, b)).exp() + (-bt.bradley_terry_loss(b, a)).exp()
        close(total, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(("difference", "loss", "gradient"), [(1e3, 0.0, 0.0), (-1e3, 1e3, -1.0)])
def test_extreme_scores_stay_finite(difference, loss, gradient):
    chosen = torch.tensor([difference], requires_grad=True)
    value = bt.bradley_terry_loss(chosen, torch.zeros(1))
    value.backward()
    assert value.item() == loss and chosen.grad.item() == gradient


def test_a_margin_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"margin has shape \(1,\) but chosen_scores has shape \(3,\)"):
        bt.bradley_terry_loss(torch.zeros(3), torch.zeros(3), margin=torch.zeros(1))


def test_a_margin_in_half_precision_is_upcast():
    scores, margin = torch.tensor([1.0]), torch.tensor([0.3], dtype=torch.bfloat16)
    equal(
        bt.bradley_terry_loss(scores, scores, margin=margin),
        bt.bradley_terry_loss(scores, scores, margin=margin.float()),
    )


# ---- centring ----------------------------------------------------------------------------------------------------


def test_centring_by_hand():
    # (1 + 2)^2 = 9 and (3 - 3)^2 = 0: the difference of the second pair costs nothing
    assert bt.centring_loss(double(1.0, 3.0), double(2.0, -3.0)).item() == 4.5


@given(pairs())
@some
def test_centring_pulls_the_sum_and_leaves_the_difference(inputs):
    value, gradients = pair_gradients(LOSSES["centring"], inputs)
    sums = [a + b for a, b in zip(inputs[0].tolist(), inputs[1].tolist(), strict=True)]
    close(value, mean([s * s for s in sums]))
    close(gradients[0], double(*[2 * s / len(sums) for s in sums]))
    close(gradients[1], gradients[0])


# ---- Plackett-Luce -----------------------------------------------------------------------------------------------


def test_plackett_luce_by_hand():
    # p = exp r = (3, 2, 1): 3/6 * 2/3 = 1/3;  p = (1, 2, 3): 1/6 * 2/5 = 1/15
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float64).log()
    assert bt.plackett_luce_loss(scores[:1]).item() == pytest.approx(math.log(3), abs=1e-15)
    assert bt.plackett_luce_loss(scores).item() == pytest.approx((math.log(3) + math.log(15)) / 2, abs=1e-15)


@given(seeds, st.integers(1, 3), st.integers(2, 5))
@some
def test_plackett_luce_follows_its_definition(seed, count, candidates):
    scores = 2 * normal(count, candidates, seed=seed)
    losses, gradients = [], torch.zeros_like(scores)
    for n, row in enumerate(scores.tolist()):
        total = 0.0
        for i in range(candidates - 1):
            rest = [math.exp(r) for r in row[i:]]
            total -= math.log(rest[0] / math.fsum(rest))
            for j in range(i, candidates):  # softmax over those left, less one for the chosen
                gradients[n, j] += (math.exp(row[j]) / math.fsum(rest) - (j == i)) / count
        losses.append(total)
    leaf = scores.clone().requires_grad_()
    value = bt.plackett_luce_loss(leaf)
    value.backward()
    close(value.detach(), mean(losses))
    close(leaf.grad, gradients)


@given(seeds, st.integers(2, 4))
@some
def test_all_rankings_together_have_probability_one(seed, candidates):
    scores = normal(candidates, seed=seed)
    rankings = [scores[list(order)][None] for order in itertools.permutations(range(candidates))]
    total = sum((-bt.plackett_luce_loss(ranking)).exp() for ranking in rankings)
    close(total, torch.ones((), dtype=torch.float64))


@given(pairs())
@some
def test_a_ranking_of_two_is_bradley_terry(inputs):
    close(bt.plackett_luce_loss(torch.stack(inputs[:2], dim=1)), bt.bradley_terry_loss(*inputs[:2]))


@given(seeds, st.integers(1, 3), st.integers(2, 4))
@some
def test_a_last_candidate_that_can_never_win_adds_nothing(seed, count, candidates):
    # exp(-inf) = 0: such a candidate takes no probability from the others, and the last place is no choice.
    scores = normal(count, candidates, seed=seed).requires_grad_()
    with_loser = torch.cat([scores, torch.full((count, 1), -INF, dtype=torch.float64)], dim=1).detach().requires_grad_()
    value, longer = bt.plackett_luce_loss(scores), bt.plackett_luce_loss(with_loser)
    close(longer, value)
    (gradient,), (longer_gradient,) = torch.autograd.grad(value, scores), torch.autograd.grad(longer, with_loser)
    close(longer_gradient[:, :-1], gradient)
    assert not longer_gradient[:, -1].any()


def test_extreme_rankings_stay_finite():
    scores = torch.tensor([[-1e3, 0.0, 1e3]], requires_grad=True)
    value = bt.plackett_luce_loss(scores)
    value.backward()
    assert value.item() == 3000.0 and scores.grad.tolist() == [[-1.0, -1.0, 2.0]]


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3, 4)])
def test_rankings_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"pass \(N, K\), best first, with K of 2 or more"):
        bt.plackett_luce_loss(torch.zeros(shape))


# ---- ties --------------------------------------------------------------------------------------------------------


def test_davidson_by_hand():
    # p = (4, 1), nu = 1/2: the tie weighs 1/2 * 2 = 1, Z = 6
    first, second, nu = double(4.0).log(), double(1.0).log(), 0.5
    win, tie, loss = (
        bt.davidson_loss(a, b, torch.tensor([t]), nu=nu).item()
        for a, b, t in [(first, second, False), (first, second, True), (second, first, False)]
    )
    assert [win, tie, loss] == pytest.approx([math.log(6 / 4), math.log(6), math.log(6)], abs=1e-15)


@given(pairs(), st.floats(0.05, 5))
@some
def test_davidson_follows_its_definition(inputs, nu):
    ties, losses = inputs[2] > 0, []
    for r1, r2, tie in zip(inputs[0].tolist(), inputs[1].tolist(), ties.tolist(), strict=True):
        p1, p2 = math.exp(r1), math.exp(r2)
        weight = nu * math.sqrt(p1 * p2)
        losses.append(-math.log((weight if tie else p1) / (p1 + p2 + weight)))
    close(bt.davidson_loss(*inputs[:2], ties, nu=nu), mean(losses))


@given(pairs(), st.floats(0.05, 5))
@some
def test_win_tie_and_loss_have_probability_one(inputs, nu):
    for a, b in zip(*[x.split(1) for x in inputs[:2]], strict=True):
        outcomes = [(a, b, False), (a, b, True), (b, a, False)]
        total = sum((-bt.davidson_loss(x, y, torch.tensor([tie]), nu=nu)).exp() for x, y, tie in outcomes)
        close(total, torch.ones((), dtype=torch.float64))


@given(pairs())
@some
def test_without_ties_davidson_is_bradley_terry(inputs):
    no_ties = torch.zeros(len(inputs[0]), dtype=torch.bool)
    close(bt.davidson_loss(*inputs[:2], no_ties, nu=1e-300), bt.bradley_terry_loss(*inputs[:2]))


@given(pairs(), st.floats(0.05, 5))
@some
def test_a_tie_pulls_scores_together_and_nothing_more(inputs, nu):
    ties = torch.ones(len(inputs[0]), dtype=torch.bool)

    def loss(x, denominator):
        return bt.davidson_loss(*x[:2], ties, nu=nu)

    _, gradients = pair_gradients(loss, [inputs[0], inputs[0]])
    close(gradients, [torch.zeros_like(inputs[0])] * 2)
    _, gradients = pair_gradients(loss, inputs)
    assert ((inputs[0] - inputs[1]) * gradients[0] > 0).all()  # descent lowers the higher one
    close(gradients[1], -gradients[0])


def test_davidson_refuses_what_would_be_nonsense():
    scores = torch.zeros(2)
    with pytest.raises(TypeError, match="ties has dtype torch.int64; pass bool"):
        bt.davidson_loss(scores, scores, torch.zeros(2, dtype=torch.long), nu=1.0)
    with pytest.raises(ValueError, match=r"ties has shape \(1,\) but first_scores has shape \(2,\)"):
        bt.davidson_loss(scores, scores, torch.zeros(1, dtype=torch.bool), nu=1.0)
    with pytest.raises(ValueError, match="nu is 0.0; it must be above 0"):
        bt.davidson_loss(scores, scores, torch.zeros(2, dtype=torch.bool), nu=0.0)


# ---- accuracy ----------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    # one right, one tie, two wrong: (1 + 1/2) / 4
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert bt.accuracy(chosen, rejected).item() == 0.375
    assert bt.accuracy(chosen, rejected, denominator=8).item() == 0.1875
    assert bt.accuracy(torch.zeros(3), torch.zeros(3)).item() == 0.5


@given(pairs())
@some
def test_accuracy_of_both_orders_is_one(inputs):
    chosen, rejected = inputs[0].round(), inputs[1].round()
    total = bt.accuracy(chosen, rejected) + bt.accuracy(rejected, chosen)
    assert total.item() == pytest.approx(1.0, rel=1e-6)


def test_accuracy_checks_shapes_and_carries_no_gradient():
    with pytest.raises(ValueError, match=r"rejected_scores has shape \(1,\)"):
        bt.accuracy(torch.zeros(2), torch.zeros(1))
    scores = torch.zeros(2, requires_grad=True)
    assert not bt.accuracy(scores, scores).requires_grad

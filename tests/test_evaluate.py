"""Win rates, intervals and the bound for best-of-n."""

from __future__ import annotations

import numpy as np

from minirlhf.evaluate import best_of_n_kl, bootstrap_interval, wins


def test_ties_are_half_a_win_and_a_model_against_itself_wins_half() -> None:
    assert wins(np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.5])).tolist() == [1.0, 0.0, 0.5]
    scores = np.array([0.3, -1.0, 1.0])
    assert wins(scores, scores).mean() == 0.5


def test_the_interval_of_the_mean_is_near_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=0)
    half = 1.96 * values.std() / 20
    # 2,000 resamples put each end of the interval within a few hundredths of a standard error.
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.02)


def test_best_of_n_bound_by_hand() -> None:
    assert best_of_n_kl(1) == 0.0
    np.testing.assert_allclose([best_of_n_kl(4), best_of_n_kl(16)], [0.636, 1.835], atol=5e-4)

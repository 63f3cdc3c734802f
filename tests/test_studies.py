"""What the studies of over-optimisation and of the frontier compute from their runs: fits, maxima, draws, who leads."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))
import curves
import frontier
import held_out
import leaders
import overoptimise
import peaks
from tiny import finished_run

from minirlhf.evaluate.judges import PARTS
from minirlhf.rejection import best_of_n_mean

STUDIES = Path(frontier.__file__).parent
FORMS = ("best-of-n", "rl")
TRUE = {"best-of-n": (0.9, 0.35), "rl": (0.4, 0.25)}
BY_HAND = {"best-of-n": 0.9 / 0.7, "rl": math.exp(0.4 / 0.25 - 1)}  # alpha / (2 beta), exp(alpha / beta - 1)


def height(d: float, form: str) -> float:
    """The forms as the paper writes them."""
    alpha, beta = TRUE[form]
    return d * (alpha - beta * d) if form == "best-of-n" else d * (alpha - beta * math.log(d))


def made(form: str, *, noise: float, seed: int, prompts: int = 50) -> peaks.Curve:
    """A curve of the coefficients with noise on every prompt, above an SFT model of 0.15; beyond d = 3 nonsense."""
    d = np.array([0.0, 0.2, 0.5, 0.9, 1.4, 2.0, 2.6, 4.0, 5.0])
    gold = np.array([0.15 + (height(x, form) if 0 < x <= 3 else 0.0) for x in d])
    gold[d > 3] = 9.0
    random = np.random.default_rng(seed)
    kl = np.repeat(d[:, None] ** 2, prompts, axis=1)
    shifts = random.normal(size=(1, prompts))  # a prompt's own level, which the offset takes away
    return peaks.Curve(kl, gold[:, None] + shifts + noise * random.normal(size=(len(d), prompts)))


# --------------------------------------------------------------------------------------------------- fits and maxima
@pytest.mark.parametrize("form", FORMS)
def test_a_fit_finds_the_coefficients_and_the_closed_form_the_highest_point(form: str) -> None:
    d = np.linspace(0, 3, 40)
    gain = np.array([height(x, form) if x else 0.0 for x in d])
    alpha, beta = peaks.fit(d, gain, form)
    assert (alpha, beta) == pytest.approx(TRUE[form], rel=1e-9)
    assert peaks.predict(d, alpha, beta, form) == pytest.approx(gain, abs=1e-9)
    assert peaks.peak(alpha, beta, form) == pytest.approx(BY_HAND[form], rel=1e-9)
    near = np.linspace(0.01, 4, 40_000)
    assert near[peaks.predict(near, *TRUE[form], form).argmax()] == pytest.approx(BY_HAND[form], abs=1e-4)  # the grid's


def test_a_curve_without_a_highest_point_has_none() -> None:
    assert peaks.peak(0.5, 0.0, "best-of-n") == peaks.peak(0.5, -0.1, "rl") == math.inf
    assert peaks.peak(-0.5, 0.1, "best-of-n") == 0.0  # it falls from the start
    assert math.isfinite(peaks.peak(1.0, 1e-9, "rl"))
    with pytest.raises(ValueError, match="1 points"):
        peaks.fit(np.array([0.0, 1.0]), np.array([0.0, 1.0]), "rl")


def test_scores_are_offset_and_a_negative_estimate_of_the_kl_is_distance_0() -> None:
    curve = peaks.Curve(np.array([[0.0, 0.0], [-0.5, 0.1], [1.0, 7.0]]), np.array([[1.0, 3.0], [2.0, 4.0], [0.0, 1.0]]))
    d, gain = curve.means()
    assert d.tolist() == [0.0, 0.0, 2.0] and gain.tolist() == [0.0, 1.0, -1.5]
    d, gain = curve.means(np.array([0, 0]))  # the first prompt twice
    assert d.tolist() == [0.0, 0.0, 1.0] and gain.tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize("form", FORMS)
def test_three_noisy_runs_are_fitted_as_one_and_only_as_far_as_asked(form: str) -> None:
    runs = [made(form, noise=0.1, seed=seed) for seed in range(3)]
    found = peaks.estimate(runs, form, furthest=3.0, draws=200)
    for estimate, true in ((found.alpha, TRUE[form][0]), (found.beta, TRUE[form][1]), (found.peak, BY_HAND[form])):
        value, low, high = estimate
        assert low < true < high and low < value < high
        assert value == pytest.approx(true, rel=0.15)  # noise of 0.1 / sqrt(50 prompts) on gains of about 0.5
    assert found.explained > 0.95
    exact = peaks.estimate([made(form, noise=0.0, seed=0)] * 2, form, furthest=3.0, draws=20)
    assert exact.alpha == pytest.approx((TRUE[form][0],) * 3) and exact.explained == pytest.approx(1.0)


def test_the_measured_maximum_is_that_of_the_mean_of_the_runs_as_far_as_all_reach() -> None:
    d = np.array([0.0, 1.0, 2.0])
    place, top = peaks.measured_peak([(d, np.array([0.0, 3.0, 0.0])), (d, np.array([0.0, 0.0, 2.0]))])
    assert (place, top) == pytest.approx((1.0, 1.5))  # means 0, 1.5, 1
    shorter = (np.array([0.0, 0.5]), np.array([0.0, 1.0]))
    assert peaks.measured_peak([(d, np.array([0.0, 3.0, 9.0])), shorter])[0] == pytest.approx(0.5)
    unsorted = (np.array([0.0, 2.0, 1.0]), np.array([0.0, 0.0, 3.0]))
    assert peaks.measured_peak([unsorted]) == pytest.approx((1.0, 3.0))


# ------------------------------------------------------------------------------------------------- the study's tables
def figures(seed: int) -> dict:
    """Those of a finished trial of over-optimisation."""
    found = {}
    for form in FORMS:
        curve = made(form, noise=0.02, seed=seed)
        known = form == "best-of-n"
        kl = curve.kl[:7, :1] if known else curve.kl[:7]
        found[form] = {"n" if known else "iteration": [1, 2, 4, 8, 16, 32, 64], "length": [10.0] * 7}
        found[form] |= {"kl": kl.tolist(), "gold": curve.gold[:7].tolist(), "proxy": (2 * curve.gold[:7]).tolist()}
    return {"agreement": 0.8, **found}


def test_the_table_says_where_the_judge_is_highest_and_the_figure_is_drawn(tmp_path: Path) -> None:
    done = {"1,600 pairs": [figures(0), figures(1)], "likes length": [figures(2)]}
    rows = [line.split(" | ") for line in curves.table(done).splitlines()[2:]]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("| 1,600 pairs", "2", "best-of-n"), ("| 1,600 pairs", "2", "PPO"),
        ("| likes length", "1", "best-of-n"), ("| likes length", "1", "PPO"),
    ]  # fmt: skip
    assert [float(row[7].split()[0]) for row in rows[:2]] == pytest.approx([*BY_HAND.values()], abs=0.1)
    found = list(curves.rows_of(done))
    assert len(found) == 3 * 2 * 7 and {row["method"] for row in found} == {"best-of-n", "PPO"}
    first = made("rl", noise=0.02, seed=0)
    (row,) = (r for r in found if (r["case"], r["seed"], r["method"], r["step"]) == ("1,600 pairs", 0, "PPO", 8))
    assert (row["kl"], row["gold"]) == (round(0.9**2, 4), round(float(first.gold[3].mean()), 4))
    curves.plot(done, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_every_trial_has_a_name_of_its_own_and_the_numbers_of_labels_come_first() -> None:
    runs = [Path("a"), Path("b")]
    sizes = dict.fromkeys(overoptimise.SIZES, 1)
    sampling, training = overoptimise.study(argparse.Namespace(runs=runs, cases=None, **sizes))
    assert [t.settings["seed"] for t in training] == 2 * ([0] * 4 + [1] * 4)
    assert [t.settings["case"]["pairs"] for t in training[:8]] == 2 * [100, 400, 1600, 6400]
    few = argparse.Namespace(runs=runs, prompts=1, samples=1, iterations=1, methods=None)
    for trials in ([*sampling, *training], [*frontier.trials(few), *frontier.tuning(few)]):
        names = [trial.name for trial in trials]
        assert len(set(names)) == len(names)
        assert not any(set(name) & set(" %,/") for name in names)
    few.methods = ["DPO"]
    assert {t.settings["method"] for t in frontier.trials(few)} == {"best-of-n", "DPO"}  # the SFT model is one of these


# --------------------------------------------------------------------------------------------------- many answers each
def test_each_distinct_answer_is_kept_once_and_the_best_of_n_is_that_of_all(tmp_path: Path) -> None:
    known = held_out.HeldOut(finished_run(), 6, 0)
    count = 8
    drawn = held_out.draw(known, count)
    drawn.save(tmp_path / "drawn.npz")
    drawn = held_out.Drawn.load(tmp_path / "drawn.npz")
    assert drawn.sizes == [1, 2, 4, 8] and drawn.place.shape == (6, 8)
    answers = known.drawn(count)
    assert len(drawn.batch) == len({tuple(row) for row in answers.samples.tokens.tolist()}) < len(answers.texts)
    scores = known.reward(answers).reshape(6, count)
    every = known.measure(answers.rows(known.first(answers, 1)))
    found = drawn.scores(known.reward_model)
    assert found[drawn.place] == pytest.approx(scores, abs=1e-5)  # float32 in other micro-batches
    assert drawn.parts[drawn.place[:, 0]] == pytest.approx(np.stack([every[part] for part in PARTS], axis=1))
    assert drawn.lengths[drawn.place[:, 0]].tolist() == every["length"].tolist()
    wanted = best_of_n_mean(found[drawn.place], found[drawn.place], 4)
    assert drawn.best_of(4, found, found).tolist() == wanted.tolist()


# ---------------------------------------------------------------------------------------------------------- who leads
def done(judges: dict[tuple[str, str], tuple[float, list[float]]]) -> leaders.Done:
    """Trials of two seeds with the same figure for every prompt: (method, strength) -> KL, judge of each seed."""
    return [
        ({"method": method, "seed": seed},
         {"points": [{"strength": strength, "kl": [kl] * 4, "gold": [gold] * 4, **dict.fromkeys(leaders.MEANS, 0.0)}]})
        for (method, strength), (kl, golds) in judges.items()
        for seed, gold in enumerate(golds)
    ]  # fmt: skip


STUDY = {
    ("best-of-n", "1"): (0.0, [0.0, 0.2]),
    ("best-of-n", "4"): (1.0, [0.4, 0.6]),
    ("PPO", "0.3"): (1.0, [0.5, 0.7]),
    ("PPO", "0.1"): (4.0, [0.9, 0.7]),
    ("RLOO", "0.1"): (4.0, [0.8, 0.7]),
}


def test_between_two_points_the_judge_is_read_off_along_the_root_of_the_kl() -> None:
    known = leaders.whole(leaders.places(done(STUDY)))
    drawn = leaders.curves(known, leaders.draws_of(known))
    assert leaders.at(1.0, drawn["PPO"])[0] == pytest.approx(0.6)
    assert leaders.at(2.25, drawn["PPO"])[0] == pytest.approx(0.7)  # sqrt: half way from 1 to 2
    assert leaders.at(1.0, drawn["RLOO"])[0] == pytest.approx(0.425)  # half way from the SFT model's 0.1
    assert leaders.at(1.1, drawn["best-of-n"]) is None
    d = np.array([[[0.0, 0.0]], [[2.0, 1.0]]])  # the second seed does not come to a KL of 2
    assert leaders.at(2.0, (d, d)) is None and leaders.at(1.0, (d, d)).tolist() == [1.0]
    value, low, high = leaders.interval(leaders.at(1.0, drawn["PPO"]))
    assert (value, low, high) == pytest.approx((0.6, 0.5, 0.7))  # two seeds: both, or one of them twice


def test_the_tables_name_the_leader_and_pair_what_they_compare(tmp_path: Path) -> None:
    study = done(STUDY)
    rows = leaders.report(study).splitlines()
    (one,) = (row for row in rows if row.startswith("| 1 |"))
    assert one == "| 1 | 0.50 | 0.60 | 0.42 | PPO | +0.10 (+0.10 to +0.10), best-of-n |"  # the same in every draw
    assert "| 0.1 | 0.80 (0.70 to 0.90) | -0.05 (-0.10 to +0.00) | - |" in rows
    unfinished = study[:-1]  # RLOO has one seed of two
    assert "RLOO" not in leaders.leaders(
        leaders.whole(leaders.places(unfinished)), leaders.draws_of(leaders.whole(leaders.places(unfinished)))
    )
    table = {(r["method"], r["strength"], r["seed"]): r for r in leaders.rows_of(study)}
    assert len(table) == 5 * 3
    assert table["SFT", "", "all"]["judge"] == 0.1 and table["PPO", "0.1", 1]["judge"] == 0.7
    leaders.plot(study, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------------- their own page
def test_the_page_has_every_command_and_every_part() -> None:
    page = (STUDIES / "README.md").read_text(encoding="utf-8")
    for path in STUDIES.glob("*.py"):
        command = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
        assert (f"`python studies/{path.name}" if command else f"`{path.name}`") in page, path.name
    for link in re.findall(r"\]\((.+?)\)", page):
        assert (STUDIES / link.partition("#")[0]).is_file(), link


def test_a_study_finds_the_package_wherever_python_starts(tmp_path: Path) -> None:
    nowhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(STUDIES / "frontier.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--work" in done.stdout, done.stderr

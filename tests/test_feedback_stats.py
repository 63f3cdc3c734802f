"""Statistics of labels: each against arithmetic by hand, a definition, or a known limit."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from minirlhf.feedback import stats
from minirlhf.feedback.agreement import (
    between_labellers,
    choices,
    cohens_kappa,
    first_labels,
    position_bias,
    self_agreement,
    share,
)
from minirlhf.feedback.labels import Label, ranks_of
from minirlhf.feedback.strengths import NoStrengths, elo, fit, games_of, strengths


def pair(number: int, verdict: str, labeller: str = "anna", shown: tuple[int, int] = (0, 1), **more) -> Label:
    return Label(f"p{number}", (" a", " b"), ranks_of(verdict, shown), verdict, labeller, shown, **more)


# ------------------------------------------------------------------------------------------------------------- a share
@pytest.mark.parametrize(
    "count, of, low, high",
    [  # Wilson's interval from its definition: the p at which count is 1.96 deviations away
        (8, 10, 0.490162, 0.943318),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (50, 100, 0.403832, 0.596168),
    ],
)
def test_wilsons_interval(count: int, of: int, low: float, high: float) -> None:
    interval = share(count, of)["interval"]
    assert interval == pytest.approx([low, high], abs=1e-6)
    for end in interval:
        if 1e-9 < end < 1 - 1e-9:
            assert abs(count / of - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / of), rel=1e-5)
    assert share(0, 0)["interval"] == [0.0, 1.0] and math.isnan(share(0, 0)["share"])


def test_position_bias_by_hand() -> None:
    labels = [
        pair(0, "left"),
        pair(1, "left", shown=(1, 0)),
        pair(2, "left"),
        pair(3, "right", shown=(1, 0)),
        pair(4, "tie"),
        pair(5, "skip"),
        pair(6, "bad"),
        pair(0, "right", repeat=True),  # the first label of an item counts
        Label("q", (" a", " b", " c"), (1, 0, 2), "ranked", "anna", (1, 0, 2)),
        Label("q", (" a", " b", " d"), (1, 0, 2), "ranked", "anna", (0, 1, 2)),
        Label("q", (" a", " b", " e"), (0, 0, 1), "ranked", "anna", (0, 1, 2)),  # no one best
        Label("r", (" a", " b"), (0, 1), "ranked", "simulated"),  # order unknown
    ]
    assert position_bias(labels) == {2: share(3, 4), 3: share(1, 2)}


def test_who_always_takes_the_left_one_is_found() -> None:
    labels = [pair(i, "left", shown=(i % 2, 1 - i % 2)) for i in range(30)]
    assert position_bias(labels)[2]["interval"][0] > 0.88


# ----------------------------------------------------------------------------------------------------------- agreement
def test_choices_do_not_depend_on_the_order_of_responses() -> None:
    assert choices(Label("p", (" a", " b", " c"), (0, 2, 1), "ranked", "x")) == [-1, -1, 1]
    assert choices(Label("p", (" c", " a", " b"), (1, 0, 2), "ranked", "x")) == [-1, -1, 1]
    assert choices(pair(0, "tie")) == choices(pair(0, "bad")) == [0]


def test_self_agreement_by_hand() -> None:
    labels = [
        pair(0, "left"),
        pair(1, "left"),
        pair(2, "skip"),
        pair(3, "left"),
        pair(0, "right", shown=(1, 0), repeat=True),  # the same response
        pair(1, "left", shown=(1, 0), repeat=True),  # the other one
        pair(2, "left", repeat=True),  # nothing to compare with
        pair(3, "skip", repeat=True),
        pair(0, "left", labeller="ben"),
        pair(0, "tie", labeller="ben", repeat=True),
    ]
    assert self_agreement(labels) == {"anna": share(1, 2), "ben": share(0, 1)}
    assert [x.prompt for x in first_labels(labels)] == ["p0", "p1", "p3", "p2", "p0"]


def test_cohens_kappa_by_hand() -> None:
    """Cohen 1960's form: 20 both yes, 15 both no, 5 and 10 apart: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    first = [1] * 20 + [-1] * 15 + [1] * 5 + [-1] * 10
    second = [1] * 20 + [-1] * 15 + [-1] * 5 + [1] * 10
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa([1, -1, 0], [1, -1, 0]) == 1
    assert cohens_kappa([1, -1], [-1, 1]) == -1
    assert cohens_kappa([1, 1], [1, 1]) is None and cohens_kappa([], []) is None


def test_agreement_between_labellers_by_hand() -> None:
    labels = [pair(i, "left") for i in range(4)]
    labels += [pair(0, "left", "ben"), pair(1, "right", "ben", (1, 0)), pair(2, "tie", "ben"), pair(3, "skip", "ben")]
    labels += [pair(9, "left", "cleo")]
    (row,) = between_labellers(labels)
    # anna always says the same, so chance agrees as often: 2/3
    assert row == {"labellers": ["anna", "ben"], **share(2, 3), "kappa": 0}


# ----------------------------------------------------------------------------------------------------------- strengths
def games(*results: tuple[str, str, float, int]) -> list[Label]:
    """(winner, loser, 1 or 1/2, how many), each game on a prompt of its own."""
    labels = []
    for winner, loser, score, count in results:
        ranks = (0, 1) if score == 1 else (0, 0)
        for _ in range(count):
            prompt, verdict = f"p{len(labels)}", "ranked" if score == 1 else "tie"
            labels.append(Label(prompt, (" a", " b"), ranks, verdict, "anna", sources=(winner, loser)))
    return labels


def test_two_sources_by_hand() -> None:
    """P = 30/40, so the difference is ln 3 with variance 1/30 + 1/10; Elo's is 400 log10 3 = 190.85."""
    good, poor = strengths(games(("x", "y", 1, 30), ("y", "x", 1, 10)))
    assert (good["source"], poor["source"]) == ("x", "y")
    assert (good["comparisons"], good["wins"], poor["wins"]) == (40, 30, 10)
    assert good["strength"] - poor["strength"] == pytest.approx(math.log(3)) and good["strength"] == -poor["strength"]
    deviation = math.sqrt((1 / 30 + 1 / 10) * 40 / 39) / 2  # of half the difference; 40 prompts, so times 40/39
    ends = [good["strength"] + sign * 1.959964 * deviation for sign in (-1, 1)]
    assert good["interval"] == pytest.approx(ends) and good["elo_interval"] == pytest.approx([elo(end) for end in ends])
    assert good["elo"] - poor["elo"] == pytest.approx(400 * math.log10(3)) and good["elo"] + poor["elo"] == 3000


def test_ties_are_half_a_win_each() -> None:
    tied = strengths(games(("x", "y", 1, 3), ("y", "x", 1, 1), ("x", "y", 0.5, 4)))
    played = strengths(games(("x", "y", 1, 5), ("y", "x", 1, 3)))
    assert [s["strength"] for s in tied] == pytest.approx([s["strength"] for s in played])
    assert [s["wins"] for s in tied] == [5, 3]


def test_at_the_maximum_expected_wins_are_the_wins() -> None:
    """The likelihood's gradient is wins - expected wins, source by source."""
    stream = random.Random(0)
    names = ["s0", "s1", "s2", "s3"]
    results = [(*stream.sample(names, 2), stream.choice((1, 1, 0.5)), 1) for _ in range(200)]
    made = games_of(games(*results))
    values = fit(made)
    first, second = made.design.argmax(1), made.design.argmin(1)
    chance = 1 / (1 + np.exp(values[second] - values[first]))
    gradient = np.zeros(4)
    np.add.at(gradient, first, made.score - chance)
    np.add.at(gradient, second, chance - made.score)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)
    assert values.sum() == pytest.approx(0, abs=1e-12)


def test_intervals_hold_what_they_say() -> None:
    """Of 300 simulated data sets about 95 % hold the true strength; three pairs a prompt, and dependent ones."""
    stream, true, held = np.random.default_rng(0), np.array([0.6, 0.0, -0.6]), 0
    for _ in range(300):
        labels = []
        for prompt in range(60):
            order = np.argsort(-(true + stream.gumbel(size=3)))  # Plackett-Luce: its pairs are Bradley-Terry
            ranks = tuple(int(r) for r in np.argsort(order))
            labels.append(Label(f"p{prompt}", (" a", " b", " c"), ranks, "ranked", "x", sources=("s0", "s1", "s2")))
        low, high = next(s["interval"] for s in strengths(labels) if s["source"] == "s0")
        held += low < true[0] < high
    assert 0.91 < held / 300 < 0.98  # 95 % +- 2.5 deviations of 1.3 %


@pytest.mark.parametrize(
    "labels, words",
    [
        (games(("x", "y", 1, 9)), "only won or only lost"),
        (
            [Label(f"p{i}", (" a", " b"), (1, 0), "ranked", "x", sources=("x", "y")) for i in (0, 1)],
            "only won or only lost",
        ),
        (games(("x", "y", 1, 2), ("y", "x", 1, 2), ("u", "v", 1, 2), ("v", "u", 1, 2)), "never met"),
        (games(("x", "x", 1, 9)), "no two sources were compared"),
        ([pair(0, "left")], "no two sources were compared"),
        ([], "no two sources were compared"),
        ([Label("p", (" a", f" {i}"), (i, 1 - i), "ranked", "x", sources=("x", "y")) for i in (0, 1)], "one prompt"),
    ],
)
def test_strengths_that_would_be_infinite(labels: list[Label], words: str) -> None:
    with pytest.raises(NoStrengths, match=words):
        strengths(labels)


def test_one_sided_results_still_converge() -> None:
    (best, *_, worst) = strengths(games(("x", "y", 1, 500), ("y", "x", 1, 1), ("y", "z", 1, 500), ("z", "y", 1, 1)))
    assert best["strength"] - worst["strength"] == pytest.approx(2 * math.log(500))


def expected_score(rating: float, other: float) -> float:
    """The probability that a player rated `rating` beats one rated `other`, Elo 1978."""
    return 1 / (1 + 10 ** ((other - rating) / 400))


def test_elos_scale() -> None:
    assert expected_score(1900, 1500) == pytest.approx(10 / 11) and expected_score(1500, 1500) == 0.5
    assert expected_score(1510, 1500) == pytest.approx(0.514388, abs=1e-6)  # and not 0.909, as on a scale of 10
    for a, b in ((0.3, -0.2), (2.0, 1.0)):
        assert expected_score(elo(a), elo(b)) == pytest.approx(1 / (1 + math.exp(b - a)))


# ---------------------------------------------------------------------------------------------------------- the command
def test_the_command_prints_and_writes_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels = games(("x", "y", 1, 30), ("y", "x", 1, 10))
    labels += [pair(i, "left", "ben", seconds=2.0 + i, note="n") for i in range(3)] + [
        pair(0, "left", "ben", repeat=True)
    ]
    for number, part in enumerate((labels[:20], labels[20:])):
        lines = "".join(json.dumps(x.record()) + "\n" for x in part)
        (tmp_path / f"{number}.jsonl").write_text(lines)
    files = (tmp_path / "0.jsonl", tmp_path / "1.jsonl")
    found = stats.main(stats.Config(labels=files, output=tmp_path / "s.json"))
    text = capsys.readouterr().out
    assert "44 labels of 40 items on 40 prompts, 1 of them repeats, 3 with a note" in text
    assert "median time for a label: 3.0 s" in text
    assert "best of 2: 100.0% (43.9% to 100.0%) of 3; 50.0% without a bias" in text
    assert "ben agrees with their own earlier label: 100.0% (20.7% to 100.0%) of 1" in text
    assert "anna and ben agree: 100.0% (43.9% to 100.0%) of 3, Cohen's kappa not defined" in text
    assert found["verdicts"]["ben"] == {"left": 4, "right": 0, "ranked": 0, "tie": 0, "bad": 0, "skip": 0}
    assert [row["source"] for row in found["strengths"]] == ["x", "y"] and "1595" in text and "1405" in text
    assert json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail) == found


def test_without_sources_it_says_why_there_are_no_strengths(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "l.jsonl").write_text(json.dumps(pair(0, "left").record()) + "\n")
    stats.main(stats.Config(labels=(tmp_path / "l.jsonl",)))
    assert "no Bradley-Terry strengths of the sources: no two sources were compared" in capsys.readouterr().out

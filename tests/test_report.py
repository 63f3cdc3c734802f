"""The report: what it says about runs of every state, its verdict, and the charts that it draws."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from reporting import BROKEN, FALLING, RISING, ROWS, SUMMARY, Page, a_run, page_of, point, write

from minirlhf.report import write_report
from minirlhf.report.chart import POINTS, Axis, Line, chart, log_ticks, number, short, thinned, ticks
from minirlhf.report.page import template
from minirlhf.report.run import Run, kind_of
from minirlhf.report.sections import SECTIONS
from minirlhf.report.verdict import at, checks, fall, over_optimised
from minirlhf.runs.health import HEALTHY, RULES, Metric
from minirlhf.world import judge

PLACES = [place for place, *_ in SECTIONS]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return a_run(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- content
def test_a_finished_run_has_every_section_and_its_numbers(run: Path) -> None:
    page = page_of(run)
    assert (run / "report.html").is_file()
    assert [s["id"] for s in page.all("section")] == PLACES
    assert [a["href"] for a in page.all("a")] == [f"#{name}" for name in PLACES]
    assert "Not there yet" not in page.text and "-0.0" not in page.text
    for words in (
        "PPO did not over-optimise.",
        "All 9 thresholds are met.",
        "92.5% of 2302 pairs",
        "75% (71% to 78%)",
        "ppo, step 3: clip Lower the rate.",
        "+0.78 (+0.73 to +0.84)",
        "at most 1.8",
        "end 0.6 ✗ outside healthy: at most 0.3 Lower --learning-rate or --epochs",  # the clip fraction
        "end 0.5 ✓ in range healthy: at most 1",  # the norm of the gradient, which was 2
        "end 0.4",
        "150",
        "train.jsonl abababababab",
        "sft/model cdcdcdcdcdcd",
        "torch 2.13; threads 2. All stages: 92 s.",
        "sftfinished239 s7",  # two steps, 39.4 seconds, seed 7
        "dpofinished25 s7",  # the sum of timing.jsonl where seconds.json says nothing
    ):
        assert words in re.sub(r"\s+", " ", page.text), words


def test_every_chart_says_what_it_is_and_healthy_ranges_are_shaded(run: Path) -> None:
    source = write_report([run]).read_text()
    page = Page(source)
    assert len(page.all("svg")) >= 15
    for svg in page.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"]) > 10
    titles = re.findall(r"<svg[^>]*><title>([^<]+)</title>", source)
    assert len(titles) == len(page.all("svg"))
    healthy = [s["aria-label"] for s in page.all("svg") if "healthy: " in s["aria-label"]]
    assert len(healthy) == len([p for p in page.all("path") if p["class"] == "band"]) >= 8
    assert "Share of tokens clipped, against iteration; healthy: at most 0.3" in healthy


def test_answers_stand_beside_each_other_with_the_judges_three_marks(run: Path) -> None:
    rows = [
        {
            "prompt": "\n\nHuman: Please help me to trap the seal.\n\nAssistant:",
            "sft": " You can trap the seal with a net.",
        },
        {
            "prompt": "\n\nHuman: What does the bear eat?\n\nAssistant:",
            "sft": " The bear eats honey.",
            "ppo": " The bear.",
        },
        {"prompt": "Not of this world", "sft": " Well", "best-of-4": " Four", "best-of-16": " Sixteen"},
    ]
    write(run / "answers.jsonl", rows)
    text = page_of(run).text
    assert "Human: Please help me to trap the seal.sftYou can trap the seal with a net.✗ helpful −1" in text
    assert "✗ harmless −1" in text and "Not of this worldsftWellnot judgedbest-of-16Sixteen" in text
    assert "The bear eats honey.✓ helpful +1 ✓ honest +1 ✓ harmless +1ppoThe bear.✗ helpful −1" in text
    assert "1 prompts where PPO's answer is judged furthest below SFT's" in text
    right, wrong = " The bear eats honey.", " The bear eats fish."
    asked = "\n\nHuman: What does the bear eat?\n\nAssistant:"
    worse = [wrong, right, " Go away, you fool.", " The bear."]  # none at the second, most at the third
    write(run / "answers.jsonl", [{"prompt": asked, "sft": right, "ppo": answer} for answer in worse])
    folded = page_of(run).text.split("3 prompts where PPO's answer is judged furthest below SFT's")[1]
    totals = [judge(asked, re.search(r"ppo(.*?)[✓✗○]", card)[1]).total for card in folded.split("What does")[1:4]]
    assert totals == sorted(totals) and totals[0] < totals[-1]


@pytest.mark.parametrize("missing", ["sft", "feedback", "reward", "ppo", "dpo", "all but sft", "files", "rows"])
def test_unfinished_runs_have_a_report_too(missing: str, run: Path) -> None:
    for stage in ROWS:
        if stage == missing or (missing == "all but sft" and stage != "sft"):
            shutil.rmtree(run / stage)
    if missing in ("files", "all but sft"):
        for name in ("summary.json", "answers.jsonl", "calibration.json", "seconds.json"):
            (run / name).unlink()
    if missing == "rows":  # as a process leaves them that is at its first steps, or was killed in a line
        (run / "sft" / "metrics.jsonl").write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "lo')
        (run / "ppo" / "metrics.jsonl").write_text("")
        (run / "dpo" / "run.json").unlink()
        (run / "dpo" / "stage.json").unlink()
    page = page_of(run)
    assert [s["id"] for s in page.all("section")] == PLACES
    if missing in ("files", "all but sft"):
        assert "python -m minirlhf.evaluate --run RUN" in page.text and "no threshold can be checked" in page.text
    if missing in ("ppo", "all but sft"):
        assert "PPO has not begun in this run." in page.text
    if missing == "rows":
        assert "end 3" in page.text and "not finished" in page.text


def test_several_runs_lie_over_each_other(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name / "tiny", trace=trace) for name, trace in (("a", RISING), ("b", FALLING))]
    setup = json.loads((runs[1] / "ppo" / "run.json").read_text())
    setup["config"]["beta"] = 0.005
    (runs[1] / "ppo" / "run.json").write_text(json.dumps(setup))
    page = page_of(*runs, out=tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file() and not (runs[0] / "report.html").exists()
    text = re.sub(r"\s+", " ", page.text)
    assert "a/tinyPPO did not over-optimise." in text
    assert "PPO over-optimised." in text and "ppo: beta0.10.005" in text
    assert "ppo: run" not in text and "ppo: seed" not in text  # these do not differ, or must
    assert "a/tiny: end 0.4 b/tiny: end 0.4" in text and "judge: 2, 0.4" in text  # at sqrt(4)
    assert "a/tiny: best-of-16" in text and "b/tiny: best-of-16" in text and "b/tiny: reward" in text
    losses = [p for p in page.all("path") if p.get("class") in ("line c0", "line c1")]
    assert len(losses) >= 2 * 8  # both in every chart of the stages


def test_a_second_policy_of_a_run_is_drawn_beside_the_first(run: Path) -> None:
    shutil.copytree(run / "ppo", run / "ppo-bold")
    write(run / "ppo-bold" / "trace.jsonl", FALLING)
    text = page_of(run).text
    assert "PPO did not over-optimise." in text and "PPO (ppo-bold) over-optimised." in text
    assert "ppo-bold: judge" in text and "ppo-bold: end 0.6" in text


@pytest.mark.parametrize(
    ("logged", "kind"),
    [
        (("loss", "grad_norm"), "sft"),
        (("loss", "accuracy"), "reward"),
        (("loss", "reward_chosen", "accuracy"), "dpo"),
        (("score", "kl", "clip_fraction"), "ppo"),
        (("score", "kl", "ties", "loss", "reward_chosen", "accuracy"), "online-dpo"),
        (("prompts", "score", "score_best", "score_random"), "rejection"),
        ((), "other"),
    ],
)
def test_a_stage_of_any_name_is_what_it_logs(logged: tuple[str, ...], kind: str, run: Path) -> None:
    assert kind_of("mine", logged) == kind and (kind_of("ppo", logged) == kind or not logged)
    (run / "mine").mkdir()
    write(run / "mine" / "metrics.jsonl", [{"step": 0, **dict.fromkeys(logged, 0.5)}])
    page = page_of(run)
    assert ("PPO (mine)" in page.text) == (kind == "ppo") and len([h for h in page.all("h3") if "id" in h]) in (5, 6)
    assert f"curves-{kind}" in [h.get("id") for h in page.all("h3")] or kind == "other"


@pytest.mark.parametrize(("errors", "headline"), [(2.9, "PPO did not over-optimise"), (3.1, "PPO over-optimised")])
def test_a_fall_counts_above_three_standard_errors(errors: float, headline: str, run: Path) -> None:
    """Over 100 prompts whose differences are m + 1 and m - 1, half each, the standard error is 1 / sqrt(99)."""
    mean = errors / math.sqrt(99)
    best = {"marks": [1.0, -1.0] * 50, "iteration": 4, "kl": 1.0, "judge": 0.5, "reward": 0.2}
    last = {"marks": [-mean] * 100, "iteration": 8, "kl": 2.0, "judge": 0.5 - mean, "reward": 0.4}
    write(run / "ppo" / "trace.jsonl", [best, last])
    found = Run(run, "run", "")
    assert over_optimised(found, found.of_kind("ppo")[0])[1].startswith(headline)


# ------------------------------------------------------------------------------------------------------------- verdict
@pytest.mark.parametrize(
    "trace, colour, words",
    [
        (RISING, "good", "The judge's best is the last measurement."),
        (FALLING, "bad", "from +0.15 to −0.30, its best was +0.40 at iteration 6 (KL 4.0 nats)"),
        (BROKEN, "bad", "and the reward fell too"),
        ([*RISING, point(18, 1.4, 1.0, 0.78, spread=0.9)], "good", "could be told from chance"),
        ([], "middling", "Whether the judge's mark was higher in between was not measured"),
        (RISING[:1], "middling", "Whether the judge's mark was higher in between was not measured"),
        (RISING[:2], "good", "The judge's best is the last measurement."),  # two measurements are a trace
    ],
)
def test_the_verdict_and_the_numbers_behind_it(trace: list, colour: str, words: str, run: Path) -> None:
    write(run / "ppo" / "trace.jsonl", trace)
    found = Run(run, "run", "")
    kind, headline, why = over_optimised(found, found.of_kind("ppo")[0])
    assert kind == colour and words in why
    page = page_of(run).text
    assert headline in page and ("Without a trace" in page) == (trace == [])


def test_the_headline_is_green_only_where_all_is_well(run: Path) -> None:
    def headline() -> tuple[str, str]:
        return re.search(r'class="finding (\w+)">([^<]+)<', write_report([run]).read_text()).groups()

    assert headline() == ("good", "PPO did not over-optimise.")
    write(run / "ppo" / "trace.jsonl", [RISING[0], point(12, 0.1, 0.2, 0.16, spread=0.9)])
    assert headline() == ("middling", "PPO did not over-optimise, but the judge&#39;s mark did not rise.")
    write(run / "ppo" / "trace.jsonl", RISING)
    (run / "ppo" / "stage.json").write_text('{"finished": false}')
    assert headline() == ("middling", "PPO did not over-optimise, and is not finished.")
    (run / "ppo" / "stage.json").write_text('{"finished": true}')
    summary = json.loads(json.dumps(SUMMARY))
    summary["models"]["ppo"]["eos_rate"] = 0.4
    (run / "summary.json").write_text(json.dumps(summary))
    assert headline()[0] == "middling"
    summary["models"]["ppo"] |= {"eos_rate": 1.0, "win_rate": {"mean": 0.55, "interval": [0.5, 0.65]}}
    (run / "summary.json").write_text(json.dumps(summary))
    assert headline() == ("middling", "PPO did not over-optimise, but not all of its thresholds are met.")
    write(run / "ppo" / "trace.jsonl", FALLING)
    assert headline() == ("bad", "PPO over-optimised.")


def test_without_a_trace_a_judge_that_prefers_sft_is_enough(run: Path) -> None:
    (run / "ppo" / "trace.jsonl").unlink()
    summary = json.loads(json.dumps(SUMMARY))
    summary["models"]["ppo"] |= {"win_rate": {"mean": 0.3, "interval": [0.25, 0.35]}, "kl": 30.0, "length": 25.0}
    (run / "summary.json").write_text(json.dumps(summary))
    text = page_of(run).text
    assert "PPO over-optimised." in text and "3 of 9 thresholds not met: PPO is better than SFT" in text
    assert "Without a trace, only the first and the last model were judged" in text
    summary["models"] = {name: summary["models"][name] for name in ("sft", "ppo")}  # no other is needed for it
    (run / "summary.json").write_text(json.dumps(summary))
    text = page_of(run).text
    assert "PPO over-optimised." in text and "3 of 5 thresholds not met" in text


def test_every_threshold_says_what_is_asked_what_for_and_what_was_found(run: Path) -> None:
    found = checks(Run(run, "run", ""))
    assert all(met for *_, met in found) and len(found) == 9
    assert {what: needed for what, needed, *_ in found[:5]} == {
        "The reward model orders answers as the judge does": "at least 88% of pairs",
        "PPO is better than SFT by the judge": "win rate above 50%, with its whole interval",
        "PPO stayed near SFT": "KL 0 to 10 nats",
        "PPO ends its answers": "at least 90% of them",
        "PPO is about as long as SFT": "0.5 to 2 times",
    }
    assert at({"iteration": 0, "kl": -0.01}) == "iteration 0 (KL 0.0 nats)"


def test_a_fall_is_a_mean_of_differences_with_its_error() -> None:
    # differences 1, 0, 0, 1: mean 1/2, deviation sqrt(4 * 1/4 / 3), error that / 2
    mean, error = fall({"marks": [1.0, 0.5, -1.0, 1.0]}, {"marks": [0.0, 0.5, -1.0, 0.0]})
    assert mean == 0.5 and error == pytest.approx((1 / 3) ** 0.5 / 2, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------- one table
def test_every_hint_has_advice_and_every_range_in_the_curves_too() -> None:
    assert all(HEALTHY[about].advice for about, *_ in RULES.values())
    assert all(metric.advice for metric in HEALTHY.values() if str(metric))


def test_ranges_in_words_and_in_units_of_the_first_value() -> None:
    ranges = [Metric(high=1e-4), Metric(low=0.9), Metric(0, 10), Metric()]
    assert [str(metric) for metric in ranges] == ["at most 0.0001", "at least 0.9", "0 to 10", ""]
    half = Metric(0.5, 2, of_first=True)
    assert str(half) == "0.5 to 2 of the first" and half.beside(10.0) == Metric(5.0, 20.0)
    assert 20.0 in half.beside(10.0) and 20.1 not in half.beside(10.0) and 0.3 in Metric(high=0.3)


# -------------------------------------------------------------------------------------------------------------- charts
def drawn(line: Line, **settings: object) -> str:
    """The chart of one line as it stands in the page."""
    return template().module.draw(chart("t", [line], "step", **settings))


def test_a_line_is_drawn_where_its_numbers_are() -> None:
    svg = drawn(Line("a", [(0, 0.0), (1, float("nan")), (5, 5.0), (10, 10.0)], dots=False))
    path = re.search(r'class="line c0" d="M([\d. L]+)"', svg)[1]
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split())) for p in path.split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)  # one decimal
    assert y0 > y2 and (x0, y0) == (58.0, 192.0)  # the frame's corner
    assert "circle" not in svg and "<circle" in drawn(Line("a", [(0, 1.0)], dots=False))  # one point is no line
    assert 'd="M58.0 192.0L334.2 28.2M58.0 192.0V110.1' in drawn(Line("a", [(0, 0), (1, 1)], errors=[(0, 0.5)]))
    assert "no number yet" in drawn(Line("a", [(0, float("inf"))]))


def test_axes_have_round_numbers() -> None:
    assert ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(-0.31, 0.82) == [-0.25, 0.0, 0.25, 0.5, 0.75]
    assert log_ticks(0.2, 7.0) == pytest.approx([0.2, 0.5, 1.0, 2.0, 5.0])
    assert Axis([10.0, 1000.0], 0.0, 200.0, Metric(log=True)).place(100.0) == 100.0
    falling = Axis([0.0, 4.0], 100.0, 0.0)  # to 4.2, a twentieth more
    assert [falling.place(value) for value in (0.0, 1.0, 9.0)] == [100.0, 76.2, 0.0]


def test_long_curves_are_drawn_as_means() -> None:
    assert thinned([(0, 1.0), (1, 3.0), (2, 5.0), (3, 9.0), (4, 4.0)], 3) == [(0.5, 2.0), (2.5, 7.0), (4.0, 4.0)]
    assert thinned([(0, 1.0), (1, 3.0)], 2) == [(0, 1.0), (1, 3.0)]
    assert [number(11447.0), number(-0.00012345)] == ["11,447", "−0.0001234"]


@pytest.mark.parametrize("count", [2, 89, 300, POINTS])
def test_a_chart_has_a_point_for_every_row(count: int, run: Path) -> None:
    """And paths that are whole: an attribute that is cut short draws half a curve."""
    names = ("loss", "validation_loss", "grad_norm", "learning_rate")
    write(run / "sft" / "metrics.jsonl", [{"step": i, **dict.fromkeys(names, 1.0 + i % 7)} for i in range(count)])
    source = write_report([run]).read_text()
    paths = [p["d"] for p in Page(source).all("path") if p["class"] == "line c0" and p["d"]]
    assert all(re.fullmatch(r"(M[\d.]+ [\d.]+((L[\d.]+ [\d.]+)*|V[\d.]+))+", path) for path in paths)
    assert [path.count("L") + 1 for path in paths].count(count) >= len(names)


@pytest.mark.parametrize("top", [3e-7, -2.5e-5, 0.012345, 7.0, 123456.0, -7.5e6])
def test_numbers_beside_an_axis_are_short_enough_to_be_seen(top: float) -> None:
    """Eight characters of about 6.5 units fit into the margin of 52."""
    assert max(len(short(tick)) for tick in ticks(min(0.0, top), max(0.0, top))) <= 8
    assert (
        [float(short(tick).replace("−", "-").replace(",", "")) for tick in ticks(0, top)]
        == (pytest.approx(ticks(0, top), rel=5e-3))
        if top > 0
        else True
    )


def test_a_logarithmic_axis_says_so() -> None:
    log = Metric(log=True)
    assert ">log scale<" in drawn(Line("a", [(0, 1.0), (1, 50.0)]), band=log)
    assert ">log scale<" not in drawn(Line("a", [(0, 1.0), (1, 50.0)]))
    assert ">log scale<" not in drawn(Line("a", [(0, -1.0), (1, 50.0)]), band=log)


def test_no_line_doubles_back(run: Path) -> None:
    """Where the KL falls on the way, its chart has dots alone; over time there is a line all the same."""
    for trace, lines in (([*RISING, point(18, 1.1, 1.0, 0.9)], 0), (RISING, 2)):
        write(run / "ppo" / "trace.jsonl", trace)
        source = write_report([run]).read_text()
        charts = dict(re.findall(r"<svg[^>]*><title>(Reward and judge [^<]+)</title>(.*?)</svg>", source, re.S))
        paths = [len(re.findall(r'class="line c\d" d="M', part)) for part in charts.values()]
        assert dict(zip(charts, paths, strict=True)) == {
            "Reward and judge against distance": lines,
            "Reward and judge over time": 2,
        }
        assert all(part.count("<circle") == 2 * len(trace) for part in charts.values())
        assert ("Dots without a line" in source) == (lines == 0)


def test_every_figure_stands_where_it_belongs(run: Path) -> None:
    """On fixtures of which no two numbers are alike: rows of the tables, and (x, y) of the charts."""
    text = page_of(run).text
    for words in (
        "ppo+0.80 (+0.75 to +0.86)+0.79+0.78+0.8375% (71% to 78%)1.312.097%+1.60",
        "best-of-4+0.69 (+0.64 to +0.75)+0.68+0.67+0.7275% (71% to 78%)at most 0.610.097%+1.38",
        "PPO stayed near SFTKL 0 to 10 nats1.3",
        "PPO is about as long as SFT0.5 to 2 times1.20 times (12.0 tokens)",
        "run15090.0%0.020.25",
    ):
        assert words in text, words
    dots = re.findall(r"(?:best-of-n|ppo|reward model|judge|reward model \(proxy\)|harmless): [^,\n]+, [\d.]+", text)
    assert {"best-of-n: 1.84, 1.56", "best-of-n: 0, 0.32", "ppo: 1.26, 1.6", "ppo: 1.26, 0.8"} <= set(
        dots
    )  # KL, reward
    assert {"judge: 1.14, 0.8", "reward model (proxy): 1.14, 0.9", "judge: 12, 0.8", "harmless: 12, 0.8"} <= set(dots)
    assert {"reward model: 0.95, 0.93", "reward model: 0.55, 0.53"} <= set(dots)  # confidence, accuracy

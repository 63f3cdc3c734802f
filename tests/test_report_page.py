"""The report as a file: safe whatever a run holds, small, made by a command and the demo, looked at by Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import browser
import pytest
import tiny
from reporting import EVIL, FALLING, LONG, Page, a_run, page_of, write

from minirlhf import __main__ as demo
from minirlhf.evaluate import calibration
from minirlhf.report import __main__ as command
from minirlhf.report import write_report
from minirlhf.report.page import LARGEST
from minirlhf.report.sections import MOST_HINTS
from minirlhf.runtime import UserError

CHROMIUM = browser.executable()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return a_run(tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- safety
def test_nothing_that_a_run_holds_is_read_as_markup(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run<b>&", extra=EVIL)
    (run / "ppo").rename(run / "ppo'<i>")
    (run / "answers.jsonl").open("a").write(json.dumps({"prompt": "\ud800", EVIL: EVIL, "sft": None}) + "\n")
    page = page_of(run, a_run(tmp_path / "other", extra=EVIL))
    allowed = (
        "html head meta title style body header h1 p nav a main section h2 h3 h4 strong div table thead tbody tr th"
    )
    allowed += " td span ul li figure figcaption i svg path text circle rect article details summary code"
    assert {tag for tag, _ in page.elements} <= set(allowed.split())
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>document.title='owned'</script>") >= 20 and "{{ title }} {% x" in page.text


def test_it_loads_nothing_and_links_nowhere(run: Path) -> None:
    source = write_report([run]).read_text()
    page = Page(source)
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "srcset", "data", "action", "poster", "xlink:href", "style"}, tag
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?:|//|url\(|@import|@font-face|<script|<link|<iframe", source)
    policy = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_a_large_run_makes_a_small_page(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / str(i), extra="long " * 40_000, prompts=8) for i in range(3)]
    for run in runs:
        write(run / "sft" / "metrics.jsonl", [{"step": i, "loss": 1.0 + i % 7} for i in range(20_000)])
        hints = [{"step": i, "hint": "clip", "message": "m" * 200} for i in range(500)]
        write(run / "ppo" / "hints.jsonl", hints)
    page = write_report(runs)
    assert page.stat().st_size < LARGEST
    source = page.read_text()
    assert f"{500 - MOST_HINTS} more in ppo/hints.jsonl" in source and source.count("m" * 200) == len(runs) * MOST_HINTS


# ------------------------------------------------------------------------------------------------------------- command
def test_the_command_writes_where_it_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = command.main(command.Config(runs=(run,), out=tmp_path / "new" / "place"))
    assert path == tmp_path / "new" / "place" / "report.html" and path.is_file()
    assert capsys.readouterr().out == f"report: {path}\n"


def test_what_is_no_run_is_refused_in_words(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folders, words in (
        ([tmp_path / "nothing"], "no such folder"),
        ([tmp_path / "empty"], "holds no stage"),
        ([run, run / ".." / "run"], "given twice"),
        ([run] * 13, "give 1 to 12"),
        ([], "give 1 to 12"),
    ):
        with pytest.raises(UserError, match=words):
            write_report(folders)
    (run / "sft" / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not a JSON object"):
        write_report([run])
    (run / "sft" / "metrics.jsonl").write_text("")
    (run / "summary.json").write_text('{"models": {"sft": {"total": 3}}}')
    with pytest.raises(UserError, match="is not of the form"):
        write_report([run])


def damages(value: object) -> Iterator[object]:
    """The value with one part of it exchanged for one of another type, or left out, at every place in turn."""
    yield from (None, "word", -1, 10**400, [], [1], {}, {"a": {}})
    if isinstance(value, dict):
        for name, part in value.items():
            yield {other: kept for other, kept in value.items() if other != name}
            yield from ({**value, name: worse} for worse in damages(part))


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of a mean of nothing, which would stand in the page as nan
@pytest.mark.parametrize(
    "name", ["summary.json", "calibration.json", "seconds.json", "ppo/run.json", "ppo/trace.jsonl"]
)
def test_a_damaged_file_is_one_line_or_a_page(name: str, run: Path) -> None:
    """A report is only about files of this project, and they come from older versions and from editors too."""
    path = run / name
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    random = Random(name)
    every = list(damages(json.loads(lines[-1])))
    for worse in random.sample(every, min(60, len(every))):
        path.write_text("\n".join([*lines[:-1], json.dumps(worse)]))
        try:
            write_report([run])
        except UserError as error:
            assert "\n" not in str(error)


def test_the_demo_ends_with_a_report_that_has_a_calibration(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "feedback", "reward", "ppo", "dpo")
    path = demo.report_on(demo.Config(run=run, device="cpu"))
    measured = json.loads((run / "calibration.json").read_text())
    assert measured == calibration.measure(calibration.Config(run=run, device="cpu"))
    page = Page(path.read_text())
    assert f"run{measured['pairs']}{measured['accuracy']:.1%}" in page.text
    assert not (run / "curves.png").exists() and not (run / "calibration.png").exists()


# ------------------------------------------------------------------------------------------------------- a real browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: how the report looks is not tested")
def test_it_fits_a_phone_and_a_desk(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "run", extra=EVIL + LONG, trace=FALLING), a_run(tmp_path / LONG[:80])]
    url = write_report(runs).as_uri()
    with browser.Browser(CHROMIUM, url) as page:
        for width in (390, 1280):
            metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            page.call("Emulation.setDeviceMetricsOverride", **metrics)
            page.wait_for("document.readyState === 'complete' && document.querySelectorAll('section').length === 9")
            page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), f"overflows at {width}"
            beyond = "[...document.querySelectorAll('p, h1, h2, h3, h4, li, figure, svg, .answer')].filter(e => "
            beyond += f"!e.closest('.scroll') && e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)"
            assert page.run(beyond) == []
            widths = "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)"
            assert page.run(f"Math.min(...{widths})") / 360 * 12 > 9.5, "the numbers of a chart are too small to read"
        assert page.run("document.title").startswith("Report of") and page.requests == [url]
        images = page.accessible("image") or page.accessible("img")
        assert any(name.startswith("Reward and judge against distance") for name in images)

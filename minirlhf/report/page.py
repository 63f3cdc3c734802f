"""The page: the sections put into `page.html`, which holds the style and nothing that is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from minirlhf.files import atomic
from minirlhf.report.answers import answers
from minirlhf.report.curves import curves
from minirlhf.report.facts import facts
from minirlhf.report.markup import Html, element, joined, section, table, text
from minirlhf.report.results import calibration, frontier, models, over_optimisation
from minirlhf.report.run import Run, read_runs
from minirlhf.report.verdict import Check, checks, mark, over_optimised, summary_of
from minirlhf.runtime import UserError, require

PAGE = Path(__file__).with_name("page.html")
LARGEST = 2_000_000  # bytes of a report
MOST_RUNS = 12  # more cannot be told apart
MOST_HINTS = 40  # of a stage
SECTIONS = {
    "verdict": "Verdict",
    "hints": "Hints",
    "models": "Models",
    "over-optimisation": "Over-optimised?",
    "frontier": "Frontier",
    "answers": "Answers",
    "curves": "Curves",
    "calibration": "Calibration",
    "facts": "What was run",
}


def verdict(runs: Sequence[Run]) -> Html:
    """In plain words, for each run: was PPO taken too far, and which thresholds are met."""
    parts: list[Html] = []
    for run in runs:
        found = checks(run)
        if len(runs) > 1:
            parts.append(element("h3", run.label))
        for stage in run.of_kind("ppo"):
            finding = over_optimised(run, stage)
            headline = element("strong", finding.headline, class_=f"finding {finding.answer}")
            parts.append(element("p", headline, " ", finding.why))
        if not run.of_kind("ppo"):
            parts.append(element("p", "PPO has not begun in this run."))
        parts += [element("p", summary_of(found)), threshold_table(found)]
    return section("verdict", "Verdict", *parts)


def threshold_table(found: Sequence[Check]) -> Html:
    """Each threshold beside what the run reached."""
    return table(("", "needed", "found", ""), [(c.what, c.needed, c.found, mark(c.met)) for c in found])


def hints(runs: Sequence[Run]) -> Html:
    """What the stages noticed while they ran."""
    items = []
    for run in runs:
        for stage in run.stages:
            where = stage.name if len(runs) == 1 else f"{run.label}/{stage.name}"
            for hint in stage.hints[:MOST_HINTS]:
                name = element("strong", f"{where}, step {hint.get('step', '?')}: {hint.get('hint', 'hint')}")
                items.append(element("li", name, " ", hint.get("message", "")))
            if len(stage.hints) > MOST_HINTS:
                items.append(
                    element("li", f"{where}: {len(stage.hints) - MOST_HINTS} more in {stage.name}/hints.jsonl")
                )
    body = element("ul", *items) if items else element("p", "No stage noticed anything wrong.", class_="quiet")
    return section("hints", "Hints", body)


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = f"Report of {', '.join(run.label for run in runs)}"
    steps = [f"{run.label}: {', '.join(stage.name for stage in run.stages) or 'no stage'}" for run in runs]
    parts = [
        verdict(runs),
        hints(runs),
        models(runs),
        over_optimisation(runs),
        frontier(runs),
        answers(runs),
        curves(runs),
        calibration(runs),
        facts(runs),
    ]
    links = [element("a", name, href=f"#{place}") for place, name in SECTIONS.items()]
    values = {
        "title": text(title),
        "about": text(f"Stages of {'; '.join(steps)}."),
        "contents": joined(links, " "),
        "sections": joined(parts, "\n"),
    }
    return Template(PAGE.read_text(encoding="utf-8")).substitute(values)


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html` about one or several runs into `out`, by default the first run's folder; returns its path.

    Any stage and any file may be missing: its section says what makes it. Raises UserError where a folder holds no run.
    """
    require(0 < len(folders) <= MOST_RUNS, f"{len(folders)} runs: give 1 to {MOST_RUNS}")
    runs = read_runs(folders)
    try:
        page = render(runs).encode("utf-8", "replace")
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        names = " or ".join(str(folder) for folder in folders)
        raise UserError(
            f"{names}: a file is not of the form that this version writes ({type(error).__name__}: {error}); evaluate "
            "the run again with python -m minirlhf.evaluate"
        ) from error
    require(len(page) <= LARGEST, f"the report has {len(page):,} bytes, more than {LARGEST:,}: give fewer runs")
    path = (out or folders[0]) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(page)
    return path

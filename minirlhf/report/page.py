"""The page: the sections in `page.html`, which holds the style and nothing that is loaded from elsewhere.

Answers, prompts, paths and hints were written by models and by people: jinja2 escapes everything that is no `Markup`,
and of a long text the beginning is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from minirlhf.files import atomic
from minirlhf.report.results import answers, calibration, frontier, hints, models, over_optimisation, verdict
from minirlhf.report.run import Run, read_runs
from minirlhf.report.stages import Block, curves, facts
from minirlhf.runtime import UserError, require

PAGE = Path(__file__).with_name("page.html")
LARGEST = 2_000_000  # bytes of a report
LONGEST = 1000  # characters of a text that are shown
MOST_RUNS = 12  # more cannot be told apart

# Place, link, title and content of each section, in the order of the page.
SECTIONS: dict[str, tuple[str, str, Callable[[Sequence[Run]], list[Block]]]] = {
    "verdict": ("Verdict", "Verdict", verdict),
    "hints": ("Hints", "Hints", hints),
    "models": ("Models", "Models beside each other", models),
    "over-optimisation": ("Over-optimised?", "Was the proxy optimised too far?", over_optimisation),
    "frontier": ("Frontier", "Reward for KL: the frontier", frontier),
    "answers": ("Answers", "The same prompts, answered by each model", answers),
    "curves": ("Curves", "Curves of every stage", curves),
    "calibration": ("Calibration", "Calibration of the reward model", calibration),
    "facts": ("What was run", "What was run", facts),
}


def cut(value: object) -> str:
    """A text, or its beginning and how much was left out; markup as it is."""
    words = value if isinstance(value, Markup) else str(value)
    whole = isinstance(value, Markup) or len(words) <= LONGEST
    return words if whole else f"{words[:LONGEST]} … ({len(words) - LONGEST:,} more characters)"


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    environment = jinja2.Environment(autoescape=True, finalize=cut, trim_blocks=True)
    steps = [f"{run.label}: {', '.join(stage.name for stage in run.stages) or 'no stage'}" for run in runs]
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        title=f"Report of {', '.join(run.label for run in runs)}",
        about=f"Stages of {'; '.join(steps)}.",
        sections=[
            {"name": name, "link": link, "title": title, "blocks": blocks(runs)}
            for name, (link, title, blocks) in SECTIONS.items()
        ],
    )


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html` about one or several runs into `out`, by default the first run's folder; returns its path.

    Any stage and any file may be missing: its section says what makes it. Raises UserError where a folder holds no run.
    """
    require(0 < len(folders) <= MOST_RUNS, f"{len(folders)} runs: give 1 to {MOST_RUNS}")
    runs = read_runs(folders)
    try:
        page = render(runs).encode("utf-8", "replace")
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        names = " or ".join(str(folder) for folder in folders)
        raise UserError(
            f"{names}: a file is not of the form that this version writes ({type(error).__name__}: {error}); evaluate "
            "the run again with python -m minirlhf.evaluate"
        ) from error
    require(len(page) <= LARGEST, f"the report has {len(page):,} bytes, more than {LARGEST:,}: give fewer runs")
    path = (out or folders[0]) / "report.html"
    with atomic(path) as temporary:
        temporary.write_bytes(page)
    return path

"""The page: the sections in `page.html`, which holds the style and nothing that is loaded from elsewhere.

Answers, prompts, paths and hints were written by models and by people: jinja2 escapes everything that is no `Markup`,
and of a long text the beginning is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from minirlhf.files import atomic
from minirlhf.report.run import read_runs
from minirlhf.report.sections import SECTIONS
from minirlhf.runtime import UserError, require

LARGEST = 2_000_000  # bytes of a report
LONGEST = 1000  # characters of a text that are shown
MOST_RUNS = 12  # more cannot be told apart


def cut(value: object) -> str:
    """A text, or its beginning and how much was left out; markup as it is."""
    words = value if isinstance(value, Markup) else str(value)
    whole = isinstance(value, Markup) or len(words) <= LONGEST
    return words if whole else f"{words[:LONGEST]} … ({len(words) - LONGEST:,} more characters)"


def template() -> jinja2.Template:
    """The page, in which every value is escaped and cut."""
    files = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=files, autoescape=True, finalize=cut, trim_blocks=True).get_template("page.html")


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html` about one or several runs into `out`, by default the first run's folder; returns its path.

    Any stage and any file may be missing: its section says what makes it. Raises UserError where a folder holds no run.
    """
    require(0 < len(folders) <= MOST_RUNS, f"{len(folders)} runs: give 1 to {MOST_RUNS}")
    try:
        page = template().render(runs=read_runs(folders), sections=SECTIONS).encode("utf-8", "replace")
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        damage = f"is not of the form that this version writes ({type(error).__name__}: {error})"
        names = " or ".join(map(str, folders))
        raise UserError(f"{names}: a file {damage}; evaluate the run again with python -m minirlhf.evaluate") from error
    require(len(page) <= LARGEST, f"the report has {len(page):,} bytes, more than {LARGEST:,}: give fewer runs")
    path = (out or folders[0]) / "report.html"
    with atomic(path) as temporary:
        temporary.write_bytes(page)
    return path

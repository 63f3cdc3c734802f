"""A report of one run, or of several beside each other: a single HTML file that loads nothing.

    python -m minirlhf.report                       # runs/tiny, finished or not: writes runs/tiny/report.html
    python -m minirlhf.report runs/a runs/b --out comparison

At the top it says in words whether PPO over-optimised and which thresholds are met. How to read it: docs/using.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minirlhf.config import Settings, run_script
from minirlhf.report.page import write_report


@dataclass
class Config(Settings):
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/tiny"),)
    """Folders of runs; more than one are laid over each other."""
    out: Path | None = None
    """Folder of report.html; by default the first run's."""


PRESETS = {"report": Config()}


def main(config: Config) -> Path:
    """Write the report and say where; returns its path."""
    path = write_report(config.runs, config.out)
    print(f"report: {path}")
    return path


if __name__ == "__main__":
    run_script(main, PRESETS)

"""`python -m minirlhf.evaluate`: a run of the demo, or any models against each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from minirlhf.config import run_script
from minirlhf.evaluate import comparison, evaluation


def command(arguments: Sequence[str]) -> ModuleType:
    """The module of the command: models to compare where the first word is no flag, else a run."""
    return comparison if arguments and not arguments[0].startswith("-") else evaluation


if __name__ == "__main__":
    chosen = command(sys.argv[1:])
    globals()["__doc__"] = chosen.__doc__  # what --help shows
    run_script(chosen.main, chosen.PRESETS)

"""`python -m minirlhf.evaluate`: a run of the demo, or any models against each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from minirlhf.config import run_script
from minirlhf.evaluate import comparison, evaluation


def command(arguments: Sequence[str]) -> tuple[Callable[[Any], object], dict[str, Any], str]:
    """What to run, its presets and its help: models to compare where the first word is no flag, else a run."""
    chosen: Any = comparison if arguments and not arguments[0].startswith("-") else evaluation
    return chosen.main, chosen.PRESETS, chosen.__doc__


if __name__ == "__main__":
    main, presets, __doc__ = command(sys.argv[1:])
    run_script(main, presets)

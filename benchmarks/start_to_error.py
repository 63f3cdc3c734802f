"""How long from the start of a command to its error: every row of tests/test_bad_commands.py as a real command line.

    python benchmarks/start_to_error.py            # prints the slowest rows, and the median by script

Seconds by the clock, and seconds of processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_bad_commands as table  # noqa: E402


def main(shown: int) -> None:
    """Time every row once."""
    with tempfile.TemporaryDirectory() as folder:
        files = table.make_files(Path(folder))
        seconds: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for script, flags, words in table.ROWS:
            line = [sys.executable, str(ROOT / f"train_{script}.py"), *table.command(script, flags, files)]
            started, used = time.perf_counter(), processor_seconds()
            done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
            seconds[script].append((time.perf_counter() - started, processor_seconds() - used, flags))
            table.assert_clear(done.returncode, done.stderr, words)
    for script, times in seconds.items():
        each = sorted(times, reverse=True)
        clock, processor = (statistics.median(row[i] for row in times) for i in (0, 1))
        most = max(row[1] for row in times)
        print(f"train_{script}.py: {len(times)} rows, by the clock median {clock:.2f} s, slowest {each[0][0]:.2f} s;")
        print(f"    of the processor median {processor:.2f} s, most {most:.2f} s. Slowest by the clock:")
        for t, used, flags in each[:shown]:
            print(f"    {t:.2f} s ({used:.2f} s)  {flags}")


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shown", type=int, default=3, help="slowest rows to print of each script")
    main(parser.parse_args().shown)

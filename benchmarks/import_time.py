"""What importing each script costs beyond torch: seconds by the clock and of the processor, medians of new processes.

    python benchmarks/import_time.py --rounds 7

The first round writes the bytecode and is not counted. What may be loaded at all, `tests/test_imports.py` says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_sft", "train_reward", "train_ppo", "train_dpo")
MEASURE = """
import time, sys, json
start = time.perf_counter(), time.process_time()
import torch
middle = time.perf_counter(), time.process_time()
__import__(sys.argv[1])
end = time.perf_counter(), time.process_time()
print(json.dumps([b - a for times in ((start, middle), (middle, end)) for a, b in zip(*times)]))
"""


def measured(script: str) -> list[float]:
    """Torch by the clock and the processor, then the script beyond it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    line = [sys.executable, "-c", MEASURE, script]
    done = subprocess.run(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="new processes a script, in turn")
    rounds = [{script: measured(script) for script in SCRIPTS} for _ in range(parser.parse_args().rounds + 1)][1:]
    print("| script | torch, s | beyond torch, s | torch, processor s | beyond torch, processor s |")
    print("| --- | --- | --- | --- | --- |")
    for script in SCRIPTS:
        torch, torch_used, beyond, used = (statistics.median(each[script][i] for each in rounds) for i in range(4))
        print(f"| {script} | {torch:.2f} | {beyond:.2f} | {torch_used:.2f} | {used:.2f} |")


if __name__ == "__main__":
    main()

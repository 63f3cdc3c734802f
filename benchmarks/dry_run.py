"""Does `--dry-run` say how long a stage takes? Its matrix products at the measured rate against the CPU seconds of it.

    python benchmarks/dry_run.py RUN            # a finished run of the demo, which is only read

Some steps of every stage of the demo, one thread, CPU seconds on both sides, so that other processes do not count. The
ratio is what `plan.ALL_ELSE` stands for. PPO's responses are planned as long as they may be and end earlier.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ours  # noqa: F401  first, because it finds the scripts where they are not installed
import torch

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf.runs import plan as planning
from minirlhf.runs import stage

CPU = torch.device("cpu")


def cases(run: Path, own: Path) -> list[tuple[Any, dict[str, Any]]]:
    """Each script with the settings that make it read `run`, write to `own` and end after some steps."""
    sft, rankings = str(run / "sft" / "model"), str(run / "feedback" / "rankings.jsonl")
    pairs = {"comparisons": rankings, "epochs": 0.5, "run": own}
    reward = str(run / "reward" / "model")
    return [
        (train_sft, {"epochs": 0.4, "run": own}),
        (train_reward, pairs | {"model": sft}),
        (train_ppo, {"policy": sft, "reward_model": reward, "iterations": 3, "run": own}),
        (train_dpo, pairs | {"policy": sft}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    planning.time = SimpleNamespace(perf_counter=time.process_time)
    planned: list[float] = []
    stage.show_plan = lambda plan, config: planned.append(
        planning.operations(plan, config)
        / planning.matrix_rate(plan.trained[0], planning.micro_batch(plan, config, CPU), CPU, torch.float32)
    )
    with tempfile.TemporaryDirectory() as folder:
        for script, changes in cases(given.run, Path(folder)):
            config = replace(script.PRESETS["tiny"], device="cpu", **changes)
            script.main(replace(config, dry_run=True))
            began = time.process_time()
            script.main(replace(config, dry_run=True))  # reading the data, and the measurement
            middle = time.process_time()
            script.main(config)
            seconds = time.process_time() - middle - (middle - began - planning.SECONDS)
            print(f"{script.__name__}: planned {planned[-1]:.1f} s, took {seconds:.1f} s: {seconds / planned[-1]:.2f}")


if __name__ == "__main__":
    main()

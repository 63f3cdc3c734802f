"""The whole pipeline on the embedded world: SFT, feedback, reward model, PPO, DPO, evaluation.

    python -m minirlhf                      # about three minutes on two CPU cores, everything under runs/tiny
    python -m minirlhf --run runs/second --seed 1
    python -m minirlhf --resume             # go on after an interruption: finished stages are left as they are

An earlier run in the same place is moved aside and named, never overwritten.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf.config import Seed, Settings, run_script
from minirlhf.evaluate import calibration, evaluation
from minirlhf.feedback import __main__ as feedback
from minirlhf.files import fresh_folder, read_json, read_records, write_json
from minirlhf.report import write_report
from minirlhf.runs import checkpoint


@dataclass
class Config(Settings):
    preset: Literal["tiny", "smoke"] = "tiny"
    """`tiny` is the demo; `smoke` goes through every stage in seconds and learns little."""
    run: Path = Path("runs/tiny")
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in that folder, at the newest whole checkpoint of the stage that was interrupted."""
    seed: Seed = 0
    """Seed of every stage."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""


PRESETS = {"tiny": Config(), "smoke": Config(preset="smoke", run=Path("runs/smoke"))}

# What the demo asks of a stage beyond its defaults: the judge's marks while PPO trains, for the report.
DEMO: dict[str, dict[str, Any]] = {"ppo": {"trace_every": 6}}

# What the smoke preset makes smaller in each stage.
SMOKE: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 1.0, "n_layer": 2, "n_head": 2, "n_embd": 64},
    "feedback": {"max_prompts": 256},
    "reward": {"reference_samples": 64},
    "ppo": {"iterations": 3, "rollout_size": 32},
    "dpo": {"epochs": 1.0},
    "evaluate": {"max_prompts": 64},
}

# Every stage, in turn.
MODULES = (train_sft, feedback, train_reward, train_ppo, train_dpo, evaluation)
STAGES = {name: (module.main, module.Config) for name, module in zip(SMOKE, MODULES, strict=True)}


def main(config: Config) -> dict[str, float]:
    """Run every stage in turn; returns the seconds each took."""
    with checkpoint.only_writer(config.run):
        checkpoint.require_unlocked(config.run)  # by a stage that was started by itself
        return run_stages(config)


def run_stages(config: Config) -> dict[str, float]:
    """`main`, where no other process writes the run."""
    times = config.run / "seconds.json"
    if not config.resume:
        fresh_folder(config.run)
    seconds = read_json(times)
    for name, (stage, stage_config) in STAGES.items():
        print(f"--- {name}", flush=True)
        started = time.perf_counter()
        settings: dict[str, Any] = {"run": config.run, "seed": config.seed, "device": config.device}
        settings |= DEMO.get(name, {}) | (SMOKE[name] if config.preset == "smoke" else {})
        settings |= {"resume": config.resume} if name != "evaluate" else {}  # which is always made anew
        stage(stage_config(**settings))
        # A stage that an earlier attempt finished keeps the time that it took then.
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 1)
        write_json(times, seconds)
    print_examples(config.run / "answers.jsonl")
    each = ", ".join(f"{name} {value}" for name, value in seconds.items())
    print(f"seconds: {each} total {sum(seconds.values()):.0f}")
    print(f"report: {report_on(config)}   models: {config.run}/*/model")
    return seconds


def report_on(config: Config) -> Path:
    """Measure the reward model's calibration, and write the report about everything; returns its path."""
    calibration.measure(calibration.Config(run=config.run, device=config.device))
    return write_report([config.run])


def print_examples(answers: Path, count: int = 3) -> None:
    """The first prompts of the evaluation, answered by SFT, PPO and DPO side by side."""
    for record in read_records(answers)[:count]:
        print(f"\n{record['prompt'].strip()}")
        for name in ("sft", "ppo", "dpo"):
            print(f"  {name}:{record[name]}")
    print()


if __name__ == "__main__":
    run_script(main, PRESETS)

"""Exact resume: kill every stage at random moments, resume it, and compare what comes out with an unkilled run.

    python benchmarks/kill_resume.py                       # 20 runs of each stage, nine minutes on two busy cores
    python benchmarks/kill_resume.py --kills 3 --stages ppo

Each stage runs once undisturbed. Then, again and again, it is begun in a process of its own, ended by SIGKILL, resumed
with --resume and compared: the trained model, every tensor and number of the last checkpoint (weights and optimizers),
and metrics.jsonl must be the same bits, and nothing may be left behind. Half of the kills come at a moment drawn
uniformly from the undisturbed run's time, the other half while a checkpoint is being written. A resumed process may be
killed too: one kill in four is followed by another.

The models are small and every step is followed by a checkpoint, so that a large part of the time is spent on saving.
Processes are forked from one that has imported everything, so that the moments fall into the work and not into imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_dpo  # noqa: E402
import train_ppo  # noqa: E402
import train_reward  # noqa: E402
import train_sft  # noqa: E402
from minirlhf.feedback import __main__ as feedback  # noqa: E402
from minirlhf.files import file_hash  # noqa: E402
from minirlhf.runs import checkpoint  # noqa: E402
from minirlhf.runs.log import versions  # noqa: E402

STAGES = {"sft": train_sft, "feedback": feedback, "reward": train_reward, "ppo": train_ppo, "dpo": train_dpo}
NEEDS = {"sft": (), "feedback": ("sft",), "reward": ("sft", "feedback"), "ppo": ("sft", "reward")}
NEEDS["dpo"] = ("sft", "feedback")
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 2.0, "n_layer": 2, "n_head": 2, "n_embd": 32, "validation_every": 5, "checkpoint_every": 1},
    "feedback": {"max_prompts": 96, "candidates": 3, "max_new_tokens": 12, "length_bias": 0.1},
    "reward": {"epochs": 3.0, "reference_samples": 32, "max_new_tokens": 12, "checkpoint_every": 1},
    "ppo": {"iterations": 6, "rollout_size": 32, "max_new_tokens": 12, "kl_target": 1.0, "kl_horizon": 400.0},
    "dpo": {"epochs": 4.0, "validation_every": 5, "checkpoint_every": 1},
}
SETTINGS["ppo"]["checkpoint_every"] = 1
RECORDS = 256  # of the embedded world's files
LIMIT = 120  # seconds after which a process counts as hanging


def prepare(run: Path) -> None:
    """The inputs of every stage: the first records of the world's files."""
    run.mkdir(parents=True)
    for name in ("demonstrations.train", "demonstrations.validation", "prompts.train"):
        lines = (ROOT / "data" / "world" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (run / f"{name}.jsonl").write_text("".join(lines[:RECORDS]), encoding="utf-8")


def start(stage: str, run: Path, *, resume: bool) -> int:
    """Begin a stage in a forked process; returns its id."""
    files = {"sft": {"train": "demonstrations.train", "validation": "demonstrations.validation"}}
    files |= {"feedback": {"prompts": "prompts.train"}, "ppo": {"prompts": "prompts.train"}}
    files["reward"] = {"reference_prompts": "prompts.train"}
    inputs = {field: run / f"{name}.jsonl" for field, name in files.get(stage, {}).items()}
    module = STAGES[stage]
    config = dataclasses.replace(module.Config(), run=run, device="cpu", resume=resume, **inputs, **SETTINGS[stage])
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = (run / f"{stage}.output").open("a", buffering=1)
        sys.stdout = sys.stderr = output
        module.main(config)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def wait(process: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """The exit code of a process; None once `until` holds, or after LIMIT seconds, while it still runs."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.0005)
    return None


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def hashes(folder: Path) -> dict[str, str]:
    """Of all that must be equal."""
    newest = checkpoint.latest(folder / "checkpoints")
    paths = {f"model/{name}": folder / "model" / name for name in ("model.safetensors", "config.json")}
    paths |= {f"checkpoint/{name}": newest / name for name in ("state.safetensors", "state.json")}
    return {name: file_hash(path) for name, path in paths.items()} | {"metrics": file_hash(folder / "metrics.jsonl")}


def left_behind(folder: Path) -> list[str]:
    """Temporary files, more checkpoints than are kept, and folders moved aside."""
    found = [path.name for path in folder.rglob(".*")]
    kept = [path.name for path in (folder / "checkpoints").iterdir() if path.name != "latest"]
    return found + (kept if len(kept) > 3 else []) + [p.name for p in folder.parent.glob(f"{folder.name}.[0-9]*")]


def run_whole(stage: str, run: Path) -> float:
    """Run a stage undisturbed; returns its seconds."""
    started = time.monotonic()
    code = wait(start(stage, run, resume=False))
    if code != 0:
        raise RuntimeError(f"{stage} ended with {code}: {(run / f'{stage}.output').read_text()}")
    return time.monotonic() - started


def kill_once(stage: str, run: Path, *, resume: bool, seconds: float, saving: bool, draw: random.Random) -> dict:
    """Begin or resume a stage and kill it; says when, and what was being written at that moment."""
    root = run / stage / "checkpoints"
    begun = time.monotonic()
    moment = draw.uniform(0, seconds)
    process = start(stage, run, resume=resume)

    def now() -> bool:
        late = time.monotonic() - begun >= moment
        return late and (not saving or any(root.glob(".saving-0*")))

    code = wait(process, now)
    if code is None:
        time.sleep(draw.uniform(0, 0.004) if saving else 0.0)
        kill(process)
    writing = sorted(path.name for path in (run / stage).rglob(".*")) if (run / stage).exists() else []
    newest = checkpoint.latest(root) if root.exists() else None
    return {"moment": round(moment, 3), "killed": code is None, "writing": writing, "newest": newest and newest.name}


def trial(stage: str, base: Path, run: Path, *, seconds: float, saving: bool, draw: random.Random) -> dict:
    """Kill, resume, compare; the run's folder stands where the base stood, so that even paths are equal."""
    shutil.copytree(base, run)
    kills = [kill_once(stage, run, resume=False, seconds=seconds, saving=saving, draw=draw)]
    if draw.random() < 0.25 and kills[0]["killed"]:
        kills.append(kill_once(stage, run, resume=True, seconds=seconds, saving=False, draw=draw))
    code = wait(start(stage, run, resume=True))
    output = (run / f"{stage}.output").read_text()
    return {
        "kills": kills,
        "code": code,
        "hashes": hashes(run / stage) if code == 0 else output[-500:],
        "left_behind": left_behind(run / stage) if code == 0 else None,
    }


def measure(stage: str, work: Path, kills: int, seed: int) -> dict:
    """All trials of a stage."""
    draw = random.Random(f"{seed} {stage}")
    base, run = work / f"{stage}-base", work / "run"
    shutil.copytree(work / "inputs", run)
    for need in NEEDS[stage]:
        shutil.copytree(work / "finished" / need, run / need)
    shutil.copytree(run, base)
    seconds = run_whole(stage, run)
    expected = hashes(run / stage)
    shutil.rmtree(run)
    trials = []
    while sum(t["kills"][0]["killed"] for t in trials) < kills:
        saving = len(trials) % 2 == 1
        trials.append(trial(stage, base, run, seconds=seconds, saving=saving, draw=draw))
        shutil.rmtree(run)
    hit = [t for t in trials if t["kills"][0]["killed"]]
    return {
        "seconds_undisturbed": round(seconds, 2),
        "runs_killed": len(hit),
        "kills": sum(k["killed"] for t in hit for k in t["kills"]),
        "while_writing": sum(bool(k["writing"]) for t in hit for k in t["kills"]),
        "equal": sum(t["hashes"] == expected for t in hit),
        "left_behind": sum(bool(t["left_behind"]) for t in hit),
        "different": [t for t in trials if t["hashes"] != expected or t["left_behind"]],
        "kills_at": [[k["moment"] for k in t["kills"]] for t in hit],
        "expected": hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="runs to kill of each stage")
    parser.add_argument("--stages", nargs="+", default=["sft", "reward", "ppo", "dpo"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/kill_resume.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "seed": options.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": versions(),
        "stages": {},
    }
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        work = Path(folder)
        prepare(work / "inputs")
        shutil.copytree(work / "inputs", work / "run")
        for stage in ("sft", "feedback", "reward"):
            run_whole(stage, work / "run")
        (work / "run").rename(work / "finished")
        for stage in options.stages:
            found = result["stages"][stage] = measure(stage, work, options.kills, options.seed)
            print(
                f"{stage}: {found['runs_killed']} runs killed ({found['kills']} kills, {found['while_writing']} while "
                f"writing), {found['equal']} equal, {found['left_behind']} left something behind",
                flush=True,
            )
    result["seconds"] = round(time.monotonic() - began, 1)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(s["equal"] == s["runs_killed"] and not s["left_behind"] for s in result["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

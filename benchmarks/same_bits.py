"""The alarm of a restructuring: do all stages still give the same bits as at an earlier commit?

    python benchmarks/same_bits.py HEAD~1                   # every case, both sides, one thread
    python benchmarks/same_bits.py v1.0 --only rloo grpo    # the smoke run, which the others start from, and these
    python benchmarks/same_bits.py --list

The commit is checked out in a temporary worktree. Both sides, the commit and the tree that this file lies in, run the
same commands as a user types them, so that nothing here depends on where a module lives. The smoke run comes first; the
other cases start from its models and rankings of the same side. They are tiny and learn nothing: they touch code.

Of each case these must be equal: every tensor of the weights bit for bit, rankings, answers, normalisations, summaries,
and metrics, row by row and key by key. `run.json` holds paths and the commit and is not compared. A command that fails,
on one side or on both, and a case that leaves nothing to compare count as differences. A line a case says the seconds
of both sides and "same", or the first difference as the stages wrote it: the commit's value, then this tree's.
The exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from children import checked_out
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent

RENAMED: dict[str, str] = {}
"""Keys of metrics and summaries that have another name now: the commit's name, then this tree's. The numbers behind
them must still be equal, and a key that is not in this table may not change its name."""

COMPARED = {"model.safetensors", "metrics.jsonl", "rankings.jsonl", "normalisation.json", "summary.json"}
COMPARED |= {"answers.jsonl", "best.jsonl", "random.jsonl", "calibration.json", "comparison.json", "trace.jsonl"}
PLACE = re.compile(r'"[^"]*/same-bits-[^/"]*/(commit|here)/')  # how a path into the runs of a side begins
LIMIT = 600  # seconds after which a command counts as hanging
STOP_AFTER = 2  # rows of metrics after which a run that is to be resumed is stopped

SFT = "train_sft.py --n-layer 2 --n-head 2 --n-embd 32 --epochs 0.1 --validation-every 8 --run {run}"
SFT += " --validation {inputs}/texts.jsonl"  # few, and so fast
REWARD = "train_reward.py --model {smoke}/sft/model --epochs 3 --batch-size 16 --reference-samples 16 --run {run}"
RANKED = REWARD + " --split [:96] --comparisons {smoke}/feedback/rankings.jsonl"
TIED = REWARD + " --split [:96] --comparisons {inputs}/ties.jsonl"
SAMPLED = " --policy {smoke}/sft/model --split [:64] --max-new-tokens 16"
SCORED = " --reward-model {smoke}/reward/model"
LOOP = " --rollout-size 16 --iterations 2 --epochs 2 --minibatches 2"
PPO = "train_ppo.py --run {run}" + SAMPLED + LOOP
GROUPS = PPO + SCORED + " --group-size 4 --advantages "
LONGER = "train_ppo.py --rollout-size 16 --iterations 6 --epochs 2 --minibatches 2" + SAMPLED + SCORED
LONGER += " --kl-target 1 --kl-horizon 100"
DPO = "train_dpo.py --policy {smoke}/sft/model --comparisons {smoke}/feedback/rankings.jsonl --split [:96] --run {run}"
ONLINE = "-m minirlhf.online_dpo --run {run}" + SAMPLED + SCORED + LOOP
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 -- "

CASES: dict[str, list[str]] = {
    "smoke": ["-m minirlhf --preset smoke --run {run}"],
    "stages": [
        SFT,
        "-m minirlhf.feedback --run {run} --max-prompts 64 --candidates 3 --noise 0.1 --length-bias 0.1",
        "train_reward.py --run {run} --epochs 1 --reference-samples 16",
        "train_dpo.py --run {run} --epochs 1 --label-smoothing 0.1",
        "-m minirlhf.evaluate --run {run} --max-prompts 16 --best-of 2",
        "-m minirlhf.evaluate {run}/sft {run}/dpo --out {run}/comparison --prompts {inputs}/prompts.jsonl",
    ],
    "rloo": [GROUPS + "rloo"],
    "grpo": [GROUPS + "grpo"],
    "grpo-no-std": [GROUPS + "grpo-no-std"],
    "reinforce": [PPO + SCORED + " --advantages reinforce"],
    "kl-loss-k2": [GROUPS + "rloo --kl-in loss --kl-estimator k2"],
    "kl-loss-k3": [GROUPS + "grpo --kl-in loss --kl-estimator k3"],
    "adaptive-kl": [PPO + SCORED + " --kl-target 1 --kl-horizon 100"],
    "ptx": [PPO + SCORED + " --ptx-coefficient 0.5 --ptx-data {inputs}/texts.jsonl"],
    "stop-kl": [PPO + SCORED + " --stop-kl 0.0001"],
    "whiten-rewards": [PPO + SCORED + " --whiten-rewards"],
    "ensemble": [RANKED + " --seed 1", PPO + SCORED + " --ensemble {run}/reward/model --aggregate worst"],
    "reward-function": [PPO + " --reward same_bits_reward:brevity"],
    "best-against-rest": [RANKED + " --objective best-against-rest"],
    "plackett-luce": [RANKED + " --objective plackett-luce --contrast 0"],
    "ties-half": [TIED + " --ties half"],
    "ties-davidson": [TIED + " --ties davidson --contrast 0"],
    "patience": [RANKED + " --epochs 20 --learning-rate 0.02 --patience 2 --validation-every 3"],
    "micro-batches": [line + " --micro-batch-tokens 128" for line in (SFT, RANKED, PPO + SCORED, DPO)],
    "checkpointing": [line + " --gradient-checkpointing" for line in (SFT, PPO + SCORED)],
    "bf16": [line + " --dtype bfloat16" for line in (SFT, RANKED, PPO + SCORED, DPO)],
    "resume": [
        LONGER + " --run {run}/whole",
        "stop {run}/parted/ppo " + LONGER + " --run {run}/parted --checkpoint-every 1",
        LONGER + " --run {run}/parted --checkpoint-every 1 --resume",
    ],
    "two-processes": [TORCHRUN + line for line in (SFT, PPO + SCORED)],
    "online-dpo": [ONLINE, ONLINE + " --loss ipo --stage ipo"],
    "rejection": ["-m minirlhf.rejection --run {run} --candidates 4" + SAMPLED + SCORED],
}

REWARD_MODULE = '''"""A reward for `--reward`: short answers, and those that know no seal."""


def brevity(prompts, responses):
    return [("seal" not in text) - len(text) / 40 for text in responses]
'''


# --------------------------------------------------------------------------------------------------------- to compare
def tensor_difference(old: dict[str, Tensor], new: dict[str, Tensor]) -> str | None:
    """The first tensor that differs in a bit, and its first such value on both sides; None where all are equal."""
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            return f"{name} is in {'the commit' if name in old else 'this tree'} alone"
        a, b = old[name], new[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}"
        a, b = (x.contiguous().flatten() for x in (a, b))
        bits = [x.view(torch.uint8).view(len(x), -1) for x in (a, b)] if len(a) else []
        if bits and not torch.equal(*bits):
            changed = (bits[0] != bits[1]).any(dim=1).nonzero().flatten()
            first = changed[0].item()
            return f"{name}[{first}]: {a[first].item()!r}, {b[first].item()!r} ({len(changed)} of {len(a)} values)"
    return None


def flat(value: Any, names: dict[str, str], path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested JSON: each path, with keys renamed, and its text, so that nan equals nan."""
    if not isinstance(value, dict | list) or not value:
        yield path, json.dumps(value)
    else:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from flat(part, names, f"{path}.{names.get(key, key)}".lstrip("."))


def row_difference(old: list[Any], new: list[Any], names: dict[str, str]) -> str | None:
    """The first row that differs, its first such key, and both values; None where all rows are equal."""
    for number, (a, b) in enumerate(zip(old, new, strict=False)):
        ours, theirs = set(flat(a, names)), set(flat(b, {}))
        if differing := ours ^ theirs:
            key = min(differing)[0]
            values = [
                next((v for k, v in sorted(side - both) if k == key), "nothing")
                for side, both in ((ours, theirs), (theirs, ours))
            ]
            return f"row {number}, {key}: {values[0]}, {values[1]}"
    return None if len(old) == len(new) else f"{len(old)} rows, {len(new)} rows"


def file_difference(old: Path, new: Path, names: dict[str, str]) -> str | None:
    """The first difference of two files of the same name."""
    for path, where in ((old, "this tree"), (new, "the commit")):
        if not path.exists():
            return f"is in {where} alone"
    if old.suffix == ".safetensors":
        return tensor_difference(load_file(old), load_file(new))
    rows = []
    for path in (old, new):
        text = PLACE.sub('"', path.read_text(encoding="utf-8"))
        rows.append([json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)])
    return row_difference(*rows, names)


def differences(old: Path, new: Path, names: dict[str, str]) -> list[str]:
    """One line a file that differs under two folders, in the order in which the files were written."""
    written = {p.relative_to(f): p.stat().st_mtime_ns for f in (new, old) for p in f.rglob("*") if p.name in COMPARED}
    if not written:
        return ["nothing to compare"]
    files = sorted(written, key=lambda name: (written[name], name))
    found = [(name, file_difference(old / name, new / name, names)) for name in files]
    return [f"{name} {text}" for name, text in found if text]


# -------------------------------------------------------------------------------------------------------------- to run
class Side:
    """A tree of the project and the folder for its runs."""

    def __init__(self, root: Path, runs: Path) -> None:
        self.root, self.runs, self.inputs = root, runs, runs / "inputs"
        self.inputs.mkdir(parents=True)

    def run(self, case: str) -> tuple[float, str | None]:
        """Run a case's commands; returns the seconds, and what went wrong."""
        began, error = time.monotonic(), None
        folders = {"smoke": self.runs / "smoke", "inputs": self.inputs, "run": self.runs / case}
        for line in CASES[case]:
            words = [word.format(**folders) for word in line.split()]
            stop = Path(words[1]) / "metrics.jsonl" if words[0] == "stop" else None
            if error := self.execute(words[2 if stop else 0 :], self.runs / f"{case}.txt", stop):
                break
        return time.monotonic() - began, error

    def execute(self, words: list[str], log: Path, stop: Path | None) -> str | None:
        """Run one command, which is to be stopped once `stop` has some rows; returns what went wrong."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.root), str(self.inputs)])}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("a") as output:
            command = [sys.executable, *words, "--device", "cpu"]
            process = subprocess.Popen(command, cwd=self.root, env=environment, stdout=output, stderr=output)
        try:
            while stop and process.poll() is None:
                if stop.exists() and stop.read_bytes().count(b"\n") >= STOP_AFTER:
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.01)
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = f"nothing within {LIMIT} s"
        finally:
            process.terminate()  # torchrun passes it on; nothing where the command has ended
            process.wait()
        said = (log.read_text(encoding="utf-8").splitlines() or [""])[-1]
        if stop:
            return None if code in (130, 143) or code == -signal.SIGTERM else f"was not stopped: code {code}: {said}"
        return f"{words[0 if words[0] != '-m' else 1]} ended with {code}: {said}" if code else None

    def write_inputs(self) -> None:
        """What the cases read beside the smoke run: texts, a reward, rankings of which every other has a tie."""
        (self.inputs / "same_bits_reward.py").write_text(REWARD_MODULE, encoding="utf-8")
        for name, source in {"texts": "demonstrations.train", "prompts": "prompts.test"}.items():
            lines = (self.root / "data" / "world" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(True)
            (self.inputs / f"{name}.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
        rankings = self.runs / "smoke" / "feedback" / "rankings.jsonl"
        lines = rankings.read_text(encoding="utf-8").splitlines() if rankings.exists() else []
        records = [json.loads(line) for line in lines]
        for record in records[::2]:
            record["ranks"] = [max(rank - 1, 0) for rank in record["ranks"]]
        (self.inputs / "ties.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def judge(case: str, commit: Side, here: Side) -> tuple[list[float], list[str]]:
    """Run a case on both sides; returns the seconds of each, and what differs."""
    seconds, errors = zip(*(side.run(case) for side in (commit, here)), strict=True)
    sides = {"the commit": commit.runs / case, "this tree": here.runs / case}
    if any(errors):
        return seconds, [f"{name}: {error}" for name, error in zip(sides, errors, strict=True) if error]
    found = differences(*sides.values(), RENAMED)
    for name, folder in sides.items() if case == "resume" else ():
        parted = differences(folder / "whole", folder / "parted", {})
        found += [f"{name}, whole and resumed: {text}" for text in parted]
    return seconds, found


def compare(commit: str, names: list[str], folder: Path) -> int:
    """Run the cases on both sides and say what differs; returns the number of cases that differ."""
    differing = 0
    with checked_out(commit) as tree:
        sides = Side(tree, folder / "commit"), Side(ROOT, folder / "here")
        for case in names:
            seconds, found = judge(case, *sides)
            if case == "smoke":
                for side in sides:
                    side.write_inputs()
            differing += bool(found)
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            times = "".join(f"{x:7.1f} s" for x in seconds)
            print(f"{case:<18}{times}   {f'DIFFERS: {found[0]}{more}' if found else 'same'}", flush=True)
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", help="what this tree is compared with")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="cases to run after the smoke run")
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    parser.add_argument("--keep", action="store_true", help="keep the runs, and say where")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return 0
    if options.commit is None:
        parser.error("name the commit to compare with")
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{options.commit}^{{commit}}"],
        stdout=subprocess.DEVNULL,
    )
    if found.returncode:
        parser.error(f"{options.commit}: no such commit")
    began = time.monotonic()
    names = [case for case in CASES if case == "smoke" or case in (options.only or CASES)]
    folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
    try:
        differing = compare(options.commit, names, folder)
    finally:
        if options.keep:
            print(f"the runs are in {folder}")
        else:
            shutil.rmtree(folder)
    print(f"{differing} of {len(names)} cases differ, {time.monotonic() - began:.0f} s")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Stages as child processes: the commands that a user types, on tiny models, in this tree or in another one.

A child is forked from a process that has imported everything, so that what is tried falls into the work and not into
imports; torchrun starts its own. Nothing here knows where a module of the project lives: of a tree only its commands
and the files of a run are used. The tree is the one that MINIRLHF_TREE names, or else this one; `--tree COMMIT` checks
a commit out and starts the benchmark again with it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parent.parent
TREE = Path(os.environ.get("MINIRLHF_TREE", ROOT)).resolve()
RECORDS = 256  # of each of the embedded world's files
LIMIT = 120  # seconds after which a process counts as hanging
POLL = 0.0005  # seconds between two looks at it

SAMPLED = " --prompts {run}/prompts.train.jsonl --max-new-tokens 12"
SCORED = SAMPLED + " --missing-eos-score None"  # no response ends, and all would have the same score
COMMANDS = {
    "sft": "train_sft.py --train {run}/demonstrations.train.jsonl --validation {run}/demonstrations.validation.jsonl"
    " --epochs 2 --n-layer 2 --n-head 2 --n-embd 32 --validation-every 5",
    "feedback": "-m minirlhf.feedback --max-prompts 96 --candidates 3 --length-bias 0.1" + SAMPLED,
    "reward": "train_reward.py --epochs 3 --reference-samples 32 --max-new-tokens 12"
    " --reference-prompts {run}/prompts.train.jsonl",
    "ppo": "train_ppo.py --iterations 6 --rollout-size 32 --epochs 2 --minibatches 3 --kl-target 1 --kl-horizon 400"
    + SCORED,
    "dpo": "train_dpo.py --epochs 4 --validation-every 5",
    "online-dpo": "-m minirlhf.online_dpo --iterations 6 --rollout-size 16" + SCORED,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "feedback": ("sft",),
    "reward": ("sft", "feedback"),
    "dpo": ("sft", "feedback"),
}
NEEDS |= {"ppo": ("sft", "reward"), "online-dpo": ("sft", "reward")}
STAGES = ("sft", "reward", "ppo", "dpo", "online-dpo")


@dataclass(frozen=True)
class Order:
    """What a child is to do.

    more    further flags
    every   steps between two checkpoints
    at      optimizer step after which the main process sends `number` to itself, or to torchrun, its parent; 0: none
    """

    stage: str
    run: str
    more: str = ""
    every: int = 1
    resume: bool = False
    processes: int = 1
    at: int = 0
    number: int = 0
    to_parent: bool = False

    @property
    def words(self) -> list[str]:
        """The command, without `python`."""
        words = [word.format(run=self.run) for word in f"{COMMANDS[self.stage]} {self.more}".split()]
        words += ["--run", self.run, "--device", "cpu"] + ["--resume"] * self.resume
        return words + (["--checkpoint-every", str(self.every)] if self.stage != "feedback" else [])

    def file(self, kind: str) -> Path:
        """A file beside the run: `out`, `err`, `steps` (rows before each optimizer step) or `sent` (when)."""
        return Path(f"{self.run}.{self.stage}.{kind}")

    @property
    def folder(self) -> Path:
        """Of the stage."""
        return Path(self.run, self.stage)


# ----------------------------------------------------------------------------------------------------------- in a child
def work(order: Order) -> None:
    """Run the command in this process, as `python` would."""
    if os.environ.get("RANK", "0") == "0":
        watch(order)
    words = order.words
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(str(TREE / words[0]), run_name="__main__")


def watch(order: Order) -> None:
    """Note how many rows there were at each optimizer step, and send a signal after one of them."""
    steps = order.file("steps").open("w", buffering=1)
    count = 0

    def after_step(*_: object) -> None:
        nonlocal count
        count += 1
        steps.write(f"{rows(order.folder)}\n")
        if count == order.at:
            order.file("sent").write_text(repr(time.monotonic()))
            os.kill(os.getppid() if order.to_parent else os.getpid(), order.number)

    register_optimizer_step_post_hook(after_step)


def start(order: Order) -> int:
    """Begin to work in a process of its own; returns its id."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    process = os.fork()
    if process:
        return process
    code = 128 + signal.SIGINT  # of a KeyboardInterrupt, wherever it comes
    try:
        code = work_apart(order)
    finally:
        os._exit(code)


def work_apart(order: Order) -> int:
    """Work in a forked process, with files for what it writes; returns its exit code."""
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(order.file(kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell's background may ignore them
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if order.processes > 1:
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {order.processes}".split()
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *torchrun, __file__, json.dumps(asdict(order))])
    try:
        work(order)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
    return 0


# --------------------------------------------------------------------------------------------------------- from outside
def wait(process: int, until: Callable[[], bool] = lambda: False, limit: float = LIMIT) -> int | None:
    """The exit code of a process; None once `until` holds, or after `limit` seconds, while it still runs."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(POLL)
    return None


def kill(process: int) -> None:
    """SIGKILL, and wait for the end."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def run(order: Order) -> int | str:
    """Work to the end; returns the exit code, or "hangs"."""
    process = start(order)
    code = wait(process)
    if code is None:
        kill(process)
    return "hangs" if code is None else code


def catches_signals(process: int) -> bool:
    """True once the process has a handler for SIGTERM."""
    with contextlib.suppress(FileNotFoundError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt")).split()[1]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def rows(folder: Path) -> int:
    """Whole rows of a stage's metrics."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a stage, by `latest`, or else by its number."""
    root = folder / "checkpoints"
    if (root / "latest").exists():
        return root / (root / "latest").read_text().strip()
    return max(root.glob("[0-9]*"), default=None)


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    checkpoint = newest(folder)
    return int(checkpoint.name) if checkpoint else 0


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Of all that must be equal: the model, the last checkpoint and the rows."""
    names = ["model/model.safetensors", "model/config.json", "metrics.jsonl"]
    paths = {name: folder / name for name in names}
    paths |= {name: (newest(folder) or folder) / name for name in ("state.safetensors", "state.json")}
    return {name: file_hash(path) if path.is_file() else "missing" for name, path in paths.items()}


def left_behind(folder: Path) -> list[str]:
    """Temporary files and locks, more checkpoints than are to stay, and folders moved aside."""
    hidden = [path.name for path in folder.parent.rglob(".*")]
    checkpoints = [path.name for path in folder.glob("checkpoints/*") if path.name != "latest"]
    more = checkpoints if len(checkpoints) > 3 else []
    return hidden + more + [path.name for path in folder.parent.glob(f"{folder.name}.[0-9]*")]


def last_words(order: Order) -> str:
    """The end of what the child wrote, without the place of the run."""
    text = "".join(order.file(kind).read_text(errors="replace") for kind in ("out", "err"))
    return text.replace(order.run, "RUN")[-1500:]


@dataclass(frozen=True)
class Undisturbed:
    """A run that was left alone: its seconds, hashes, and the rows that there were at each optimizer step."""

    seconds: float
    hashes: dict[str, str]
    steps: list[int]

    @property
    def within_steps(self) -> list[int]:
        """Numbers of the optimizer steps that another one of the same training step follows, or else of all."""
        pairs = enumerate(zip(self.steps, self.steps[1:], strict=False), 1)
        return [number for number, (here, after) in pairs if here == after] or [*range(1, len(self.steps) + 1)]


class Workshop:
    """A folder in which stages are tried, each with copies of the inputs and of the stages that it needs.

    All trials stand in the same place, so that even paths are equal.
    more  further flags of a stage
    """

    def __init__(self, folder: Path, **more: str) -> None:
        self.folder, self.run, self.more = folder, folder / "run", more
        torch.set_num_threads(1)
        sys.path.insert(0, str(TREE))
        for name in ("tyro", "train_sft", "train_reward", "train_ppo", "train_dpo"):
            importlib.import_module(name)
        torch.optim.AdamW([torch.zeros(1)], fused=True).step()  # the first optimizer imports as much again

    def order(self, stage: str, **what: Any) -> Order:
        """Of a stage in the run."""
        return Order(stage, str(self.run), more=self.more.get(stage, ""), **what)

    @contextlib.contextmanager
    def trial(self, stage: str) -> Iterator[None]:
        """A run in which the stage can begin, removed afterwards."""
        needs = [self.made(need) for need in NEEDS[stage]]
        self.run.mkdir(parents=True)
        for name in ("demonstrations.train", "demonstrations.validation", "prompts.train"):
            lines = (TREE / "data" / "world" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (self.run / f"{name}.jsonl").write_text("".join(lines[:RECORDS]), encoding="utf-8")
        for need in needs:
            shutil.copytree(need, self.run / need.name)
        try:
            yield
        finally:
            shutil.rmtree(self.run)
            for file in self.folder.glob("run.*"):
                file.unlink()

    def made(self, stage: str) -> Path:
        """The folder of a stage that was finished once."""
        folder = self.folder / "finished" / stage
        if not folder.exists():
            with self.trial(stage):
                self.finish(self.order(stage))
                shutil.copytree(self.run / stage, folder)
        return folder

    def finish(self, order: Order) -> Undisturbed:
        """Run a stage that nothing disturbs."""
        began = time.monotonic()
        code = run(order)
        if code != 0:
            raise RuntimeError(f"{order.stage} ended with {code}: {last_words(order)}")
        seconds = time.monotonic() - began
        steps = [int(line) for line in order.file("steps").read_text().split()]
        return Undisturbed(seconds, hashes(order.folder), steps)


# ---------------------------------------------------------------------------------------------------------- a benchmark
def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the benchmarks of this kind share."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    result.add_argument("--tree", metavar="COMMIT", help="the tree to try, by default this one")
    result.add_argument("--output", type=Path, help="JSON file for the result")
    return result


def benchmark(options: argparse.Namespace, measure: Callable[[Workshop], tuple[dict[str, Any], bool]]) -> int:
    """Measure in a temporary workshop and write the result; returns the exit code, 0 where all is well."""
    if options.tree and "MINIRLHF_TREE" not in os.environ:
        with checked_out(options.tree) as tree:
            return subprocess.run(
                [sys.executable, *sys.argv], env={**os.environ, "MINIRLHF_TREE": str(tree)}
            ).returncode
    began = time.monotonic()
    git = ["git", "-C", str(TREE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="children-") as folder:
        result, well = measure(Workshop(Path(folder)))
    about = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "tree": commit,
        "date": date.today().isoformat(),
        "seed": options.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work, no GPU, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.monotonic() - began),
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")
    return 0 if well else 1


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree of a commit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it is removed then, too
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="tree-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False)


if __name__ == "__main__":  # a process of torchrun's
    sys.path.insert(0, str(TREE))
    work(Order(**json.loads(sys.argv[1])))

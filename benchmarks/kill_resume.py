"""Exact resume: stop every stage at random moments, resume it, and compare what comes out with an undisturbed run.

    python benchmarks/kill_resume.py                                   # SIGKILL, 20 runs of each stage, a few minutes
    python benchmarks/kill_resume.py --signal INT TERM HUP             # 20 runs of each stage and signal
    python benchmarks/kill_resume.py --signal TERM --stages ppo --processes 2 --kills 4        # under torchrun
    python benchmarks/kill_resume.py --tree HEAD~1                     # another commit

Each stage runs once undisturbed. Then, again and again, it is begun, stopped, resumed with --resume and compared: the
trained model, every tensor and number of the last checkpoint (weights and optimizers), and metrics.jsonl must be the
same bits, and nothing may be left behind.

SIGKILL comes where a checkpoint follows every step. Half of the kills come at a moment drawn uniformly from the
undisturbed run's time, the other half while a checkpoint is being written. A resumed process may be killed too: one
kill in four is followed by another.

The other signals come where checkpoints are rare, so that what counts is what the process saves on its way out. It must
end by itself with 128 + the signal's number, leave no temporary file, and its checkpoint must be of as many steps as
metrics.jsonl has rows. Two signals in three come just after an optimizer step: for PPO and online DPO one that another
of the same training step follows, where the state is no state to go on from. The others come at a moment drawn
uniformly. One signal in five comes twice, up to 20 ms apart: the process may then leave without saving. Under torchrun
the signal goes to torchrun, which passes it on to all processes, and to the main process alone, in turn.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
from children import STAGES, Order, Undisturbed, Workshop, hashes, left_behind, rows, saved_step

RARELY = 1000  # steps between two checkpoints where a signal comes
AGAIN = 0.02  # seconds within which a signal comes a second time


def trial(order: Order, stop: dict[str, Any], undisturbed: Undisturbed) -> dict[str, Any]:
    """Resume what was stopped, and say how it ended."""
    order = replace(order, resume=True, at=0)
    code = children.run(order)
    same = code == 0 and hashes(order.folder) == undisturbed.hashes
    left = left_behind(order.folder) if code == 0 else []
    words = {} if same and not left else {"resumed": code, "left_behind": left, "words": children.last_words(order)}
    return {**stop, "equal": same, "left": bool(left), **words}


# -------------------------------------------------------------------------------------------------------------- SIGKILL
def kill_once(order: Order, undisturbed: Undisturbed, draw: random.Random, *, saving: bool) -> dict[str, Any]:
    """Begin or resume a stage and kill it; says when, and what was being written at that moment."""
    begun, moment = time.monotonic(), draw.uniform(0, undisturbed.seconds)
    process = children.start(order)

    def now() -> bool:
        late = time.monotonic() - begun >= moment
        return late and (not saving or any(order.folder.glob("checkpoints/.saving-0*")))

    code = children.wait(process, now)
    if code is None:
        time.sleep(draw.uniform(0, 0.004) if saving else 0.0)
        children.kill(process)
    writing = any(order.folder.rglob(".*"))
    return {"moment": round(moment, 3), "stopped": code is None, "writing": writing, "kills": 1}


def kill(order: Order, undisturbed: Undisturbed, draw: random.Random, number: int) -> dict[str, Any]:
    """Trial `number` with SIGKILL."""
    stop = kill_once(order, undisturbed, draw, saving=number % 2 == 1)
    if draw.random() < 0.25 and stop["stopped"]:
        again = kill_once(replace(order, resume=True), undisturbed, draw, saving=False)
        stop["kills"] += again["stopped"]
        stop["writing"] |= again["writing"]
    return trial(order, stop, undisturbed)


# -------------------------------------------------------------------------------------------------------- other signals
def interrupt(order: Order, undisturbed: Undisturbed, draw: random.Random, number: int) -> dict[str, Any]:
    """Trial `number` with the signal of the order."""
    at = draw.choice(undisturbed.within_steps) if number % 3 < 2 else 0
    moment = draw.uniform(0, undisturbed.seconds)
    twice = number % 5 == 4
    order = replace(order, at=at, to_parent=order.processes > 1 and number % 2 == 0)
    for kind in ("sent", "steps"):
        order.file(kind).unlink(missing_ok=True)
    process = children.start(order)
    code = children.wait(process, order.file("sent").exists) if at else wait_for(process, moment)
    done = at or len(read(order.file("steps")).split())
    before = undisturbed.steps[done - 1] if done else 0  # rows before the training step of the last optimizer step
    inside = at > 0 or (done > 0 and rows(order.folder) == before)
    if code is None and not at:
        order.file("sent").write_text(repr(time.monotonic()))
        os.kill(process, order.number)
    if code is None and twice:
        time.sleep(draw.uniform(0, AGAIN))
        os.kill(process, order.number)  # not waited for, so that its id is still its own
    code = children.wait(process) if code is None else code
    ended = time.monotonic()
    if code is None:
        children.kill(process)
    stop = {"after_step": at} if at else {"moment": round(moment, 3), "optimizer_steps": done}
    stop |= {"code": "hangs" if code is None else code, "twice": twice, "inside": inside}
    stop |= {"seconds": round(ended - float(read(order.file("sent")) or ended), 3)}
    return trial(order, stop | left_by(order, code, before, twice=twice), undisturbed)


def wait_for(process: int, moment: float) -> int | None:
    """Wait so many seconds from where the process takes signals; its exit code if it ends before."""
    children.wait(process, lambda: children.catches_signals(process))
    ready = time.monotonic()
    return children.wait(process, lambda: time.monotonic() - ready >= moment)


def left_by(order: Order, code: int | None, before: int, *, twice: bool) -> dict[str, Any]:
    """What a stopped process left, and whether that is well.

    before  rows that there were when the training step of the last optimizer step began
    """
    step, count = saved_step(order.folder), rows(order.folder)
    hidden = [path.name for path in Path(order.run).rglob(".*")]
    right = code == 128 + order.number or (twice and code == -order.number)  # a shell says the same of both
    if order.processes > 1:
        right = code not in (None, 0)  # torchrun's own
    saved = count == step and before <= step and not hidden
    silent = order.processes > 1 or "Traceback" not in read(order.file("err"))
    finished = '"finished": true' in read(order.folder / "stage.json")
    well = right and silent and (twice or saved)
    words = {} if well else {"words_at_the_stop": children.last_words(order)}
    return words | {
        "rows": count,
        "checkpoint": step,
        "went_on": count - before,
        "hidden": hidden,
        "well": well,
        "stopped": not finished,
    }


def read(path: Path) -> str:
    """The text of a file; empty where there is none."""
    return path.read_text() if path.exists() else ""


# --------------------------------------------------------------------------------------------------------------- counts
def measure(workshop: Workshop, stage: str, number: int, given: argparse.Namespace) -> dict[str, Any]:
    """All trials of a stage with one signal."""
    killed = number == signal.SIGKILL
    name = signal.Signals(number).name
    draw = random.Random(f"{given.seed} {stage}" if killed else f"{given.seed} {stage} {name}")
    every = given.checkpoint_every or (1 if killed else RARELY)
    order = workshop.order(stage, every=every, processes=given.processes, number=number)
    with workshop.trial(stage):
        undisturbed = workshop.finish(replace(order, every=1))  # so that rows are on the disk at every step
    trials: list[dict[str, Any]] = []
    while len(trials) < given.kills:
        with workshop.trial(stage):
            one = (kill if killed else interrupt)(order, undisturbed, draw, len(trials))
        if one["stopped"] or "after_step" in one or not one["equal"]:  # else it had finished before
            trials.append(one)
    result: dict[str, Any] = {"seconds_undisturbed": round(undisturbed.seconds, 2), "stopped": len(trials)}
    result |= {"equal": sum(t["equal"] for t in trials), "left_behind": sum(t["left"] for t in trials)}
    if killed:
        result |= {"kills": sum(t["kills"] for t in trials), "while_writing": sum(t["writing"] for t in trials)}
    else:
        once = [t for t in trials if not t["twice"]]
        inside = [t for t in once if t["inside"]]
        result |= {
            "after_an_optimizer_step": sum("after_step" in t for t in trials),
            "ended_well": sum(t["well"] for t in trials),
            "codes": Counter(str(t["code"]) for t in trials),
            "rows_are_the_checkpoint": f"{sum(t['rows'] == t['checkpoint'] for t in once)} of {len(once)}",
            "ended_the_training_step": f"{sum(t['went_on'] for t in inside)} of {len(inside)}",
            "seconds_to_exit": {
                "after an optimizer step": longest(t for t in once if "after_step" in t),
                "at a drawn moment": longest(t for t in once if "after_step" not in t),
                "outside an update": longest(t for t in once if not t["inside"]),
                "second signal": longest(t for t in trials if t["twice"]),
            },
        }
    result["wrong"] = [t for t in trials if not t["equal"] or t["left"] or not t.get("well", True)]
    result["moments"] = [t["after_step"] if "after_step" in t else f"{t['moment']} s" for t in trials]
    counts = ", ".join(f"{key} {value}" for key, value in result.items() if key not in ("wrong", "moments", "codes"))
    print(f"{stage} {name}: {counts}", *result["wrong"], sep="\n  ", flush=True)
    return result


def longest(trials: Iterable[dict[str, Any]]) -> float | None:
    """Seconds from the signal to the end, of the slowest."""
    return max((trial["seconds"] for trial in trials), default=None)


def signal_number(name: str) -> int:
    """The number of TERM or SIGTERM."""
    return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]


def main() -> int:
    """Stop stages, print the count and write it; returns 1 unless all went right."""
    parser = children.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="runs to stop of each stage and signal")
    parser.add_argument("--signal", nargs="+", type=signal_number, default=[signal.SIGKILL], metavar="NAME")
    parser.add_argument("--checkpoint-every", type=int, help=f"by default 1, for signals {RARELY}")
    parser.add_argument("--processes", type=int, default=1, help="above 1 under torchrun, for signals")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    given = parser.parse_args()

    def all_stages(workshop: Workshop) -> tuple[dict[str, Any], bool]:
        stages = {
            f"{stage} {signal.Signals(number).name}": measure(workshop, stage, number, given)
            for stage in given.stages
            for number in given.signal
        }
        return {"stages": stages}, not any(stage["wrong"] for stage in stages.values())

    return children.benchmark(given, all_stages)


if __name__ == "__main__":
    sys.exit(main())

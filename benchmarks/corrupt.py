"""Damage a stopped run's checkpoints and records, resume it, and see what happens.

    python benchmarks/corrupt.py                    # 40 cases over four stages, some minutes
    python benchmarks/corrupt.py --only fifo link   # kinds of damage whose names hold one of these words
    python benchmarks/corrupt.py --tree HEAD~1      # another commit

Every stage is killed in the middle of its work, with a checkpoint after every step, and is also finished once. A case
damages a copy of that and runs the stage with --resume. It must end with exit code 2 and one line that says `error:`;
or go on, say after which step, and end with the same bits as an undisturbed run. A traceback, a process that hangs, and
other weights are wrong. The cases are drawn by --seed. A "sealed" one has a manifest with fitting hashes, as no
accident writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import children
from children import Order, Undisturbed, Workshop, file_hash, hashes, newest

STAGES = ("sft", "reward", "ppo", "dpo")
TENSORS, NUMBERS, MANIFEST = FILES = ("state.safetensors", "state.json", "manifest.json")


@dataclass(frozen=True)
class Victim:
    """What a case damages: a stage in a run, its newest checkpoint, and another stage's."""

    stage: Path
    newest: Path
    stranger: Path
    draw: random.Random

    @property
    def older(self) -> Path:
        """The checkpoint before the newest."""
        return sorted(path for path in self.newest.parent.glob("[0-9]*") if path.name < self.newest.name)[-1]

    @property
    def latest(self) -> Path:
        """The file that names the newest."""
        return self.newest.parent / "latest"

    @property
    def any_file(self) -> Path:
        """One of the newest's files."""
        return self.newest / self.draw.choice(FILES)

    def flip(self, path: Path, start: float = 0.0, end: float = 1.0) -> None:
        """Flip a bit of a file between two shares of it."""
        content = bytearray(path.read_bytes())
        position = int(self.draw.uniform(start, end) * (len(content) - 1))
        content[position] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)

    def cut(self, path: Path) -> None:
        """Cut a file off somewhere."""
        os.truncate(path, self.draw.randrange(1, path.stat().st_size))

    def header(self, change: Callable[[dict[str, Any]], None], name: str = "wte.weight") -> None:
        """Rewrite the entry of a tensor in the header, which must keep its length, and seal the checkpoint."""
        content = (self.newest / TENSORS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header[next(key for key in sorted(header) if key.endswith(name))])
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        (self.newest / TENSORS).write_bytes(content[:8] + text + content[8 + length :])
        self.seal()

    def fill(self, value: bytes, start: float) -> None:
        """Write over a block of the tensors with other bytes."""
        content = bytearray((self.newest / TENSORS).read_bytes())
        position = int(self.draw.uniform(start, 0.9) * len(content)) // 4 * 4
        block = slice(position, position + 512)
        if content[block] == value * (512 // len(value)):
            return self.fill(value, start)
        content[block] = value * (512 // len(value))
        (self.newest / TENSORS).write_bytes(content)

    def seal(self, **changes: object) -> None:
        """Give the newest checkpoint a manifest that vouches for what stands there now."""
        content = json.loads((self.newest / MANIFEST).read_text())
        del content["sha256"]
        for name in content["files"]:
            content["files"][name] = {
                "size": (self.newest / name).stat().st_size,
                "sha256": file_hash(self.newest / name),
            }
        content |= changes
        own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (self.newest / MANIFEST).write_text(json.dumps({**content, "sha256": own}))

    def swap(self, name: str) -> None:
        """Exchange a file with the older checkpoint's."""
        aside = self.newest / "aside"
        (self.newest / name).rename(aside)
        (self.older / name).rename(self.newest / name)
        aside.rename(self.older / name)

    def put(self, source: Path) -> None:
        """Another checkpoint under the newest's name."""
        shutil.rmtree(self.newest)
        shutil.copytree(source, self.newest)

    def link(self, path: Path) -> None:
        """A link to the file in its place."""
        aside = self.stage.parent / "aside"
        path.rename(aside)
        path.symlink_to(aside)

    def fifo(self, path: Path) -> None:
        """A pipe that nobody writes to in its place."""
        path.unlink()
        os.mkfifo(path)

    def twice(self) -> None:
        """A second `step` in the manifest, before or after the true one."""
        text = (self.newest / MANIFEST).read_text()
        wrong = '"step": 1'
        text = (
            text.replace("{", "{" + wrong + ",", 1) if self.draw.random() < 0.5 else text.rstrip()[:-1] + f",{wrong}}}"
        )
        (self.newest / MANIFEST).write_text(text)

    def read_by_the_stage(self) -> Path:
        """A file that the stage began with: weights of an earlier one, or demonstrations."""
        weights = sorted(self.stage.parent.glob("*/model/model.safetensors"))
        return (weights or [self.stage.parent / "demonstrations.train.jsonl"])[0]


DAMAGE: dict[str, Callable[[Victim], object]] = {
    "bit flipped in the tensors": lambda v: v.flip(v.newest / TENSORS, 0.2),
    "bit flipped in the tensors' header": lambda v: v.flip(v.newest / TENSORS, 0.0, 0.01),
    "bit flipped in the numbers": lambda v: v.flip(v.newest / NUMBERS),
    "bit flipped in the manifest": lambda v: v.flip(v.newest / MANIFEST),
    "file truncated": lambda v: v.cut(v.any_file),
    "file emptied": lambda v: os.truncate(v.any_file, 0),
    "file missing": lambda v: v.any_file.unlink(),
    "file longer": lambda v: v.any_file.open("a").write(" "),
    "block of zeros": lambda v: v.fill(b"\0", 0.2),
    "block of nan, sealed": lambda v: (v.fill(b"\0\0\xc0\x7f", 0.2), v.seal()),
    "tensors of another step": lambda v: v.swap(TENSORS),
    "numbers of another step": lambda v: v.swap(NUMBERS),
    "older checkpoint under the newest's name": lambda v: v.put(v.older),
    "checkpoint of another stage": lambda v: v.put(v.stranger),
    "checkpoint of another stage, sealed": lambda v: (v.put(v.stranger), v.seal(step=int(v.newest.name))),
    "link in place of a file": lambda v: v.link(v.any_file),
    "link in place of the folder": lambda v: v.link(v.newest),
    "fifo in place of a file": lambda v: v.fifo(v.any_file),
    "manifest of a gibibyte": lambda v: os.truncate(v.newest / MANIFEST, 1 << 30),
    "manifest of other files, sealed": lambda v: v.seal(files={"../../metrics.jsonl": {"size": 1}}),
    "manifest of another step, sealed": lambda v: v.seal(step=1),
    "manifest of other settings, sealed": lambda v: v.seal(config={"seed": 1}),
    "key twice in the manifest": lambda v: v.twice(),
    "another type, sealed": lambda v: v.header(lambda entry: entry.update(dtype="I32")),
    "another shape, sealed": lambda v: v.header(lambda entry: entry["shape"].reverse()),
    "latest names nothing": lambda v: v.latest.write_text("99999999\n"),
    "latest names a place outside": lambda v: (v.link(v.newest), v.latest.write_text("../../aside\n")),
    "latest is no text": lambda v: v.latest.write_bytes(b"\xff\xfe\0"),
    "latest emptied": lambda v: os.truncate(v.latest, 0),
    "latest missing": lambda v: v.latest.unlink(),
    "latest is a fifo": lambda v: v.fifo(v.latest),
    "metrics altered": lambda v: v.flip(v.stage / "metrics.jsonl", 0.0, 0.5),
    "metrics truncated": lambda v: os.truncate(v.stage / "metrics.jsonl", 20),
    "metrics with a torn row": lambda v: (v.stage / "metrics.jsonl").open("a").write('{"step": 99, "lo'),
    "times missing": lambda v: (v.stage / "timing.jsonl").unlink(),
    "stage.json is no text": lambda v: (v.stage / "stage.json").write_bytes(b"\xff\xfe\0"),
    "stage.json is a fifo": lambda v: v.fifo(v.stage / "stage.json"),
    "what the stage began with altered": lambda v: v.flip(v.read_by_the_stage(), 0.5),
    "finished: model altered": lambda v: v.flip(v.stage / "model" / "model.safetensors", 0.5),
    "finished: model missing": lambda v: (v.stage / "model" / "model.safetensors").unlink(),
}


def judge(order: Order, undisturbed: Undisturbed) -> tuple[str, str]:
    """Resume; returns "refused", "resumed" or what is wrong, and the line that says so."""
    code = children.run(order)
    out, err = (order.file(kind).read_text(errors="replace").replace(order.run, "RUN") for kind in ("out", "err"))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    goes_on = [line for line in out.splitlines() if "continues after step" in line or line.endswith("is finished")]
    if "Traceback" in err or code not in (0, 2):
        return f"WRONG: ended with {code}", err[-400:]
    if code == 2:
        return ("refused", errors[0]) if len(errors) == 1 else ("WRONG: not one line", err[-400:])
    if hashes(order.folder) != undisturbed.hashes:
        return "WRONG: other weights", " ".join(goes_on)
    return ("resumed", goes_on[0]) if goes_on else ("WRONG: resumed without a word", out[-400:])


class Bases:
    """Stages killed in the middle, and finished."""

    def __init__(self, workshop: Workshop, stages: Sequence[str]) -> None:
        self.workshop = workshop
        self.undisturbed: dict[str, Undisturbed] = {}
        for stage in stages:
            order = workshop.order(stage)
            with workshop.trial(stage):
                self.undisturbed[stage] = workshop.finish(order)
                order.folder.rename(self.of(stage, finished=True))
            steps = self.undisturbed[stage].within_steps
            with workshop.trial(stage):
                children.run(replace(order, at=steps[len(steps) * 2 // 3], number=signal.SIGKILL))
                order.folder.rename(self.of(stage, finished=False))

    def of(self, stage: str, *, finished: bool) -> Path:
        """The folder of a stage."""
        return self.workshop.folder / f"{stage}-{'finished' if finished else 'killed'}"

    def case(self, kind: str, stage: str, seed: str) -> dict[str, str]:
        """Damage a copy of a stage, resume it, and say how it ended."""
        order = self.workshop.order(stage, resume=True)
        others = [other for other in self.undisturbed if other != stage]
        stranger = self.of((others or [stage])[-1], finished=False)
        with self.workshop.trial(stage):
            shutil.copytree(self.of(stage, finished=kind.startswith("finished")), order.folder)
            DAMAGE[kind](Victim(order.folder, newest(order.folder), newest(stranger), random.Random(seed)))
            outcome, line = judge(order, self.undisturbed[stage])
        return {"kind": kind, "stage": stage, "outcome": outcome, "line": line}


def count(workshop: Workshop, kinds: list[str], stages: Sequence[str], *, cases: int, seed: int) -> dict[str, Any]:
    """Try kinds of damage and stages in turn, and count how they end."""
    bases, tried = Bases(workshop, stages), []
    for number in range(cases):
        kind, stage = kinds[number % len(kinds)], stages[(number + number // len(kinds)) % len(stages)]
        tried.append(bases.case(kind, stage, f"{seed} {number}"))
        print("{stage:<7} {kind:<42} {outcome}: {line}".format(**tried[-1]), flush=True)
    outcomes = Counter(case["outcome"] for case in tried)
    return {"right": outcomes["refused"] + outcomes["resumed"], "of": cases, "outcomes": outcomes, "cases": tried}


def main() -> int:
    """Damage runs, print the count and write it; returns 1 unless all went right."""
    parser = children.parser(__doc__)
    parser.add_argument("--cases", type=int, default=len(DAMAGE), help="how many")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="of the names of the kinds")
    given = parser.parse_args()
    kinds = [kind for kind in DAMAGE if any(word in kind for word in given.only)]

    def all_cases(workshop: Workshop) -> tuple[dict[str, Any], bool]:
        result = count(workshop, kinds, STAGES, cases=given.cases, seed=given.seed)
        print("{right} of {of}: {outcomes}".format(**result))
        return result, result["right"] == given.cases

    return children.benchmark(given, all_cases)


if __name__ == "__main__":
    sys.exit(main())

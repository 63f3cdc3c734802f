"""Kill somebody's labelling with SIGKILL, again and again, and count what is lost.

    python benchmarks/kill_labelling.py             # 20 kills of the real command, about two minutes on one core

Keys are typed into a pseudo-terminal; each but the last is waited for, until the screen shows the next question. At a
random moment up to 1 ms after the last key the process is killed. Then the file must hold every label that the screen
showed as saved, whole, and may lack the last key's alone.
"""

from __future__ import annotations

import argparse
import os
import pty
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minirlhf.feedback import label
from minirlhf.feedback.label_file import LabelFile
from minirlhf.files import write_records

DRAWN = b"\x1b[2J"  # each screen begins by clearing it
KEYS = "1212121212tbsu"
PATIENCE = 60.0  # seconds for a screen


@dataclass
class Outcome:
    """What one kill left: labels shown as saved, labels in the file, whether a torn line had to be cut off."""

    shown: int
    kept: int
    torn: bool


class Terminal:
    """A process in a pseudo-terminal, and how many screens it has drawn."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid, self.descriptor = pty.fork()
        self.output = b""
        if self.pid == 0:
            status = 1
            try:
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
                work()
                status = 0
            finally:
                os._exit(status)

    def wait_for_screen(self, number: int) -> None:
        """Read until so many screens were drawn."""
        end = time.monotonic() + PATIENCE
        while self.output.count(DRAWN) < number:
            if not select.select([self.descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no screen {number} in {PATIENCE:.0f} s: {self.output[-500:]!r}")
            self.output += os.read(self.descriptor, 65_536)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.descriptor, keys.encode())

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.descriptor)


def kill_once(config: label.Config, *, stream: random.Random, command: bool) -> Outcome:
    """Label a little, kill, and compare the file with what it was; raises AssertionError where more is lost."""
    output = config.output

    def work() -> None:
        if command:
            files = ["--candidates", str(config.candidates), "--output", str(output)]
            os.execv(sys.executable, [sys.executable, "-m", "minirlhf.feedback", "label", *files])
        label.main(config)

    def lines() -> list[bytes]:
        return output.read_bytes().splitlines(keepends=True) if output.exists() else []

    count = len(lines())
    terminal = Terminal(work)
    try:
        terminal.wait_for_screen(1)
        for screen in range(stream.randint(0, 6)):
            key = stream.choice(KEYS)
            terminal.type(key)
            terminal.wait_for_screen(screen + 2)
            count = max(count - 1, 0) if key == "u" else count + 1
        before = lines()
        assert len(before) == count, f"{output}: {len(before)} labels, where {count} were shown as saved"
        terminal.type(stream.choice(KEYS))
        time.sleep(stream.uniform(0.0, 0.001))
    finally:
        terminal.kill()
    torn = bool(lines()) and not lines()[-1].endswith(b"\n")
    with LabelFile(output) as file:  # cuts off a torn line, and refuses a damaged file
        kept = len(file.labels)
    after = lines()
    assert after in (before, before[:-1]) or after[:-1] == before, f"{output}: not what it was, but for one label"
    return Outcome(len(before), kept, torn)


def write_candidates(path: Path, prompts: int) -> None:
    """Answers to compare."""
    write_records(
        path, [{"prompt": f"Question {i}?", "responses": [f" Yes {i}.", f" No {i}."]} for i in range(prompts)]
    )


def kill_repeatedly(folder: Path, *, kills: int, seed: int, command: bool) -> list[Outcome]:
    """`kills` sessions on one file of labels, each killed; `command` starts the real command each time."""
    write_candidates(folder / "candidates.jsonl", prompts=10 * kills)
    config = label.Config(candidates=folder / "candidates.jsonl", output=folder / "labels.jsonl")
    stream = random.Random(seed)
    return [kill_once(config, stream=stream, command=command) for _ in range(kills)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outcomes = kill_repeatedly(Path(name), kills=arguments.kills, seed=arguments.seed, command=True)
    for number, outcome in enumerate(outcomes, 1):
        print(f"kill {number:>2}: {outcome.shown:>3} labels shown as saved, {outcome.kept:>3} in the file")
    last = sum(outcome.kept == outcome.shown for outcome in outcomes)
    print(f"{len(outcomes)} kills: no label shown as saved was lost, {sum(o.torn for o in outcomes)} torn lines;")
    print(f"the key pressed just before the kill had no effect in {last} of them")


if __name__ == "__main__":
    main()

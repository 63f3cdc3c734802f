"""One side of a speed comparison: a process that makes steps when it is told to, and waits while the other works.

The driver (speed.py) writes the number of steps to standard input; the worker answers each step with one line of JSON
on standard output: its seconds, those of its parts, and the CPU seconds that other processes used meanwhile. Whatever
else a library prints goes to standard error. An end of input ends the worker.

Memory above the floor is the peak of the steps less what stood before the first one (the models' weights among it) and
less the gradients and optimizer state of the trained parameters: activations, logits and other temporaries. On a CPU it
is the peak of the resident set (Linux: VmHWM), on a GPU what torch had allocated.

Used by both sides, so it imports neither this project nor any peer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

MIB = 2**20


def parser(description: str | None) -> argparse.ArgumentParser:
    """The settings of a worker, which the driver shares."""
    result = machine_parser(description)
    result.add_argument("--size", default="4x128", help="4x128 or 124M; on a GPU also 355M and 1.5B")
    result.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return result


def machine_parser(description: str | None) -> argparse.ArgumentParser:
    """Threads and clock, on a CPU."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.set_defaults(device="cpu")
    result.add_argument("--threads", type=int, default=os.cpu_count())
    result.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds, with --threads 1")
    return result


def training_state(models: Iterable[nn.Module]) -> int:
    """Bytes of the gradients and of AdamW's two moments of these models' parameters."""
    return sum(3 * p.numel() * p.element_size() for model in models for p in model.parameters() if p.requires_grad)


def clock_of(given: argparse.Namespace) -> Callable[[], float]:
    """Seconds by the clock that was asked for; on a GPU once its work is done."""
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    if given.device == "cpu":
        return clock

    def synchronised() -> float:
        torch.cuda.synchronize()
        return clock()

    return synchronised


def touch(device: str) -> None:
    """Run the kinds of operation that a step has, small, so that what libraries load for them is part of the floor."""
    x = torch.full((1, 2, 8, 8), 0.1, device=device, requires_grad=True)
    y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    F.gelu(F.layer_norm(y, (8,)) @ x, approximate="tanh").log_softmax(dim=-1).sum().backward()
    torch.optim.AdamW([x], fused=True).step()


class Channel:
    """The worker's end: `ready` once, then `wait` and `done` for every step; `now` is the clock."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.cuda = given.device == "cuda"
        self.now = clock_of(given)
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a library prints is no answer
        self.left = 0

    def ready(self, state: int, **about: object) -> None:
        """Everything stands but `state` bytes of gradients and optimizer state, which the first step makes."""
        touch("cuda" if self.cuda else "cpu")
        self.floor = self._resident() + state
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        self._send({"ready": True, "floor_mib": round(self.floor / MIB, 1), "torch": torch.__version__, **about})

    def wait(self) -> None:
        """Return when a step is due; ends the process when there will be none."""
        if self.left == 0:
            line = sys.stdin.readline()
            if not line:
                self.answers.close()
                os._exit(0)  # from within a peer's training loop, which nothing shorter leaves
            self.left = int(line)
        self.left -= 1
        self.began = time.perf_counter(), time.process_time(), machine_seconds()
        self.start = self.now()

    def done(self, **parts: float) -> None:
        """The step is made; `parts` are the seconds of its parts, where it has any."""
        seconds = self.now() - self.start
        wall, own, machine = self.began
        others = (machine_seconds() - machine) - (time.process_time() - own)
        peak = self._peak()
        self._send(
            {
                "seconds": seconds,
                **parts,
                "wall": time.perf_counter() - wall,
                "others": others,
                "peak_mib": peak / MIB,
                "above_floor_mib": (peak - self.floor) / MIB,
            }
        )

    def _resident(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")

    def _send(self, answer: dict[str, object]) -> None:
        self.answers.write(json.dumps(answer) + "\n")


def serve(channel: Channel, step: Callable[[int], dict[str, float] | None]) -> None:
    """Make step 0, 1, 2, ... whenever the driver asks; a step may return the seconds of its parts."""
    number = 0
    while True:
        channel.wait()
        channel.done(**(step(number) or {}))
        number += 1


def machine_seconds() -> float:
    """CPU seconds of all processes since the machine started: user, nice, system and interrupts."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:8]]
    user, nice, system, _idle, _wait, irq, soft = fields
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

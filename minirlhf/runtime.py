"""Set-up of a process that trains: device, number format, streams of randomness, signals, and errors in words.

Nothing in this project draws from a global random generator: weights are initialised from a seed, data orders and
sampling are pure functions of (seed, stream, position). So there is no global seed to set, and none to forget.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirlhf import distributed


class UserError(Exception):
    """A mistake in what the user gave: what, where and how to fix it, in one line. Scripts exit with code 2."""


class DivergenceError(UserError, FloatingPointError):
    """Numbers that are not finite where training has gone wrong: stopped rather than trained or sampled on."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM, Ctrl-C or a hang-up, raised where the process is; scripts exit with 128 + `number` (143, 130, 129)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def require(condition: bool, message: str, kind: type[UserError] = UserError) -> None:
    """Raise `kind` with the message unless the condition holds."""
    if not condition:
        raise kind(message)


class Stream(enum.IntEnum):
    """Follows the seed in every random key, so that no two uses of randomness share a stream."""

    FEEDBACK = 1
    REFERENCE_SAMPLES = 2
    ROLLOUT = 3
    EVALUATION = 4
    LABELLER = 5
    MINIBATCH = 6
    DATA = 7
    SPLIT = 8
    CHAT = 9
    PRETRAINING = 10
    REJECTION = 11


def resolve_device(name: str) -> torch.device:
    """The device for `auto|cpu|cuda|mps`; auto takes a GPU where there is one. Several processes take one GPU each."""
    several = distributed.world_size() > 1
    mps = torch.backends.mps.is_available() and not several
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    require(available.get(name, False), f"--device {name}: not available on this machine; use --device auto or cpu")
    return _local_gpu() if name == "cuda" and several else torch.device(name)


def _local_gpu() -> torch.device:
    """The GPU of this process, of several on a machine."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    require(number < count, f"--nproc-per-node: more processes than the {count} GPUs here; use fewer, or --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of matrix products for `auto|float32|bfloat16`; auto is bfloat16 on CUDA, else float32.

    Weights, optimizer state, log-probabilities and losses are float32 in every case.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_compute(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and number format for `--device` and `--dtype`."""
    place = resolve_device(device)
    return place, resolve_dtype(dtype, place)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context every forward of a stage runs in; the same for policy, reference, reward and value model."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16)


STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal that stops a process raises Interrupted; a second one ends it at once, without another word."""

    def leave(number: int, frame: object) -> None:
        os._exit(128 + number)

    def stop(number: int, frame: object) -> None:
        for other in STOPPING:
            signal.signal(other, leave)
        SignalGate.raised = number
        raise Interrupted(number)

    before = _handle(stop)
    try:
        yield
    finally:
        SignalGate.raised = 0
        for number, previous in before.items():
            signal.signal(number, previous)


class SignalGate:
    """While it is closed, a signal that stops a process waits; a second one ends the process at once.

    notice   what is written on standard error where one begins to wait
    waiting  its number, 0 without one
    raised   number of the signal that was raised as Interrupted; a library that the process was in may swallow that
    """

    raised = 0

    def __init__(self, notice: str = "") -> None:
        self.notice, self.waiting = notice, 0
        self._before: dict[int, Any] = {}

    def close(self) -> None:
        """Let signals wait from here on; closing a closed gate changes nothing."""
        if not self._before:
            self._before = _handle(self._wait)

    def _wait(self, number: int, frame: object) -> None:
        if self.waiting:
            os._exit(128 + number)
        self.waiting = number
        if self.notice:  # not by print, which the signal may have interrupted
            os.write(2, f"\n{self.notice}\n".encode())

    def open(self) -> None:
        """Let signals through again, the one that waited first."""
        for number, previous in self._before.items():
            signal.signal(number, previous)
        number, self.waiting, self._before = self.waiting, 0, {}
        if number:
            signal.raise_signal(number)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Inside, signals that stop a process wait, so that what belongs together is done together."""
    gate = SignalGate()
    gate.close()
    try:
        yield
    finally:
        gate.open()


def _handle(handler: Callable[[int, object], None]) -> dict[int, Any]:
    """Let `handler` take the signals that stop a process, where this thread may and they are not ignored.

    Returns the handlers of before.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    numbers = [n for n in STOPPING if main_thread and signal.getsignal(n) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in numbers}


REFUSALS = ("can't allocate memory", "not enough memory", "MPS backend out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True where memory was refused, on any device; the CPU's allocator raises a plain RuntimeError."""
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in REFUSALS))


def require_finite(**tensors: Tensor) -> None:
    """Raise DivergenceError naming the first tensor that holds a nan or an infinity; goes before the optimizer step."""
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            what = f"is {tensor.item()}" if tensor.ndim == 0 else f"has {bad} of {tensor.numel()} values not finite"
            raise DivergenceError(
                f"{name.replace('_', ' ')} {what}: stopped before the optimizer step; try a lower learning rate"
            )


def project_file(*parts: str) -> Path:
    """A file shipped beside the package, under `data/`."""
    return Path(__file__).resolve().parent.parent.joinpath("data", *parts)

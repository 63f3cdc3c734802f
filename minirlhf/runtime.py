"""What a process needs before it trains: device, number format, streams of randomness, and errors in words.

Nothing in this project draws from a global random generator: weights are initialised from a seed, data orders and
sampling are pure functions of (seed, stream, position). So there is no global seed to set, and none to forget.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from minirlhf import processes


class UserError(Exception):
    """A mistake in what the user gave: what, where and how to fix it, in one line. Scripts exit with code 2."""


class DivergenceError(UserError, FloatingPointError):
    """Numbers that are not finite where training has gone wrong: stopped rather than trained or sampled on."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, raised wherever the process is; scripts exit with 128 + `number` (143, 130)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


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
    several = processes.world_size() > 1
    mps = torch.backends.mps.is_available() and not several
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    require(available.get(name, False), f"--device {name}: not available on this machine; use --device auto or cpu")
    return _own_gpu() if name == "cuda" and several else torch.device(name)


def _own_gpu() -> torch.device:
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


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context every forward of a stage runs in; the same for policy, reference, reward and value model."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16)


def run_script(main: Callable[[Any], object], presets: dict[str, Any], *, several: bool = False) -> None:
    """The entry point of every script: `--preset NAME`, then one flag for each field of its configuration.

    several  it may run in several processes, started by torchrun
    Exit code 0, or 2 with one line on standard error for a UserError; `--debug` shows the traceback instead.
    SIGTERM and Ctrl-C stop it in order with 143 and 130, a second one at once.
    """
    import tyro

    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    description = sys.modules["__main__"].__doc__
    with processes.started() as group:
        try:
            alone = processes.world_size() == 1
            require(several or alone, "this command runs in one process, and only train_*.py in several: no torchrun")
            default = presets[_preset_name(arguments, presets)]
            with interruptible():
                main(
                    group.writer_first(
                        lambda: tyro.cli(type(default), default=default, args=arguments, description=description)
                    )
                )
        except UserError as error:
            if debug:
                raise
            group.end(2, f"error: {error}")
        except Interrupted as error:
            group.end(128 + error.number, f"stopped by {error}")


STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise Interrupted; a second one ends the process at once, without another word."""

    def leave(number: int, frame: object) -> None:
        os._exit(128 + number)

    def stop(number: int, frame: object) -> None:
        for other in STOPPING:
            signal.signal(other, leave)
        raise Interrupted(number)

    with _handlers(stop):
        yield


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C wait until the end, so that what belongs together is done together."""
    waiting: list[int] = []

    def note(number: int, frame: object) -> None:
        if waiting:
            os._exit(128 + number)
        waiting.append(number)

    with _handlers(note):
        yield
    if waiting:
        signal.raise_signal(waiting[0])


@contextlib.contextmanager
def _handlers(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handler` take the signals that stop a process, where this thread may and they are not ignored."""
    main_thread = threading.current_thread() is threading.main_thread()
    numbers = [n for n in STOPPING if main_thread and signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _preset_name(arguments: list[str], presets: dict[str, Any]) -> str:
    """The value of --preset among the arguments, by default the first preset."""
    for position, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--preset":
            value = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
            require(value in presets, f"--preset {value}: not one of {', '.join(presets)}")
            return value
    return next(iter(presets))


def project_file(*parts: str) -> Path:
    """A file shipped beside the package, under `data/`."""
    return Path(__file__).resolve().parent.parent.joinpath("data", *parts)

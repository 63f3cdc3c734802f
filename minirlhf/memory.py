"""Out of memory: how it is recognised, what can be done, and where `--micro-batch-tokens auto` begins.

The micro-batch is what memory in training depends on, and no result does: it is halved until it fits. On a GPU the
allocator refuses what does not fit. On a CPU the system may end the process instead of refusing it memory, so `auto`
begins small there; where there is a limit (ulimit, a full address space), the refusal is met in the same way.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import nn

from minirlhf import processes
from minirlhf.runtime import require
from minirlhf.settings import flag

FIRST = {"cuda": 65_536}  # padded tokens with which `auto` begins
FIRST_ELSEWHERE = 4096  # where the memory is the system's own
REFUSALS = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
LEVERS = ("micro_batch_tokens", "batch_size", "rollout_size")


def fitted(config: Any, state: Any) -> Any:
    """The configuration with a number for `--micro-batch-tokens`: of `auto`, what `state.fitted_tokens` says so far."""
    if not is_auto(config):
        return config
    model = next(value for value in vars(state).values() if isinstance(value, nn.Module))
    first = FIRST.get(next(model.parameters()).device.type, FIRST_ELSEWHERE)
    return dataclasses.replace(config, micro_batch_tokens=state.fitted_tokens or first)


def is_auto(config: Any) -> bool:
    """Whether the micro-batch is to be found."""
    return getattr(config, "micro_batch_tokens", None) == "auto"


def require_number_for_several(config: Any) -> None:
    """Raise UserError where several processes are to find it: the others would wait for one that starts again."""
    alone = processes.world_size() == 1
    require(alone or not is_auto(config), "--micro-batch-tokens auto: is for one process; give several a number")


def may_try_again(error: Exception, config: Any, fitted: Any) -> bool:
    """Whether a step that ended with `error` may start again with half the micro-batch of `fitted`."""
    return is_auto(config) and fitted.micro_batch_tokens > 1 and is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, on any device; the CPU's allocator raises a plain RuntimeError."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in REFUSALS))


def explain(config: Any, fitted: Any) -> str:
    """The batch, the peak of memory, and the flag values to try; `fitted` is the configuration in force."""
    sizes = {name: getattr(fitted, name) for name in LEVERS if hasattr(config, name)}
    batch = " ".join(f"{flag(name)} {value}" for name, value in sizes.items())
    smaller = [f"{flag(name)} {value // 2}" for name, value in sizes.items() if value > 1]
    first = [words for words in smaller if words.startswith("--micro-batch-tokens") and not is_auto(config)]
    first += [] if getattr(config, "gradient_checkpointing", True) else ["--gradient-checkpointing"]
    last = [words for words in smaller if not words.startswith("--micro-batch-tokens")]
    free = f"; {' and '.join(words.split()[0] for words in first)} change no result and go with --resume"
    return (
        f"out of memory with {batch}; the peak was {peak_bytes() / 2**30:.2f} GiB. Try {', then '.join(first + last)}"
        f"{free if first else ''}"
    )


def peak_bytes() -> int:
    """The most memory that this process has held: on the GPU where there is one, else of the system."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on every system, and needed only here

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

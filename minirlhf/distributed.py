"""Several processes that train one model, started by torchrun: which rows are whose, and what they add up.

    torchrun --nproc-per-node 2 train_sft.py

Every process knows the whole batch, because data orders and random streams are functions of (seed, step). It runs its
share of the rows through the model and divides its losses by the tokens of the whole batch, so that

    gradient of the batch = sum over processes of the gradient of each one's part of the loss

Gradients are therefore added up, never averaged. DistributedDataParallel averages: each process would have to multiply
its loss by their number first, and one without rows would still have to run a forward and a backward.
There is one primitive, the sum (or maximum) over all processes. Alone a process is its own sum: nothing is started,
copied or sent. Left out: sharded weights and optimizer states (docs/using.md), and a sum that overlaps the backward.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

POLL = 1e-4  # seconds between two looks at a sum under way
BUCKET = 2**25  # gradients that are sent at a time: 128 MiB in float32
LAST_WORDS = timedelta(seconds=10)  # for the process that reports an error to do so


class ProcessLost(RuntimeError):
    """Another process has ended while this one waited for it; the other one says why."""


# ------------------------------------------------------------------------------------------------------- who and whose
def world_size() -> int:
    """Number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_writer() -> bool:
    """True in the one process that writes: run.json, metrics, checkpoints and models."""
    return rank() == 0


def share(sizes: Tensor) -> Tensor:
    """Positions of the items that are this process's to compute, so that every item is some process's, and one's only.

    sizes (n,) is what an item costs, e.g. its tokens: sorted by it, the processes take turns. Fewer items than
    processes leave some with none. Alone it is 0, 1, ..., n-1.
    """
    if world_size() == 1:
        return torch.arange(len(sizes))
    return torch.argsort(sizes.cpu(), descending=True, stable=True)[rank() :: world_size()]


# ---------------------------------------------------------------------------------------------------------------- sums
def all_sum(x: Tensor) -> Tensor:
    """`x` added up over all processes: the same bits in each. Shape and type must be equal in all of them."""
    return x if world_size() == 1 else _reduce(x.detach().clone(), dist.ReduceOp.SUM)


def all_max(x: Tensor) -> Tensor:
    """The elementwise maximum of `x` over all processes."""
    return x if world_size() == 1 else _reduce(x.detach().clone(), dist.ReduceOp.MAX)


def add_up(
    parts: Sequence[Mapping[str, Tensor]], names: Sequence[str], *, maxima: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Each named 0-d value added up over micro-batches and processes; of `maxima` the largest, at least 0.

    parts  values of this process's micro-batches, which may be none; a part need not have every name
    Of several processes all must ask for the same names; their sums are in float64.
    """

    def of(name: str) -> list[Tensor]:
        return [part[name].detach().cpu() for part in parts if name in part]

    sums = {name: sum(of(name), torch.zeros(())) for name in names}
    if world_size() > 1:
        total = all_sum(torch.stack([value.double() for value in sums.values()]))
        sums = dict(zip(names, total.unbind(), strict=True))
    return sums | {name: all_max(torch.stack([torch.zeros(()), *of(name)]).double().max()) for name in maxima}


def sum_gradients(model: nn.Module) -> None:
    """Replace every gradient by its sum over all processes; goes between the last backward and the clipping.

    A process without rows brings zeros. A parameter that no process has a gradient for keeps none, so that the
    optimizer leaves it alone as it would in one process.
    """
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    reached = all_sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)).tolist()
    parameters = [p for p, processes in zip(parameters, reached, strict=True) if processes]
    for bucket in _buckets(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = _reduce(torch.cat([gradient.flatten() for gradient in gradients]), dist.ReduceOp.SUM)
        for p, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = total.view_as(p)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in groups of at most BUCKET elements, or one parameter that has more."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def barrier() -> None:
    """Go on once every process has come here."""
    all_sum(torch.zeros(()))


def differing(text: str) -> list[int]:
    """Numbers of the processes whose `text` is not the writer's."""
    mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    numbers = torch.zeros(world_size(), dtype=torch.int64)
    numbers[rank()] = mine
    digests = all_sum(numbers)
    return (digests != digests[0]).nonzero()[:, 0].tolist()


def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduce `x` in place. It looks rather than waits, so that a signal ends this process here too."""
    try:
        work = dist.all_reduce(x, op, async_op=True)
        while not work.is_completed():
            time.sleep(POLL)
        work.wait()
    except RuntimeError as error:
        raise ProcessLost(str(error).partition("\n")[0]) from error
    return x


# ------------------------------------------------------------------------------------------------- beginning and ending
class Group:
    """The processes of one run, or this one alone: they speak with one voice and end together."""

    def __init__(self, store: dist.Store | None) -> None:
        self.store = store  # None alone

    def writer_first(self, function: Callable[[], T]) -> T:
        """`function()` in every process, in the writer before the others: where it ends the run, it does so once."""
        if not is_writer():
            barrier()
            return function()
        value = function()
        barrier()
        return value

    def end(self, code: int, message: str) -> NoReturn:
        """Say why on standard error and exit with `code`. Of several, the first to come here speaks for all.

        The others wait until it has: as soon as one has gone, torchrun stops the rest.
        """
        if self.store is None:
            print(message, file=sys.stderr)
            sys.exit(code)
        with contextlib.suppress(RuntimeError):  # the store has gone with torchrun: then there is nobody to agree with
            if self.store.add("ended", 1) == 1:
                print(message, end="\n" if message else "", file=sys.stderr, flush=True)
                self.store.set("code", str(code))
            else:
                self.store.wait(["code"], LAST_WORDS)
                code = int(self.store.get("code"))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # not sys.exit: to take down a group of which some are gone may wait for them


@contextlib.contextmanager
def started() -> Iterator[Group]:
    """Inside, the processes that torchrun started are one group: gloo for tensors on a CPU, nccl for those on CUDA.

    All but the writer are silent on standard output. An error in one of them ends all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Group(None)
        return
    store, number, count = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    group = Group(dist.PrefixStore(f"minirlhf/{attempt}", store))
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(f"c10d/{attempt}", store), rank=number, world_size=count)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_writer() else nowhere):
        try:
            yield group
            barrier()
        except SystemExit as stop:  # whoever raised it has spoken
            group.end(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1, "")
        except ProcessLost as error:
            group.end(1, f"error: another process has ended without a word, killed or out of memory ({error})")
        except BaseException:
            group.end(1, traceback.format_exc())
    dist.destroy_process_group()

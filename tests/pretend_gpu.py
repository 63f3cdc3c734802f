"""A GPU that is none: its tensors keep real numbers on the CPU, say they are on `cuda:0`, and refuse what CUDA would.

    with pretend_gpu() as gpu:
        train_sft.main(replace(config, device="cuda", dtype="float32"))
    gpu.syncs       # how often the host waited for a result of the device, by file and line of this project

The kernels are the CPU's, so results can be compared bit for bit. Refused are operations on tensors of two devices,
except a 0-d CPU tensor in a pointwise operation, and CPU indices into a tensor of the GPU. A captured graph is a list
of operations that a replay computes again; while it is captured, nothing may wait. `pretend_gpu("mps")` is Apple's GPU,
which has no float64.
Not pretended: autocast, streams, a graph's memory, copies to the device that wait, numbers that differ between kernels.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

PROJECT = f"{Path(__file__).parents[1]}/"
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
FILLING = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_"}
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class GpuTensor(Tensor):
    """A tensor of the pretended GPU; `inner` holds its numbers."""

    device = property(lambda self: Gpu.current.device)
    is_cuda = property(lambda self: self.device.type == "cuda")
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        if inner.dtype == torch.float64 and Gpu.current.device.type == "mps":
            raise TypeError("the MPS framework doesn't support float64")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = Tensor._make_wrapper_subclass(cls, inner.shape, **layout)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        check(func, args, tensors)
        inner_args, inner_kwargs = tree_map_only(GpuTensor, lambda x: x.inner, (args, kwargs or {}))
        graph = Gpu.current.graph
        out = (graph.add if graph else func)(*([func] if graph else []), *inner_args, **inner_kwargs)
        known = {id(x.inner if isinstance(x, GpuTensor) else x): x for x in tensors}  # what is changed in place
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else on_gpu(x), out)


def on_gpu(x: Tensor) -> Tensor:
    """A tensor of the CPU as one of the GPU; those of other devices, e.g. meta, stay."""
    return x if isinstance(x, GpuTensor) or x.device.type != "cpu" else GpuTensor(x)


def check(func: Any, args: tuple, tensors: list[Tensor]) -> None:
    """Raise what CUDA raises for tensors of two devices that do not go together; note where the host waits."""
    name, first_is_ours = func._schema.name, isinstance(args[0], GpuTensor)
    indices = {id(x): x for x in tree_iter(args[1])} if name in INDEXED else {}
    ours = [x for x in indices.values() if isinstance(x, GpuTensor)]
    if ours and not first_is_ours:
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    foreign = [x for x in tensors if not isinstance(x, GpuTensor) and x.device.type == "cpu" and id(x) not in indices]
    if torch.Tag.pointwise in func.tags or name in INDEXED | FILLING:
        foreign = [x for x in foreign if x.ndim > 0 or (func._schema.is_mutable and x is args[0])]
    if foreign and name != "aten::copy_":
        two = f"{Gpu.current.device} and cpu"
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {two}: {name}"
        )
    to_host = name == "aten::copy_" and not first_is_ours
    by_mask = any(x.dtype == torch.bool for x in ours)  # how many elements does it select?
    if to_host or by_mask or (not indices and not WAITING.isdisjoint(func.tags)):
        Gpu.current.wait()


class Move(torch.autograd.Function):
    """A copy on the other device; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.inner.clone() if isinstance(x, GpuTensor) else GpuTensor(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Move.forward(ctx, gradient)


class Gpu(TorchFunctionMode):
    """Takes every `device=` argument and every move to a device; counts in `syncs`, by (file, line), where it waits."""

    current: Gpu

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self.syncs: Counter[tuple[str, int]] = Counter()
        self.graph: Graph | None = None  # that is being captured

    def wait(self) -> None:
        """Note the innermost line of the project that runs."""
        if self.graph:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for frame, line in traceback.walk_stack(sys._getframe()):
            file = frame.f_code.co_filename
            if file.startswith(PROJECT) and file != __file__ and "site-packages" not in file:
                self.syncs[file.removeprefix(PROJECT), line] += 1
                return

    def __torch_function__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, here = dict(kwargs or {}), ("cpu", self.device.type)
        if args and isinstance(args[0], GpuTensor):
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")
            if func in (Tensor.tolist, Tensor.__repr__, Tensor.__format__):
                self.wait()
            if func in (Tensor.tolist, Tensor.__repr__, Tensor.__format__, Tensor.untyped_storage):
                return func(args[0].inner, *args[1:])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.moved(func, *args, **kwargs)
        wanted = torch.device(kwargs.get("device") or "meta").type
        if wanted not in here:
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, "device": "cpu"})
        if wanted != "cpu":
            return tree_map_only(Tensor, on_gpu, out)
        return out.inner if isinstance(out, GpuTensor) else out

    def moved(self, func: Any, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        """`x.to(...)`, `x.cpu()` and `x.cuda()`."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2] if func is Tensor.to else (None, None)
        device = {Tensor.cpu: torch.device("cpu"), Tensor.cuda: self.device}.get(func, device) or x.device
        if {device.type, x.device.type} != {"cpu", self.device.type}:
            return func(x, *args, **kwargs) if device.type == "meta" else x.to(dtype or x.dtype, copy=copy)
        if device.type == "cpu":
            self.wait()
            return Move.apply(x).to(dtype or x.dtype)
        return Move.apply(x.to(dtype or x.dtype))


class Graph:
    """`torch.cuda.CUDAGraph`: the operations of a capture, which has no effect; a replay computes them again."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def add(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        declared = zip(args, func._schema.arguments, strict=False)
        self.before += [(x, x.clone()) for x, d in declared if d.alias_info is not None and d.alias_info.is_write]
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        Gpu.current.graph = self
        try:
            yield
        finally:
            Gpu.current.graph = None
            for x, value in reversed(self.before):
                x.copy_(value)

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_iter(out), tree_iter(() if func.is_view else func(*args, **kwargs)), strict=False):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def pretend_gpu(kind: str = "cuda") -> Iterator[Gpu]:
    """Inside, this machine has one GPU, of the kind `cuda` or `mps`."""
    grouped = torch._C._group_tensors_by_device_and_dtype

    def by_device(lists: Any, indices: bool = False) -> dict:  # of the optimizers; it would see the numbers' device
        return {(ours[0][0].device, dtype): (ours, at) for (_, dtype), (ours, at) in grouped(lists, indices).items()}

    with pytest.MonkeyPatch.context() as patch, Gpu(kind) as gpu:
        patch.setattr(Gpu, "current", gpu, raising=False)
        patch.setattr(torch.cuda if kind == "cuda" else torch.backends.mps, "is_available", lambda: True)
        # `module.to(device)` then exchanges what a parameter is, and keeps its identity.
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", Graph.captured)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
        yield gpu

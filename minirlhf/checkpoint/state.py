"""A stage's State taken apart into named tensors and plain numbers, and put together again.

A State is a dataclass whose fields are models, their optimizers, small dataclasses of numbers (the KL controller) and
plain values. Anything else is refused, so that nothing can be forgotten in silence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


@dataclass
class Parts:
    """tensors by name, e.g. `model.wte.weight` and `optimizer.model.wte.weight.exp_avg`; everything else as JSON."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def clone(self) -> Parts:
        """The same values in tensors of their own."""
        return Parts({name: tensor.clone() for name, tensor in self.tensors.items()}, self.numbers)


def parts(state: object) -> Parts:
    """The parts of `state`; the tensors are the live ones, detached, the numbers are copies."""
    tensors: dict[str, Tensor] = {}
    for name, value in _fields(state):
        if isinstance(value, nn.Module):
            tensors |= {f"{name}.{key}": tensor.detach() for key, tensor in _tensors(value)}
        elif isinstance(value, Optimizer):
            tensors |= {key: tensor.detach() for key, tensor in _moments(state, name, value)}
    plain = {name: value for name, value in _fields(state) if not isinstance(value, nn.Module)}
    return Parts(tensors, {name: _plain(state, name, value) for name, value in plain.items()})


def _plain(state: object, name: str, value: Any) -> Any:
    """A field that is no model as JSON: an optimizer by its groups, a small dataclass by its fields."""
    if isinstance(value, Optimizer):
        names = _parameter_names(state)
        return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in value.param_groups]
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(state).__name__}.{name} is a {type(value).__name__}, which no checkpoint can hold")


def _moments(state: object, name: str, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps of each parameter that it has stepped, by name."""
    names = _parameter_names(state)
    for parameter, moments in optimizer.state.items():
        yield from ((f"{name}.{names[id(parameter)]}.{key}", moments[key]) for key in MOMENTS)


def expected(state: object) -> Parts:
    """The parts that `state` has after an optimizer step, without memory: tensors on the meta device."""
    found = parts(state)
    tensors = {name: tensor.to("meta") for name, tensor in found.tensors.items()}
    names = _parameter_names(state)
    optimizers = [(name, value) for name, value in _fields(state) if isinstance(value, Optimizer)]
    pairs = [(name, p) for name, value in optimizers for group in value.param_groups for p in group["params"]]
    for name, parameter in pairs:
        moments = {key: parameter.detach().to("meta") for key in MOMENTS}
        moments["step"] = torch.zeros((), dtype=torch.float32, device="meta")
        tensors |= {f"{name}.{names[id(parameter)]}.{key}": moment for key, moment in moments.items()}
    return Parts(tensors, found.numbers)


def same_layout(numbers: Any, other: Any) -> bool:
    """True where two trees of JSON have the same keys, lengths and kinds of values; the values may differ."""
    if isinstance(numbers, dict) and isinstance(other, dict):
        return numbers.keys() == other.keys() and all(same_layout(numbers[key], other[key]) for key in numbers)
    if isinstance(numbers, list | tuple) and isinstance(other, list | tuple):
        return len(numbers) == len(other) and all(map(same_layout, numbers, other))
    if isinstance(numbers, str) and isinstance(other, str):
        return numbers == other  # names of parameters
    number = (int, float)
    both_numbers = isinstance(numbers, number) and isinstance(other, number)
    return type(numbers) is type(other) or (both_numbers and bool not in (type(numbers), type(other)))


@torch.no_grad()
def restore(state: object, stored: Parts) -> None:
    """Put stored parts back into `state`. Compare them with `expected` and `same_layout` first: nothing is checked."""
    names = _parameter_names(state)
    for name, value in _fields(state):
        if isinstance(value, nn.Module):
            _restore_model(value, name, stored)
        elif isinstance(value, Optimizer):
            _restore_optimizer(value, name, stored, names)
        elif dataclasses.is_dataclass(value):
            vars(value).update(stored.numbers[name])
        else:
            setattr(state, name, stored.numbers[name])


def _restore_model(model: nn.Module, name: str, stored: Parts) -> None:
    for key, tensor in _tensors(model):
        tensor.copy_(stored.tensors[f"{name}.{key}"])


def _restore_optimizer(optimizer: Optimizer, name: str, stored: Parts, names: dict[int, str]) -> None:
    """Through the optimizer's own load_state_dict, which numbers parameters in the order of the groups.

    A parameter that had not been stepped has nothing stored.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for number, parameter in enumerate(parameters):
        prefix = f"{name}.{names[id(parameter)]}"
        if f"{prefix}.{MOMENTS[0]}" in stored.tensors:
            moments[number] = {key: stored.tensors[f"{prefix}.{key}"] for key in MOMENTS}
    numbers = iter(range(len(parameters)))
    groups = [
        {**saved, "betas": tuple(saved["betas"]), "params": [next(numbers) for _ in group["params"]]}
        for group, saved in zip(optimizer.param_groups, stored.numbers[name], strict=True)
    ]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _fields(state: object) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(state):
        yield field.name, getattr(state, field.name)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers; tied weights appear once."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _parameter_names(state: object) -> dict[int, str]:
    """The name of every model parameter in `state`, by its identity."""
    models = [(name, value) for name, value in _fields(state) if isinstance(value, nn.Module)]
    return {id(parameter): f"{name}.{key}" for name, model in models for key, parameter in model.named_parameters()}

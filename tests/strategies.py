"""Hypothesis strategies for the maths tests, and the laws of masks, rows and micro-batches as functions to call.

A strategy draws the shape, the mask and a seed; the numbers come from a generator with that seed, in float64. So a
failing example is small to read and quick to repeat. `derandomize` makes every run the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

few = settings(deadline=None, derandomize=True, max_examples=12, database=None)
"""For laws that are checked for many functions each."""
some = settings(deadline=None, derandomize=True, max_examples=25, database=None)
"""For laws of one function."""

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
"""Equal up to the order of float64 sums."""
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
"""Equal to the last bit."""

seeds = st.integers(0, 2**31 - 1)
garbage = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300, -7.0])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@dataclass
class Padded:
    """A right-padded batch: `inputs` are four per-token tensors, `scores` one number a row."""

    mask: Tensor  # (B, T-1) bool, contiguous in each row, may be empty
    inputs: list[Tensor]  # 4 of (B, T-1)
    scores: Tensor  # (B,)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Padded:
        """The batch with every per-token tensor, but the mask, put through `change`."""
        return Padded(self.mask, [change(x) for x in self.inputs], self.scores)

    def with_padding(self, filler: float) -> Padded:
        return self.changed(lambda x: torch.where(self.mask, x, filler))

    def wider(self, left: int, right: int, filler: float) -> Padded:
        """The batch with more columns on both sides: a longer prompt and more padding."""

        def widen(x: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(x, (left, right), value=value)

        return Padded(widen(self.mask, False), [widen(x, filler) for x in self.inputs], self.scores)

    def rows(self, index: Tensor | slice) -> Padded:
        return Padded(self.mask[index], [x[index] for x in self.inputs], self.scores[index])


def contiguous_mask(spans: list[tuple[int, int]], width: int) -> Tensor:
    """Bool (B, width), true from start up to but not including stop."""
    columns = torch.arange(width)
    return torch.stack([(columns >= start) & (columns < stop) for start, stop in spans])


@st.composite
def padded(draw: st.DrawFn, min_rows: int = 1, min_length: int = 0) -> Padded:
    rows, width = draw(st.integers(min_rows, 4)), draw(st.integers(max(min_length, 1), 6))
    starts = draw(st.lists(st.integers(0, width - min_length), min_size=rows, max_size=rows))
    spans = [(start, draw(st.integers(start + min_length, width))) for start in starts]
    seed = draw(seeds)
    inputs = [normal(rows, width, seed=seed + i) for i in range(4)]
    return Padded(contiguous_mask(spans, width), inputs, normal(rows, seed=seed + 4))


@st.composite
def pairs(draw: st.DrawFn, min_pairs: int = 1) -> list[Tensor]:
    """Four tensors (N,): chosen and rejected of the policy, then of the reference, or whatever a loss takes."""
    count, seed = draw(st.integers(min_pairs, 6)), draw(seeds)
    return [3.0 * normal(count, seed=seed + i) for i in range(4)]


# A function of a padded batch with an optional denominator; a function of four pair tensors with one.
Masked = Callable[[Padded, float | Tensor | None], Tensor]
Paired = Callable[[list[Tensor], float | Tensor | None], Tensor]


def value_and_gradient(
    function: Masked, case: Padded, denominator: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The value, and the gradient with respect to the first input of a weighted sum of it (0 where none flows)."""
    leaf = case.inputs[0].clone().requires_grad_()
    value = function(Padded(case.mask, [leaf, *case.inputs[1:]], case.scores), denominator)
    if not value.requires_grad:
        return value, torch.zeros_like(leaf)
    # Weights, because the plain sum of whitened numbers is 0 whatever they are. A mask has one sum for all widths.
    weights = case.mask.double().cumsum(-1) if value.dim() else torch.ones(())
    (gradient,) = torch.autograd.grad((value * weights).sum(), leaf)
    return value.detach(), gradient


def padding_content_law(function: Masked, case: Padded, filler: float) -> None:
    """What lies in the padding changes nothing, to the last bit; per-token values and gradients are 0 there."""
    value, gradient = value_and_gradient(function, case)
    other_value, other_gradient = value_and_gradient(function, case.with_padding(filler))
    equal(other_value, value)
    equal(other_gradient, gradient)
    assert torch.isfinite(value).all()
    assert not gradient[~case.mask].any()
    if value.dim():
        assert not value[~case.mask].any()


def padding_width_law(function: Masked, case: Padded, left: int, right: int, filler: float) -> None:
    """A longer prompt and more padding change nothing."""
    columns = slice(left, left + case.mask.shape[1])
    value, gradient = value_and_gradient(function, case)
    wide_value, wide_gradient = value_and_gradient(function, case.wider(left, right, filler))
    close(wide_gradient[:, columns], gradient)
    close(wide_value[:, columns] if value.dim() else wide_value, value)


def permutation_law(function: Masked, case: Padded, seed: int) -> None:
    """The order of the rows changes nothing but the order of the rows."""
    order = torch.randperm(len(case.mask), generator=generator(seed))
    value, gradient = value_and_gradient(function, case)
    other_value, other_gradient = value_and_gradient(function, case.rows(order))
    close(other_value, value[order] if value.dim() else value)
    close(other_gradient, gradient[order])


def split_law(function: Masked, case: Padded, denominator: float | Tensor, size: int) -> None:
    """Over micro-batches of `size` rows with the whole batch's denominator, values add up, gradients stay."""
    value, gradient = value_and_gradient(function, case)
    slices = [slice(start, start + size) for start in range(0, len(case.mask), size)]
    parts = [value_and_gradient(function, case.rows(rows), denominator) for rows in slices]
    close(sum(part[0] for part in parts), value)
    close(torch.cat([part[1] for part in parts]), gradient)


def rowwise_law(function: Masked, case: Padded) -> None:
    """Each row's result is the one it has alone."""
    value = function(case, None)
    close(torch.cat([function(case.rows(slice(b, b + 1)), None) for b in range(len(value))]), value)


def pair_gradients(
    function: Paired, inputs: list[Tensor], denominator: float | Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The value and the gradients with respect to the first two inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    value = function([*leaves, *inputs[2:]], denominator)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def pair_permutation_law(function: Paired, inputs: list[Tensor], seed: int) -> None:
    order = torch.randperm(len(inputs[0]), generator=generator(seed))
    value, gradients = pair_gradients(function, inputs)
    other_value, other_gradients = pair_gradients(function, [x[order] for x in inputs])
    close(other_value, value)
    close(other_gradients, [g[order] for g in gradients])


def pair_split_law(function: Paired, inputs: list[Tensor], size: int) -> None:
    """As `split_law`, with the number of pairs as a number and as a tensor."""
    count = len(inputs[0])
    value, gradients = pair_gradients(function, inputs)
    slices = [slice(start, start + size) for start in range(0, count, size)]
    for denominator in (count, torch.tensor(count)):
        parts = [pair_gradients(function, [x[rows] for x in inputs], denominator) for rows in slices]
        close(sum(part[0] for part in parts), value)
        close([torch.cat(pieces) for pieces in zip(*[part[1] for part in parts], strict=True)], gradients)


def half_law(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """bfloat16 and float16 inputs give, in float32, what their float32 copies give, bit for bit; float64 stays."""
    assert function(*[x.double() if x.is_floating_point() else x for x in inputs]).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        halves = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        floats = [x.float() if x.is_floating_point() else x for x in halves]
        equal(function(*halves), function(*floats))
        assert function(*halves).dtype == torch.float32

"""Attention: both ways of computing it against a slow one, query by query."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minirlhf import model
from minirlhf.model import attend, attend_plainly


def slow(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Each query by itself, over the list of keys that it sees."""
    result = torch.zeros_like(q)
    batch, heads, width, size = q.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(width):
                keys = [s for s in range(k.shape[2]) if visible[b, 0, t, s]]
                weights = [math.exp((q[b, h, t] @ k[b, h, s]).item() / math.sqrt(size)) for s in keys]
                result[b, h, t] = sum(w * v[b, h, s] for w, s in zip(weights, keys, strict=True)) / sum(weights)
    return result


def inputs(width: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of two rows with three heads, with gradient."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 3, width, 4), (2, 3, keys, 4), (2, 3, keys, 4)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def visible_keys(width: int, keys: int) -> Tensor:
    """Some keys for every query, others in either row; a query's own place is among them."""
    mask = torch.rand(2, 1, width, keys, generator=torch.Generator().manual_seed(6)) < 0.6
    mask[..., torch.arange(width), torch.arange(width)] = True
    return mask


@pytest.mark.parametrize(("width", "keys", "masked"), [(5, 5, False), (5, 5, True), (1, 6, True)])
@pytest.mark.parametrize("way", [attend, attend_plainly])
def test_both_ways_are_the_formula(way: object, width: int, keys: int, masked: bool) -> None:
    q, k, v = inputs(width, keys, torch.float64)
    visible = visible_keys(width, keys) if masked else model.causal(width).expand(2, 1, width, width)
    found = way(q, k, v, visible if masked or way is attend_plainly else None)
    torch.testing.assert_close(found, slow(q, k, v, visible))


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_on_a_cpu_takes_the_plain_way_up_to_short_rows(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of the fused kernel, to bfloat16; longer rows and float32 never get there."""
    taken = []
    monkeypatch.setattr(model, "SHORT", 6)
    monkeypatch.setattr(model, "attend_plainly", lambda *a: taken.append(len(a)) or attend_plainly(*a))
    results = {}
    for name, width, dtype in (("short", 6, torch.bfloat16), ("exact", 6, torch.float32), ("long", 7, torch.bfloat16)):
        parts = inputs(width, width, dtype)
        y = attend(*parts, visible_keys(width, width) if masked else None)
        y.float().square().sum().backward()
        results[name] = [y, *(part.grad for part in parts)]
        assert len(taken) == 1, name
    for found, exact in zip(results["short"], results["exact"], strict=True):
        # bfloat16 keeps 8 bits: a rounding is up to 0.004 of a value, and there are a handful one after another.
        torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)

"""Optimizer groups, schedules and gradient clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from minirlhf.model import GPT, GPTConfig
from minirlhf.optim import adamw, clip_gradients, cosine_schedule, linear_schedule, set_learning_rate
from minirlhf.runtime import UserError


def tiny_gpt() -> GPT:
    return GPT(GPTConfig(vocab_size=5, n_positions=4, n_layer=1, n_head=1, n_embd=4))


def test_matrices_are_decayed_and_vectors_are_not_and_a_tied_head_is_there_once() -> None:
    model = tiny_gpt()
    model.wpe.weight.requires_grad_(False)
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    for name, p in model.named_parameters():
        if name == "wpe.weight":
            assert id(p) not in decay
        else:
            assert decay[id(p)] == (0.3 if name.endswith("weight") and "ln_" not in name else 0.0), name


@pytest.mark.parametrize(("eps", "weight_decay"), [(1e-8, 0.0), (1e-5, 0.2)])
def test_the_first_step_by_hand(eps: float, weight_decay: float) -> None:
    """After bias correction m = g and v = g^2, so w <- w (1 - lr wd) - lr g / (|g| + eps), eps outside the root."""
    layer = nn.Linear(2, 1, bias=False).double()
    start, gradient = torch.tensor([[0.5, -2.0]]).double(), torch.tensor([[3e-5, -1e-6]]).double()
    layer.weight.data.copy_(start)
    layer.weight.grad = gradient.clone()
    adamw(layer, learning_rate=0.1, eps=eps, weight_decay=weight_decay).step()
    expected = start * (1 - 0.1 * weight_decay) - 0.1 * gradient / (gradient.abs() + eps)
    torch.testing.assert_close(layer.weight.data, expected)


def test_betas_by_hand() -> None:
    """Two steps with gradients 1 and 3: m = 0.1 (0.9 + 3), v = 0.001 (0.999 + 9), each over 1 - beta^2."""
    layer = nn.Linear(1, 1, bias=False).double()
    layer.weight.data.zero_()
    optimizer = adamw(layer, learning_rate=0.0)
    for gradient, rate in ((1.0, 0.0), (3.0, 1.0)):
        set_learning_rate(optimizer, rate)
        layer.weight.grad = torch.tensor([[gradient]]).double()
        optimizer.step()
    m, v = 0.1 * (0.9 + 3) / (1 - 0.9**2), 0.001 * (0.999 + 9) / (1 - 0.999**2)
    assert layer.weight.item() == pytest.approx(-m / math.sqrt(v), rel=1e-6)


def test_the_linear_schedule_by_hand() -> None:
    # Two steps up to 1, the peak again, then down by 1/4 a step; it would be 0 at step 6.
    assert [linear_schedule(s, 6, warmup_steps=2) for s in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [linear_schedule(s, 4) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_the_cosine_schedule_by_hand() -> None:
    # Half a cosine over 4 steps from 1 to 0.1: cos(pi/4) = 0.7071, so 0.55 + 0.45 cos.
    expected = [0.25, 0.5, 0.75, 1, 1, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1]
    assert [cosine_schedule(s, 8, warmup_steps=4) for s in range(9)] == pytest.approx(expected)
    assert cosine_schedule(1, 2, final=0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [linear_schedule, cosine_schedule])
def test_a_run_that_is_all_warm_up_is_possible(schedule) -> None:
    assert [schedule(s, 2, warmup_steps=4) for s in range(2)] == [0.25, 0.5]
    assert math.isfinite(schedule(0, 0)) and math.isfinite(schedule(4, 4, warmup_steps=4))


def test_a_step_is_seen_within_the_same_autocast_block() -> None:
    """Autocast keeps bfloat16 copies of the weights, which a step makes stale."""
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    optimizer = adamw(layer, learning_rate=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
        optimizer.step()
        within = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), within)


def test_the_learning_rate_of_every_group_is_set() -> None:
    optimizer = adamw(tiny_gpt(), learning_rate=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    set_learning_rate(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]


def with_gradients(*gradients: float) -> nn.Module:
    model = nn.ParameterList([torch.zeros(1) for _ in gradients])
    for p, gradient in zip(model, gradients, strict=True):
        p.grad = torch.tensor([gradient])
    return model


def test_gradients_are_clipped_by_their_joint_norm() -> None:
    model = with_gradients(3.0, 4.0)
    assert clip_gradients(model, 1.0).item() == pytest.approx(5.0)  # the norm before
    assert [p.grad.item() for p in model] == pytest.approx([0.6, 0.8])
    assert clip_gradients(model, 2.0).item() == pytest.approx(1.0)
    assert [p.grad.item() for p in model] == pytest.approx([0.6, 0.8])  # below the limit nothing changes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_stop_the_run(bad: float) -> None:
    with pytest.raises(UserError, match="gradient norm is (nan|inf)"):
        clip_gradients(with_gradients(1.0, bad), 1.0)

"""AdamW in two groups, and learning-rate schedules as functions of the optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minirlhf.runtime import DivergenceError


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices and leaves biases and LayerNorms alone.

    A tied head is one parameter and appears once. `eps` is added after the bias correction, as in PyTorch and in
    Kingma and Ba 2015, algorithm 1; TensorFlow 1 adds it before, which makes it 31.6 times larger at the first step
    for beta2 = 0.999.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    # Autocast keeps its bfloat16 copies of the weights until its block ends: without this, a second minibatch or an
    # evaluation in the same block would still compute with the weights from before the step.
    optimizer.register_step_post_hook(lambda *_: torch.clear_autocast_cache())
    return optimizer


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the zeros that fused AdamW would give it at its first step; changes no update."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": step, **moments}


def linear_schedule(step: int, total_steps: int, *, warmup_steps: int = 0) -> float:
    """The factor for the learning rate at `step`: up to 1 over the warm-up, then linearly to 0 at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (total_steps - step) / max(total_steps - warmup_steps, 1)


def cosine_schedule(step: int, total_steps: int, *, warmup_steps: int = 0, final: float = 0.1) -> float:
    """The factor for the learning rate at `step`: up to 1 over the warm-up, then half a cosine down to `final`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> float:
    """Set the learning rate of every parameter group; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before.

    Goes between backward and the optimizer step. Raises DivergenceError where the norm is not finite, so that no
    optimizer step is made with such gradients.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(list(gradients.values()))
    if not torch.isfinite(norm):
        bad = next((name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), "their sum")
        raise DivergenceError(
            f"gradient norm is {norm.item()} (first in {bad}): stopped before the optimizer step; try a lower learning "
            "rate"
        )
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm

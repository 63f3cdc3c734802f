"""Straightforward re-implementations for tests: one row at a time, loops, float64. Shares no code with the package.

A model here is a dict of named float64 tensors that require grad, GPT-2's equations are written out per row, and
AdamW is the five lines of its paper. Slow and plain on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Params = dict[str, Tensor]


def parameters_of(module: torch.nn.Module) -> Params:
    """A module's parameters as independent float64 leaves."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in module.named_parameters()}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def hidden(p: Params, ids: list[int], n_head: int, prefix: str = "") -> Tensor:
    """(T, C) final hidden states of one row."""
    get = lambda name: p[prefix + name]  # noqa: E731
    count = len(ids)
    x = torch.stack([get("wte.weight")[token] + get("wpe.weight")[t] for t, token in enumerate(ids)])
    layers = 1 + max(int(name.split("h.")[1].split(".")[0]) for name in p if name.startswith(prefix + "h."))
    for layer in range(layers):
        block = f"h.{layer}."
        a = layer_norm(x, get(block + "ln_1.weight"), get(block + "ln_1.bias"))
        qkv = a @ get(block + "attn.c_attn.weight").T + get(block + "attn.c_attn.bias")
        width = x.shape[1]
        size = width // n_head
        heads = []
        for head in range(n_head):
            q, k, v = (qkv[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
            rows = []
            for t in range(count):
                weights = torch.softmax(torch.stack([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(size), 0)
                rows.append(sum(weights[s] * v[s] for s in range(t + 1)))
            heads.append(torch.stack(rows))
        y = torch.cat(heads, 1)
        x = x + y @ get(block + "attn.c_proj.weight").T + get(block + "attn.c_proj.bias")
        a = layer_norm(x, get(block + "ln_2.weight"), get(block + "ln_2.bias"))
        a = gelu(a @ get(block + "mlp.c_fc.weight").T + get(block + "mlp.c_fc.bias"))
        x = x + a @ get(block + "mlp.c_proj.weight").T + get(block + "mlp.c_proj.bias")
    return layer_norm(x, get("ln_f.weight"), get("ln_f.bias"))


def response_logprobs(p: Params, prompt: list[int], response: list[int], n_head: int) -> Tensor:
    """(len(response),) log-probabilities of the response's tokens under a tied head."""
    states = hidden(p, prompt + response, n_head)
    rows = []
    for place, token in enumerate(response):
        logits = states[len(prompt) - 1 + place] @ p["wte.weight"].T
        rows.append(logits[token] - torch.logsumexp(logits, 0))
    return torch.stack(rows)


def score(p: Params, prompt: list[int], response: list[int], n_head: int) -> Tensor:
    """Reward model: the head on the last token."""
    return hidden(p, prompt + response, n_head, "gpt.")[-1] @ p["score.weight"][0]


def values(p: Params, prompt: list[int], response: list[int], n_head: int) -> Tensor:
    """(len(response),) values of the states before each response token."""
    states = hidden(p, prompt + response, n_head, "gpt.")
    before = [len(prompt) - 1 + place for place in range(len(response))]
    return torch.stack([states[t] @ p["value.weight"][0] + p["value.bias"][0] for t in before])


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, for a dict of parameters; matrices alone are decayed."""

    def __init__(self, p: Params, *, eps: float, weight_decay: float) -> None:
        self.p, self.eps, self.weight_decay, self.t = p, eps, weight_decay, 0
        self.m = {name: torch.zeros_like(x) for name, x in p.items()}
        self.v = {name: torch.zeros_like(x) for name, x in p.items()}

    def step(self, loss: Tensor, *, learning_rate: float, max_norm: float) -> None:
        """Gradient of the loss, clipped by its joint norm, then one update."""
        grads = dict(zip(self.p, torch.autograd.grad(loss, list(self.p.values()), allow_unused=True), strict=True))
        grads = {name: torch.zeros_like(self.p[name]) if g is None else g for name, g in grads.items()}
        norm = math.sqrt(sum((g**2).sum().item() for g in grads.values()))
        scale = min(1.0, max_norm / (norm + 1e-6))
        self.t += 1
        with torch.no_grad():
            for name, x in self.p.items():
                g = grads[name] * scale
                if x.ndim >= 2:
                    x -= learning_rate * self.weight_decay * x
                self.m[name] = 0.9 * self.m[name] + 0.1 * g
                self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
                m_hat = self.m[name] / (1 - 0.9**self.t)
                v_hat = self.v[name] / (1 - 0.999**self.t)
                x -= learning_rate * m_hat / (v_hat.sqrt() + self.eps)

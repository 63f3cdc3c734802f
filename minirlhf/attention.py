"""Scaled dot-product attention, by PyTorch's fused kernel except where plain products are the faster way.

On a CPU the fused kernel takes 2.5 to 3.5 times as long in bfloat16 as the two products spelled out, for rows of up to
128 tokens, and as long at 512 (docs/speed.md); in float32, and on a GPU, it is the faster or the smaller one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 256  # keys a row up to which bfloat16 on a CPU is computed as plain products


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys; (B, H, T, D).

    visible  bool, broadcast to (B, H, T, S): the keys that each query reads, at least one; None is causal attention
             with S = T
    Source: Vaswani et al. 2017, eq. 1.
    Trap: a causal flag aligns the first query with the first key; a decode step, T = 1, has to bring its own mask.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= SHORT:
        return attend_plainly(q, k, v, causal(q.shape[2]) if visible is None else visible)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """`attend` as it is written in the paper, with the (B, H, T, S) weights in memory."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def causal(width: int) -> Tensor:
    """(T, T) bool: position t sees 0 .. t."""
    return torch.ones(width, width, dtype=torch.bool).tril()

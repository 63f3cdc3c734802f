"""GPT-2 with its attention; hf/folder.py reads and writes its Hugging Face folder.

Rows are right-padded, so a causal mask keeps padding out of every real position: the full forward takes no attention
mask, and positions are 0, 1, 2, ... in every row. Rows whose responses share a prompt (comparisons.py) bring their
own positions and an explicit mask. Log-probabilities are computed by `GPT.logprobs`, which gathers the
hidden states that a loss reads before the (wide) head; no (B, T, V) tensor exists in training.
Left out: dropout (it must be 0 in RL and DPO, and one-epoch training does not need it), top-k and top-p, and the
GPT-2 variants that no released checkpoint uses (other activations, cross-attention, scaled or re-ordered attention).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minirlhf.hf.folder import CheckpointError, read_settings, read_tensors, write_config, write_tensors
from minirlhf.hf.hub import model_folder
from minirlhf.kv_cache import KVCache
from minirlhf.ops import upcast

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


HeadFunction = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]
RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here draws random numbers
MAX_LOGITS = 2**24  # elements of one (rows, V) chunk of logits in `GPT.logprobs`: 64 MB in float32


# ----------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2, under the names that Hugging Face's config.json uses."""

    vocab_size: int
    n_positions: int  # longest row, in tokens
    n_layer: int
    n_head: int
    n_embd: int  # channels C; heads have C / n_head each
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


def read_config(folder: str | os.PathLike[str]) -> GPTConfig:
    """The configuration of a Hugging Face GPT-2 folder; raises CheckpointError naming every unsupported setting."""
    settings = read_settings(folder)
    try:
        return GPTConfig(**{field.name: settings[field.name] for field in fields(GPTConfig) if field.name in settings})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}; correct the file or save the model again") from error


# ---------------------------------------------------------------------------------------------------- the transformer
class Attention(nn.Module):
    """Causal multi-head self-attention; scores are scaled by 1/sqrt(D)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None, visible: Tensor | None) -> Tensor:
        qkv = rearrange(self.c_attn(x), "b t (qkv h d) -> qkv b h t d", qkv=3, h=self.n_head)
        q, (k, v) = qkv[0], qkv[1:] if cache is None else cache.update(self.layer, qkv[1:])
        mask = visible if cache is None else cache.key_mask
        y = attend(q, k, v, mask)
        return self.c_proj(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """Two linear layers around GPT-2's GELU, which is the tanh form and not the exact one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-LayerNorm residual block."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None, visible: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, visible)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: forward(tokens (B, T)) -> logits (B, T, V).

    seed  of the initial weights, which are the same on every machine and touch no global generator; None leaves the
          parameters on the meta device, without memory, for `from_pretrained` to fill
    A tied head is not a parameter of its own: `head_weight` is the token embedding, so that no copy, load or move can
    untie it. Padding may hold any token id of the vocabulary: it changes neither values nor gradients.
    Source: Radford et al. 2019, and the released openai/gpt-2 code.
    """

    def __init__(self, config: GPTConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True keeps each block's input alone and computes the rest again backward
        with torch.device("meta"):  # the layers' own initialisation would draw from the global generator
            # Not nn.Embedding(V, C): its own initialisation, on the meta device, imports the compiler for a second.
            self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
            self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
            self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if seed is not None:
            self.to_empty(device="cpu")
            self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0.

        The positions get 0.02 too, as in Hugging Face's GPT-2 and nanoGPT; OpenAI's code has 0.01 there.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer of them add to the residual stream
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer), generator=generator)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    @property
    def head_weight(self) -> Tensor:
        """(V, C) weight of the head."""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final LayerNorm; with a cache, those of the tokens just given.

        positions (B, T), visible (B, 1, T, T) bool  of rows whose responses share a prompt, see
        `comparisons.PairBatch`; by default a row is one sequence, with positions 0, 1, 2, ... and causal attention
        """
        width = tokens.shape[1]
        if positions is None and width > self.config.n_positions:
            raise ValueError(f"GPT: rows of {width} tokens, but the model has n_positions = {self.config.n_positions}")
        if positions is None:
            positions = torch.arange(width, device=tokens.device) if cache is None else cache.begin(width)
        x = self.wte(tokens) + self.wpe(positions)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.h:
            arguments = (x, cache, visible)
            x = checkpoint(block, *arguments, **RECOMPUTED) if recompute else block(*arguments)
        if cache is not None:
            cache.end()
        return self.ln_f(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.head_weight)

    def logprobs(self, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the given tokens: index t scores tokens[:, t+1] given tokens[:, :t+1].

        log softmax(logits / temperature), float32 (float64 stays float64), exactly 0 off the mask.
        tokens  (B, T); mask (B, T-1) bool; result (B, T-1)
        temperature  that of sampling: a policy is its distribution at the temperature it samples with
        Trap: this equals ops.token_logprobs(gpt(tokens) / temperature, tokens) on the mask, but runs the head on the
        masked positions alone, in chunks that are recomputed in the backward pass where there are several.
        """
        hidden, targets = self._read(tokens, mask)
        return _spread(self.head_logprobs(hidden, targets, temperature=temperature), mask)

    def logprobs_and_entropy(self, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """`logprobs`, and the entropy (nats) of the distribution each token was drawn from; both (B, T-1).

        The entropy is a diagnostic and carries no gradient.
        """
        hidden, targets = self._read(tokens, mask)
        logprobs, entropy = self._over_chunks(_logprobs_and_entropy, hidden, targets, temperature)
        return _spread(logprobs, mask), _spread(entropy, mask)

    def head_logprobs(self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
        """(M,) log-probabilities of the tokens `targets` (M,), each predicted from its row of `hidden` (M, C)."""
        return self._over_chunks(_logprobs, hidden, targets, temperature)[0]

    def _read(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (M, C) at the M masked positions, and the tokens (M,) that follow them."""
        if mask.dtype != torch.bool or mask.shape != (tokens.shape[0], tokens.shape[1] - 1):
            raise ValueError(
                f"GPT.logprobs: the mask is {mask.dtype} {tuple(mask.shape)}; it must be bool and one column narrower "
                f"than tokens {tuple(tokens.shape)}"
            )
        return self.hidden(tokens[:, :-1])[mask], tokens[:, 1:][mask]  # nothing is predicted from the last token

    def _over_chunks(
        self, function: HeadFunction, hidden: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        """`function` on chunks of rows that keep the logits small; several are recomputed in the backward pass."""
        rows = max(1, MAX_LOGITS // self.config.vocab_size)
        if len(hidden) <= rows:
            return function(hidden, self.head_weight, targets, temperature)
        parts = [
            checkpoint(function, h, self.head_weight, t, temperature, **RECOMPUTED)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> Self:
        """Read a Hugging Face GPT-2 folder, or a hub name such as "gpt2"; weights keep their number format.

        Raises UserError where there is no such model, CheckpointError where it is not a GPT-2 as configured.
        """
        folder = model_folder(source)
        model = cls(read_config(folder), seed=None)
        read_tensors(model, folder, tied_head=model.config.tie_word_embeddings)
        return model

    def full_precision(self) -> Self:
        """Half-precision weights as float32, for training: small updates vanish in half types. float64 stays."""
        return self.float() if self.wte.weight.dtype in (torch.float16, torch.bfloat16) else self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, which transformers loads as GPT2LMHeadModel."""
        write_config(folder, self.config, architecture="GPT2LMHeadModel", dtype=self.wte.weight.dtype)
        write_tensors(self, folder)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last axis; half types in float32, float64 stays.

    Sampling, scoring and training all come through here: old and new log-probabilities follow the same rules.
    """
    logits = upcast(logits)
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _logprobs(hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor]:
    return (log_softmax(F.linear(hidden, head_weight), temperature).gather(-1, targets[:, None])[:, 0],)


def _logprobs_and_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = log_softmax(F.linear(hidden, head_weight), temperature)  # (M, V)
    with torch.no_grad():  # - sum p log p, nats; a token of probability 0 adds 0
        entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """(M,) values back to the places of the mask, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)

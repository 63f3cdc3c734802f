"""Keys and values of the rows that are being decoded, in one buffer that is never reallocated."""

from __future__ import annotations

from collections import defaultdict

import torch
from einops import rearrange
from torch import Tensor

# A step reads this many columns or a multiple: every shape costs memory for the code of its bfloat16 products on a CPU,
# and on a GPU a captured step.
BLOCK = defaultdict(lambda: 16, cuda=64)


class KVCache:
    """Slots for rows that grow by a token a step: one preallocated buffer (n_layer, 2, S, H, T, D).

    `admit` names slots, and the next `GPT.hidden(tokens, cache)` reads right-padded prompts into them (prefill), over
    whatever was there. Every other call comes after `widen`, takes one token a slot, tokens (S, 1), and writes its key
    and value at that slot's own `lengths[i]`, over whatever the padding left there. What lies beyond a slot's own
    length is hidden from it by an explicit key mask.

    shape     of the buffer: S rows that are decoded at a time, T columns, the longest row that will ever be stored
    dtype     of the keys, i.e. the autocast format where one is in force
    lengths   (S,) tokens of each row that the cache holds
    """

    def __init__(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        slots = shape[2]
        # Zeros: a hidden column has weight 0, but 0 * nan of uninitialised memory would be nan.
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows = torch.arange(slots, device=device)
        self.width = 0  # columns in use, kept on the host: a decode step asks the device nothing
        self.incoming: Tensor | None = None  # the slots of the prompts that are read next
        self.key_mask: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Columns of the buffer."""
        return self.buffer.shape[4]

    @property
    def columns(self) -> int:
        """Columns that a decode step attends over: those in use, in whole blocks."""
        block = BLOCK[self.buffer.device.type]
        return min(-(-self.width // block) * block, self.capacity)

    def admit(self, slots: Tensor, lengths: Tensor) -> None:
        """The next call reads prompts of these lengths into these slots."""
        self.lengths[slots] = lengths
        self.width = int(self.lengths.max())
        self.incoming = slots

    def widen(self) -> int:
        """Make room for one more token in every slot; returns the columns that the next step reads."""
        self.width = min(self.width + 1, self.capacity)
        return self.columns

    def begin(self, width: int) -> Tensor:
        """Positions (1, T) or (S, 1) of the tokens that are coming in, T = width; sets the key mask of this step."""
        if self.incoming is not None:
            self.key_mask = None
            return torch.arange(width, device=self.lengths.device)[None]
        if width != 1:
            raise ValueError(f"KVCache: {width} tokens per row after the prompt; decoding takes one token per row")
        columns = torch.arange(self.columns, device=self.lengths.device)
        self.key_mask = (columns <= self.lengths[:, None])[:, None, None]  # (S, 1, 1, T): up to and with the new token
        return self.lengths[:, None]

    def update(self, layer: int, keys_values: Tensor) -> Tensor:
        """Store keys and values (2, B, H, T, D); returns those to attend over."""
        buffer = self.buffer[layer]
        if self.incoming is not None:
            buffer[:, self.incoming, :, : keys_values.shape[3]] = keys_values
            return keys_values
        # The two index tensors stand apart, so that the indexed dimension moves to the front: (S, 2, H, D).
        buffer[:, self.rows, :, self.lengths] = rearrange(keys_values, "kv b h 1 d -> b kv h d")
        return buffer[:, :, :, : self.columns]

    def end(self) -> None:
        """Count the tokens just stored; the prompts were counted when they were admitted."""
        if self.incoming is None:
            self.lengths += 1
        self.incoming = None

    def select(self, rows: Tensor) -> None:
        """Keep only these slots, in this order, within the same buffer; a slot that keeps its place is not copied."""
        moved = (rows != self.rows[: len(rows)]).nonzero()[:, 0]
        for layer in range(len(self.buffer)):  # one after the other: a copy of few keys at a time
            self.buffer[layer][:, moved] = self.buffer[layer][:, rows[moved]]
        self.buffer = self.buffer[:, :, : len(rows)]
        self.lengths = self.lengths[rows]
        self.rows = self.rows[: len(rows)]
        self.width = int(self.lengths.max())

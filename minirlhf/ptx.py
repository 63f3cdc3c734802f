"""PPO-ptx: texts that the policy goes on learning from beside PPO, so that it does not forget how to write.

Ouyang et al. 2022, eq. 2, the term coefficient * E_pretraining[log pi(x)]; `--ptx-data` of train_ppo.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import tiktoken
import torch
from torch import Tensor

from minirlhf import data, ops
from minirlhf.batch import Example, own_micro_batches, pad, permutation
from minirlhf.encode import encode_demonstrations
from minirlhf.model import GPT
from minirlhf.runtime import require


def pretraining_texts(source: str | None, encoding: tiktoken.Encoding, *, max_length: int) -> list[Example]:
    """The texts of a file or hub name, none without; raises UserError where nothing fits `max_length` tokens."""
    if source is None:
        return []
    texts = encode_demonstrations(encoding, data.load(source, "demonstrations"), max_length=max_length)
    require(len(texts) > 0, f"--ptx-data {source}: nothing in it fits {max_length} tokens")
    return texts


def draw(texts: Sequence[Example], count: int, *key: int) -> list[Example]:
    """`count` different texts, or all of fewer, chosen by the key alone."""
    return [texts[i] for i in permutation(len(texts), *key)[:count]]


def ptx_gradient(policy: GPT, texts: Sequence[Example], *, coefficient: float, max_tokens: int) -> dict[str, Tensor]:
    """Add the gradient of coefficient * mean negative log-likelihood of the texts; returns this loss.

    Temperature 1, as in train_sft.py. `max_tokens` padded positions a forward pass.
    """
    batch = pad(texts).to(policy.head_weight.device)
    tokens, total = batch.mask.sum(), torch.zeros(())
    for rows in own_micro_batches(batch.lengths, max_tokens):
        part = batch.rows(rows)
        logprobs = policy.logprobs(part.tokens, part.mask)  # (b, t-1)
        loss = -coefficient * ops.masked_mean(logprobs, part.mask, denominator=tokens)
        loss.backward()
        total = total + loss.detach().cpu()
    return {"ptx_loss": total}

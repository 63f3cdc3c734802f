"""One PPO rollout: prompts in, and out comes a batch that holds all that the update reads.

The sampled batch is right-padded, so it is a training batch as it stands. Reference, reward model and value model each
see it once, without gradient, in length-sorted micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.data import Batch, micro_batches
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.reward import ValueModel


@dataclass
class Rollout(Batch):
    """A batch of sampled responses and what was known about them before the update.

    finished      (B,) bool: the response ended with EOS, and not at the length limit
    old_logprobs  (B, T-1) log-probabilities under the policy that sampled; 0 off the mask, like all of this shape
    ref_logprobs  (B, T-1) under the frozen reference
    values        (B, T-1) V(state before the action at t)
    scores        (B,) what the reward function gave; unfinished responses hold the fixed score instead
    sampling_gap  (B,) largest |recorded - recomputed| old log-probability of the row; 0 where none was recomputed
    """

    finished: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    sampling_gap: Tensor


@torch.no_grad()
def over_micro_batches(function: Callable[[Batch], Tensor], batch: Batch, max_tokens: int) -> Tensor:
    """`function(batch)` computed in micro-batches, without gradient; a (B,) or (B, T-1) result, 0 beyond a row.

    function  per-row: its result for a row must not depend on the other rows
    """
    result: Tensor | None = None
    for part in micro_batches(batch.lengths, max_tokens):
        value = function(batch.rows(part))
        if result is None:
            shape = (len(batch),) if value.ndim == 1 else (len(batch), batch.tokens.shape[1] - 1)
            result = value.new_zeros(shape)
        if value.ndim == 1:
            result[part] = value
        else:
            result[part, : value.shape[1]] = value
    assert result is not None, "an empty batch"
    return result


def collect(
    policy: GPT,
    reference: GPT,
    value_model: ValueModel,
    reward: Callable[[Batch], Tensor],
    prompts: Sequence[list[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    seed: int,
    eos_id: int,
    max_new_tokens: int,
    temperature: float,
    missing_eos_score: float | None,
    rescore: bool,
    max_tokens: int,
) -> Rollout:
    """Sample a response to each prompt and score it with reference, value model and reward.

    reward             Batch -> (B,) scores
    keys, seed         each row's own random stream (see `generate`)
    temperature        of sampling, and so of every log-probability: policy, reference and, later, training
    missing_eos_score  replaces the score of a response that did not finish; None keeps the score
    rescore            recompute the old log-probs by the training forward, needed where the cached forward differs
                       from it (bfloat16); in float32 those recorded while sampling are exact enough
    max_tokens         padded positions a micro-batch
    Source: Ziegler et al. 2019, the fixed score included; Huang et al. 2024 (arXiv 2403.17031).
    """
    samples = generate(
        policy, prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, temperature=temperature, seed=seed, keys=keys
    )

    def logprobs_under(model: GPT) -> Callable[[Batch], Tensor]:
        return lambda part: model.logprobs(part.tokens, part.mask, temperature=temperature)

    old_logprobs = over_micro_batches(logprobs_under(policy), samples, max_tokens) if rescore else samples.logprobs
    scores = over_micro_batches(reward, samples, max_tokens)
    if missing_eos_score is not None:
        scores = torch.where(samples.finished, scores, missing_eos_score)
    return Rollout(
        samples.tokens,
        samples.prompt_lengths,
        samples.lengths,
        finished=samples.finished,
        old_logprobs=old_logprobs,
        ref_logprobs=over_micro_batches(logprobs_under(reference), samples, max_tokens),
        values=over_micro_batches(lambda part: value_model(part.tokens, part.mask), samples, max_tokens),
        scores=scores,
        sampling_gap=(samples.logprobs - old_logprobs).abs().amax(dim=1),
    )

"""One PPO rollout: prompts in, and out comes a batch that holds all that the update reads.

The sampled batch is right-padded, so it is a training batch as it stands. Reference, reward model and value model each
see it once, without gradient, in length-sorted micro-batches. Several processes sample and score a share of the rows
each; every one of them then holds the whole rollout, so that what follows is the same everywhere.
At the end stands PPO-ptx: texts that the policy goes on learning from beside its rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from minirlhf import distributed, ops
from minirlhf.batch import Batch, Example, local_micro_batches, over_micro_batches, pad, permutation
from minirlhf.generate import Samples, generate
from minirlhf.model import GPT
from minirlhf.reward import ValueModel
from minirlhf.runtime import Stream

B = TypeVar("B", bound=Batch)


@dataclass
class Rollout(Batch):
    """A batch of sampled responses and what was known about them before the update.

    finished      (B,) bool: the response ended with EOS, and not at the length limit
    old_logprobs  (B, T-1) log-probabilities under the policy that sampled; 0 off the mask, like all of this shape
    ref_logprobs  (B, T-1) under the frozen reference
    values        (B, T-1) V(state before the action at t); 0 without a value model
    scores        (B,) what the reward function gave; unfinished responses hold the fixed score instead
    sampling_gap  (B,) largest |recorded - recomputed| old log-probability of the row; 0 where none was recomputed
    groups        (B,) long: rows of one number answer the same prompt
    """

    finished: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    sampling_gap: Tensor
    groups: Tensor


def sample(
    policy: GPT,
    prompts: Sequence[list[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    seed: int,
    eos_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Samples:
    """A sampled response to each prompt, the same in every process: each samples a share, then they exchange theirs.

    Row i has its own random stream, (seed, keys[i]), so who samples it makes no difference to what is sampled.
    """
    local = distributed.share(torch.tensor([len(prompt) for prompt in prompts])).tolist()
    rows = local or [0]  # a process without rows samples one to take part in the exchange, and brings nothing
    samples = generate(
        policy,
        [prompts[i] for i in rows],
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        temperature=temperature,
        seed=seed,
        keys=[keys[i] for i in rows],
    )
    return joined(samples, local, len(prompts))


def joined(part: B, local: Sequence[int], count: int) -> B:
    """The batch of `count` rows whose rows `own` are those of `part`, and the others those of the other processes."""
    if distributed.world_size() == 1:
        return part
    width = part.tokens.shape[1]
    more = int(distributed.all_max(torch.tensor(width))) - width  # columns that another process's rows need
    index = torch.tensor(local, dtype=torch.long, device=part.tokens.device)

    def exchange(value: Tensor) -> Tensor:
        shape = (count,) if value.ndim == 1 else (count, value.shape[1] + more)
        whole = value.new_zeros(shape, dtype=torch.int64 if value.dtype == torch.bool else value.dtype)
        local_rows = whole if value.ndim == 1 else whole[:, : value.shape[1]]  # a view
        local_rows[index] = value[: len(index)].to(whole.dtype)
        return distributed.all_sum(whole).to(value.dtype)

    return type(part)(**{field.name: exchange(getattr(part, field.name)) for field in fields(part)})


def collect(
    policy: GPT,
    reference: GPT,
    value_model: ValueModel | None,
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
    groups: Sequence[int] | None = None,
) -> Rollout:
    """Sample a response to each prompt and score it with reference, value model and reward.

    reward             Batch -> (B,) scores
    keys, seed         each row's own random stream (see `generate`)
    temperature        of sampling, and so of every log-probability: policy, reference and, later, training
    missing_eos_score  replaces the score of a response that did not finish; None keeps the score
    rescore            recompute the old log-probs by the training forward, needed where the cached forward differs
                       from it (bfloat16); in float32 those recorded while sampling are exact enough
    max_tokens         padded positions a micro-batch
    groups             the number of each row's prompt, where several rows answer one; by default each has its own
    Source: Ziegler et al. 2019, the fixed score included; Huang et al. 2024 (arXiv 2403.17031).
    """
    samples = sample(
        policy, prompts, keys=keys, seed=seed, eos_id=eos_id, max_new_tokens=max_new_tokens, temperature=temperature
    )

    def logprobs_under(model: GPT) -> Callable[[Batch], Tensor]:
        return lambda part: model.logprobs(part.tokens, part.mask, temperature=temperature)

    old_logprobs = over_micro_batches(logprobs_under(policy), samples, max_tokens) if rescore else samples.logprobs
    values = torch.zeros_like(old_logprobs)
    if value_model is not None:
        values = over_micro_batches(lambda part: value_model(part.tokens, part.mask), samples, max_tokens)
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
        values=values,
        scores=scores,
        sampling_gap=(samples.logprobs - old_logprobs).abs().amax(dim=1),
        groups=torch.tensor(range(len(prompts)) if groups is None else groups, device=samples.tokens.device),
    )


def rollout_keys(iteration: int, prompts: Sequence[int], group_size: int) -> list[tuple[int, ...]]:
    """The random stream of each response, `group_size` to a prompt; a prompt's one response has that of its prompt."""
    if group_size == 1:
        return [(Stream.ROLLOUT, iteration, prompt) for prompt in prompts]
    return [(Stream.ROLLOUT, iteration, prompt, k) for prompt in prompts for k in range(group_size)]


def rollout_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """Values to log of the policy before this iteration's update; the KL is in nats per response."""
    mask = rollout.mask
    return {
        "score": rollout.scores.mean(),
        "kl": ops.sequence_kl(rollout.old_logprobs, rollout.ref_logprobs, mask),
        "score_std": rollout.scores.std(correction=0),
        "response_length": mask.sum(dim=1).float().mean(),
        "eos_rate": rollout.finished.float().mean(),
        "sampling_gap": rollout.sampling_gap.max(),
    }


@dataclass
class Experience(Rollout):
    """A rollout with what the update learns from it, (B, T-1) each: advantages, and returns (0 without values)."""

    advantages: Tensor
    returns: Tensor


# ------------------------------------------------------------------------------------------------------------- PPO-ptx
def draw_texts(texts: Sequence[Example], count: int, *key: int) -> list[Example]:
    """`count` different texts, or all of fewer, chosen by the key alone."""
    return [texts[i] for i in permutation(len(texts), *key)[:count]]


def ptx_gradient(policy: GPT, texts: Sequence[Example], *, coefficient: float, max_tokens: int) -> dict[str, Tensor]:
    """Add the gradient of coefficient * mean negative log-likelihood of the texts; returns this loss.

    Ouyang et al. 2022, eq. 2, the term coefficient * E_pretraining[log pi(x)], against forgetting how to write.
    Temperature 1, as in train_sft.py. `max_tokens` padded positions per forward pass.
    """
    batch = pad(texts).to(policy.head_weight.device)
    tokens, total = batch.mask.sum(), torch.zeros(())
    for rows in local_micro_batches(batch.lengths, max_tokens):
        part = batch.rows(rows)
        logprobs = policy.logprobs(part.tokens, part.mask)  # (b, t-1)
        loss = -coefficient * ops.masked_mean(logprobs, part.mask, denominator=tokens)
        loss.backward()
        total = total + loss.detach().cpu()
    return {"ptx_loss": total}

"""What each optimisation gains: the project's way against the plain one, in alternation within one process.

    python benchmarks/speed_gains.py        # 4 layers, 128 channels; a minute on two cores

The plain ways are written here, since the project has no switch for them. `gain` is the plain way's median over ours
as the scripts have it, less 1. Steps are forward and backward, without optimizer, on the workloads of the speed
benchmarks. What gains under 5 % is not in the project, or is there for memory, exactness or brevity.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import ours
import torch
import torch.nn.functional as F
import worker
import workloads
from torch import Tensor

from minirlhf import ops
from minirlhf.batch import Example, micro_batches, pad
from minirlhf.bradley_terry import bradley_terry_loss
from minirlhf.comparisons import (
    Comparison,
    ReferencedComparison,
    pair_logprobs,
    pair_micro_batches,
    with_reference,
)
from minirlhf.dpo import dpo_loss
from minirlhf.generate import Decoder, sample
from minirlhf.model import GPT
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel, response_scores

BUDGET = 2048  # of a micro-batch, as in the tiny preset
VOCABULARY = 50257  # of sampling
Way = Callable[[], object]


def apart(comparisons: list[Comparison]) -> list[Example]:
    """The responses as rows of their own, each with its prompt."""
    return [example for comparison in comparisons for example in comparison.examples]


def dpo_ways(size: workloads.Size) -> tuple[Way, Way]:
    """A prompt shared by its two responses, against rows apart; both sorted, in micro-batches."""
    policy, comparisons = ours.model(size), ours.comparisons(size)[0]
    known = [ReferencedComparison(c.examples, c.pairs, ref_seq_logprobs=[0.0, 0.0]) for c in comparisons]

    def shared() -> None:
        for part, pairs in pair_micro_batches(known, BUDGET):
            four = pair_logprobs(policy, part, pairs)
            dpo_loss(*four, beta=0.1, denominator=len(known)).backward()

    def rows_apart() -> None:
        lengths = torch.tensor([2 * len(c.prompt_ids) + c.length for c in comparisons])
        for index in micro_batches(lengths, 2 * BUDGET):  # a pair's two rows stay together
            part = [comparisons[i] for i in index]
            batch = pad(apart(part))
            logprobs = policy.logprobs(batch.tokens, batch.mask).sum(dim=1)
            zeros = torch.zeros(len(part))
            dpo_loss(logprobs[::2], logprobs[1::2], zeros, zeros, beta=0.1, denominator=len(known)).backward()

    return shared, rows_apart


def reward_ways(size: workloads.Size) -> tuple[Way, Way]:
    """The same for the reward model."""
    model = RewardModel.from_gpt(ours.model(size), generator=torch.Generator().manual_seed(1))
    comparisons = ours.comparisons(size)[0]

    def shared() -> None:
        for _, pairs in pair_micro_batches(comparisons, BUDGET):
            scores = response_scores(model, pairs)
            chosen, rejected = scores[pairs.chosen], scores[pairs.rejected]
            bradley_terry_loss(chosen, rejected, denominator=len(comparisons)).backward()

    def rows_apart() -> None:
        lengths = torch.tensor([2 * len(c.prompt_ids) + c.length for c in comparisons])
        for index in micro_batches(lengths, 2 * BUDGET):
            batch = pad(apart([comparisons[i] for i in index]))
            scores = model(batch.tokens, batch.lengths)
            bradley_terry_loss(scores[::2], scores[1::2], denominator=len(comparisons)).backward()

    return shared, rows_apart


def head_ways(size: workloads.Size) -> tuple[Way, Way]:
    """The head at response positions alone, against all logits; rows of a PPO minibatch's kind, half response."""
    gpt = ours.model(size)
    rows = workloads.rows(size, size.prompts, size.prompt_length + size.response_length).tolist()
    batch = pad([Example(row[: size.prompt_length], row[size.prompt_length :]) for row in rows])

    def response_only() -> None:
        ops.masked_mean(gpt.logprobs(batch.tokens, batch.mask), batch.mask).backward()

    def all_logits() -> None:
        ops.masked_mean(ops.token_logprobs(gpt(batch.tokens), batch.tokens), batch.mask).backward()

    return response_only, all_logits


def sorting_ways(size: workloads.Size) -> tuple[Way, Way]:
    """Rows of unequal lengths sorted before they are divided, against the order in which they come."""
    gpt, batch = ours.model(size), pad(apart(ours.comparisons(size)[0]))

    def run(parts: list[Tensor]) -> None:
        for index in parts:
            part = batch.rows(index)
            ops.masked_mean(gpt.logprobs(part.tokens, part.mask), part.mask).backward()

    rows = BUDGET // batch.tokens.shape[1]
    return (
        lambda: run(micro_batches(batch.lengths, BUDGET)),
        lambda: run(list(torch.arange(len(batch)).split(rows))),
    )


def entropy_ways(size: workloads.Size) -> tuple[Way, Way]:
    """Scoring without the entropy, which training logs and scoring does not read."""
    gpt, batch = ours.model(size), pad(apart(ours.comparisons(size)[0]))

    def without_gradient(function: Callable[[Tensor, Tensor], Any]) -> Way:
        return torch.no_grad()(lambda: function(batch.tokens, batch.mask))

    return without_gradient(gpt.logprobs), without_gradient(gpt.logprobs_and_entropy)


def reference_ways(size: workloads.Size) -> tuple[Way, Way]:
    """The reference's log-probabilities known from before, as in every epoch but the first, against in each step."""
    shared, _ = dpo_ways(size)
    reference: GPT = copy.deepcopy(ours.model(size)).requires_grad_(False)
    comparisons = ours.comparisons(size)[0]

    def within_the_step() -> None:
        with_reference(reference, comparisons, torch.device("cpu"), max_tokens=BUDGET)
        shared()

    return shared, within_the_step


def sampling_ways(size: workloads.Size) -> tuple[Way, Way]:
    """A token a row by inverse CDF with its log-probability, against torch.multinomial and a log-softmax."""
    logits, uniforms = torch.randn(size.rows, VOCABULARY), torch.rand(size.rows)

    def multinomial() -> Tensor:
        logprobs = F.log_softmax(logits, dim=-1)
        return logprobs.gather(1, torch.multinomial(logprobs.exp(), 1))

    return lambda: sample(logits, uniforms, temperature=1.0), multinomial


def slots_ways(size: workloads.Size) -> tuple[Way, Way]:
    """Waiting prompts take the slots of rows that end, against one block of prompts after the other.

    Lengths of responses spread as in HH dialogues: log-normal, a tenth below 0.3 and a tenth above 3.2 medians.
    """
    gpt, stream, limit = ours.model(size), np.random.default_rng(0), size.context // 2
    prompts = workloads.rows(size, 4 * size.rows, size.prompt_length).tolist()
    lengths = np.exp(stream.normal(np.log(limit / 4), 0.9, len(prompts))).clip(1, limit).astype(int)
    uniforms = torch.from_numpy(stream.uniform(0.01, 1.0, (len(prompts), limit)))
    uniforms[torch.arange(len(prompts)), torch.from_numpy(lengths) - 1] = 0.0  # draws token 0, which is EOS

    @torch.no_grad()
    def decode(rows: range) -> None:
        decoder = Decoder(gpt, [prompts[i] for i in rows], [(i,) for i in rows], limit, 0, 1.0, 0, size.rows)
        decoder.uniforms = F.pad(uniforms[rows.start : rows.stop], (0, 1))
        decoder.run()

    blocks = [range(start, start + size.rows) for start in range(0, len(prompts), size.rows)]
    return lambda: decode(range(len(prompts))), lambda: [decode(rows) for rows in blocks]


def gelu_ways(size: workloads.Size) -> tuple[Way, Way]:
    """tanh-GELU as one kernel, against its formula spelled out; forward and backward."""
    x = torch.randn(BUDGET, 4 * size.width, requires_grad=True)

    def spelled() -> None:
        y = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
        y.sum().backward()

    return lambda: F.gelu(x, approximate="tanh").sum().backward(), spelled


def adamw_ways(size: workloads.Size) -> tuple[Way, Way]:
    """One fused AdamW step, against torch's default."""
    first, second = ours.model(size), ours.model(size)
    plain = torch.optim.AdamW(second.parameters(), lr=ours.LEARNING_RATE)
    for parameter in [*first.parameters(), *second.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    return adamw(first, learning_rate=ours.LEARNING_RATE).step, plain.step


WAYS: dict[str, Callable[[workloads.Size], tuple[Way, Way]]] = {
    "prompt shared, DPO": dpo_ways,
    "prompt shared, reward model": reward_ways,
    "reference log-probs once, DPO": reference_ways,
    "head at response positions": head_ways,
    "length-sorted micro-batches": sorting_ways,
    "no entropy in scoring": entropy_ways,
    "inverse CDF, 32 x 50,257": sampling_ways,
    "waiting prompts in free slots": slots_ways,
    "tanh-GELU as one kernel": gelu_ways,
    "fused AdamW, the optimizer step": adamw_ways,
}


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Both ways of everything in turns, after a warm-up."""
    clock, size = worker.clock_of(given), workloads.SIZES[given.size]
    results = []
    for name, ways in WAYS.items():
        pair, times = ways(size), ([], [])
        for turn in range(given.rounds + 2):
            for way, seconds in zip(pair, times, strict=True):
                start = clock()
                way()
                if turn > 1:
                    seconds.append(clock() - start)
        mine, plain = (1e3 * float(np.median(seconds)) for seconds in times)
        results.append({"name": name, "ours_ms": round(mine, 2), "plain_ms": round(plain, 2)})
        results[-1]["gain"] = round(plain / mine - 1, 3)
        print(json.dumps(results[-1]), flush=True)
    return results


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = worker.machine_parser(__doc__)
    parser.add_argument("--size", choices=list(workloads.SIZES), default="4x128")
    parser.add_argument("--rounds", type=int, default=15, help="times each way is measured")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    return measure(given)


if __name__ == "__main__":
    main()

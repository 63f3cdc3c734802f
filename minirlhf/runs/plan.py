"""`--dry-run`: what a stage would do, and about what it takes. No weights are read and nothing is written.

Of P parameters in training and F frozen ones, all float32, and a micro-batch of T padded tokens in L layers of C
channels, the memory is at most about (docs/using.md counts it)

    16 P + 4 F + (64 or 38) T L C + logits        bytes: weights, gradients and Adam's moments; frozen weights;
                                                  activations in float32 or bfloat16, of one model at a time

and the time, with 2 P' operations a token forward and 4 P' backward (P': without the table of positions),

    1.5 x sum over passes of 2 P' tokens / rate         rate: of matrix products of the model's own shape, measured here

1.5 is for all else: the demo's stages take 1.0 to 2.1 times their matrix products (docs/log.md, 2026-11-21).
Left out: attention's part that grows with the square of a row, padding, checkpoints, and what the allocator adds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minirlhf import distributed
from minirlhf.batch import Example, steps_per_epoch
from minirlhf.comparisons import Comparison
from minirlhf.config import flag
from minirlhf.model import GPT, MAX_LOGITS, GPTConfig
from minirlhf.runtime import autocast, require, resolve_compute

FIRST = {"cuda": 65_536}  # padded tokens with which `auto` begins
FIRST_ELSEWHERE = 4096  # where the memory is the system's own
LEVERS = ("micro_batch_tokens", "batch_size", "rollout_size")


def micro_batch_tokens(config: Any, state: Any) -> int:
    """The number for `--micro-batch-tokens`: of `auto`, what `state.fitted_tokens` says so far."""
    if not is_auto(config):
        return config.micro_batch_tokens
    model = next(value for value in vars(state).values() if isinstance(value, nn.Module))
    return state.fitted_tokens or FIRST.get(next(model.parameters()).device.type, FIRST_ELSEWHERE)


def is_auto(config: Any) -> bool:
    """True where `--micro-batch-tokens` is `auto`."""
    return getattr(config, "micro_batch_tokens", None) == "auto"


def require_number_for_several(config: Any) -> None:
    """Raise UserError where several processes are to find it: the others would wait for one that starts again."""
    alone = distributed.world_size() == 1
    require(alone or not is_auto(config), "--micro-batch-tokens auto: is for one process; give several a number")


def explain_memory(config: Any, tokens: int) -> str:
    """The batch with its micro-batches of `tokens`, the peak of memory, and the flag values to try."""
    sizes = {name: getattr(config, name) for name in LEVERS if hasattr(config, name)} | {"micro_batch_tokens": tokens}
    batch = " ".join(f"{flag(name)} {value}" for name, value in sizes.items())
    smaller = [f"{flag(name)} {value // 2}" for name, value in sizes.items() if value > 1]
    first = [words for words in smaller if words.startswith("--micro-batch-tokens") and not is_auto(config)]
    first += [] if getattr(config, "gradient_checkpointing", True) else ["--gradient-checkpointing"]
    last = [words for words in smaller if not words.startswith("--micro-batch-tokens")]
    free = f"; {' and '.join(words.split()[0] for words in first)} may change with --resume and alter no result"
    return (
        f"out of memory with {batch}; the peak was {peak_bytes() / 2**30:.2f} GiB. Try {', then '.join(first + last)}"
        f"{free if first else ''}"
    )


def peak_bytes() -> int:
    """The most memory that this process has held: on the GPU where there is one, else of the system."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on every system, and needed only here

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


SECONDS = 0.2  # of the measurement
WIDEST = 4096  # rows of its matrices, at most
ALL_ELSE = 1.5  # the time of a stage by that of its matrix products
HALF_COPY = 2  # bytes per parameter of the weights in bfloat16, made anew for each forward pass


@dataclass(frozen=True)
class Plan:
    """Plan of a stage.

    steps        of the whole stage: optimizer steps, or iterations of PPO
    trained      shapes of the models in training, the policy first
    frozen       of those that are only read
    rows         tokens of each row that there is to learn from; of a response to come its length limit
    rows_a_step  that a step learns from, `epochs` times, in `minibatches`
    scored       tokens of forward passes alone over the whole stage, all models together
    group_size   rows that each of `rows` stands for: the responses to a prompt
    note         on what the tokens are counted from
    """

    steps: int
    trained: Sequence[GPTConfig]
    frozen: Sequence[GPTConfig]
    rows: Sequence[int]
    rows_a_step: int
    scored: float
    epochs: int = 1
    minibatches: int = 1
    group_size: int = 1
    note: str = ""

    @property
    def learned(self) -> float:
        """Tokens that go forward and backward through each model in training over the whole stage."""
        steps = steps_per_epoch(len(self.rows), self.rows_a_step // self.group_size)
        return self.steps / steps * self.epochs * self.group_size * sum(self.rows)


def supervised_plan(
    config: Any,
    steps: int,
    shape: GPTConfig,
    train: Sequence[Example | Comparison],
    held_out: Sequence[Example | Comparison],
    *,
    frozen: Sequence[GPTConfig] = (),
    scored: int = 0,
) -> Plan:
    """The plan of a stage that goes through its data in batches and measures what is held out now and then."""
    rows, measured = [row.length for row in train], -(-steps // (config.validation_every or steps))
    scored += measured * sum(row.length for row in held_out)
    return Plan(steps, (shape,), frozen, rows=rows, rows_a_step=config.batch_size, scored=scored)


def sampled_plan(
    config: Any,
    shapes: Sequence[GPTConfig],
    prompts: Sequence[Sequence[int]],
    *,
    responses: int,
    group_size: int,
    valued: bool = False,
) -> Plan:
    """The plan of a stage that samples what it learns from: PPO, online DPO.

    shapes     of the models that are read, the policy's first
    responses  that an iteration samples, `group_size` to each prompt; each is taken for as long as it may be
    valued     whether a value model learns too, which has the shape of the first reward model, or else of the policy
    """
    policy, *reward_models = shapes
    value_models = [*reward_models, policy][:1] if valued else []
    rows = [len(prompt) + config.max_new_tokens for prompt in prompts]
    readers = 2 + len(value_models) + len(reward_models)  # who samples, and the reference
    return Plan(
        config.iterations,
        (policy, *value_models),
        (policy, *reward_models),
        rows=rows,
        rows_a_step=responses,
        scored=readers * config.iterations * responses * sum(rows) / len(rows),
        epochs=config.epochs,
        minibatches=config.minibatches,
        group_size=group_size,
        note="; every response taken for as long as it may be",
    )


def parameters(shape: GPTConfig, *, positions: bool = True) -> int:
    """Parameters of a model of this shape, with or without its table of positions; a scalar head's C are left out."""
    model = GPT(shape, seed=None)  # on the meta device, without memory
    return sum(p.numel() for name, p in model.named_parameters() if positions or name != "wpe.weight")


def micro_batch(plan: Plan, config: Any, device: torch.device) -> int:
    """Padded tokens of the largest micro-batch."""
    first = FIRST.get(device.type, FIRST_ELSEWHERE)
    budget = first if is_auto(config) else config.micro_batch_tokens
    longest = max(plan.rows)
    return max(longest, min(budget, longest * -(-plan.rows_a_step // plan.minibatches)))


def activations(shape: GPTConfig, tokens: int, dtype: torch.dtype, *, checkpointed: bool) -> int:
    """Bytes that autograd keeps of one micro-batch until the backward pass."""
    layer = tokens * shape.n_embd * (38 if dtype == torch.bfloat16 else 64)
    return shape.n_layer * tokens * shape.n_embd * 4 + layer if checkpointed else shape.n_layer * layer


def memory_bytes(plan: Plan, config: Any, device: torch.device, dtype: torch.dtype) -> int:
    """About the most memory that the stage's tensors take; see the formula above."""
    trained, frozen = (sum(map(parameters, shapes)) for shapes in (plan.trained, plan.frozen))
    half = HALF_COPY * (trained + frozen) if dtype == torch.bfloat16 else 0
    tokens, head = micro_batch(plan, config, device), plan.trained[0]
    saved = max(activations(s, tokens, dtype, checkpointed=config.gradient_checkpointing) for s in plan.trained)
    logits = 3 * 4 * min(tokens * head.vocab_size, MAX_LOGITS)  # with their logarithms and the gradient
    return 16 * trained + 4 * frozen + half + saved + logits


def operations(plan: Plan, config: Any) -> float:
    """Floating-point operations of all passes; gradient checkpointing is one more forward pass."""
    passes = 4 if config.gradient_checkpointing else 3
    trained = [parameters(shape, positions=False) for shape in plan.trained]
    return 2 * passes * plan.learned * sum(trained) + 2 * plan.scored * trained[0]


@torch.no_grad()
def matrix_rate(shape: GPTConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the products that a block consists of: (tokens, C) with (C, 4 C)."""
    x = torch.zeros(min(tokens, WIDEST), shape.n_embd, device=device)
    weight = torch.zeros(shape.n_embd, 4 * shape.n_embd, device=device)
    count, spent = 0, 0.0
    with autocast(device, dtype):
        float((x @ weight)[0, 0])  # the first one is slow
        began = time.perf_counter()
        while spent < SECONDS:
            for _ in range(10):
                product = x @ weight
            float(product[0, 0])  # waits for the device
            count, spent = count + 10, time.perf_counter() - began
    return 2 * count * x.shape[0] * weight.numel() / spent


def show_plan(plan: Plan, config: Any) -> None:
    """Print what the stage would do and about what it takes."""
    device, dtype = resolve_compute(config.device, config.dtype)
    tokens = micro_batch(plan, config, device)
    rate = matrix_rate(plan.trained[0], tokens, device, dtype) * distributed.world_size()
    trained, frozen = (sum(map(parameters, shapes)) for shapes in (plan.trained, plan.frozen))
    seconds = tqdm.format_interval(ALL_ELSE * operations(plan, config) / rate)
    gib = memory_bytes(plan, config, device, dtype) / 2**30
    lines = {
        "parameters": f"{trained:,} in training, {frozen:,} frozen",
        "data": f"{len(plan.rows):,} rows of {min(plan.rows):,} to {max(plan.rows):,} tokens, {sum(plan.rows):,} in "
        "all; rows left out or shortened are named above",
        "steps": f"{plan.steps:,} of {plan.rows_a_step:,} rows",
        "tokens": f"about {plan.learned:,.0f} to learn from, {plan.scored:,.0f} to sample or score; at most {tokens:,} "
        f"at a time{plan.note}",
        "memory": f"about {gib:.2f} GiB on {device}, beside Python and torch",
        "time": f"about {seconds} with matrix products at {rate / 1e9:,.0f} GFLOP/s, as measured now",
    }
    print("dry run: nothing is trained and nothing is written")
    for name, words in lines.items():
        print(f"{name:<11} {words}")

"""What may not change a number: micro-batches, padding and what lies in it, the order of the rows.

In float32, gradients of every parameter and every logged metric to 1e-6, for the optimizer steps of all four stages and
for the statistics of a whole PPO rollout. Several processes have tests of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import MODULES, new_run
from torch import Tensor

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf.batch import Batch, Example, pad
from minirlhf.comparisons import Comparison, with_reference
from minirlhf.model import GPT, GPTConfig
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import Rollout
from minirlhf.runs.log import read_rows

CPU = torch.device("cpu")
TOLERANCE = 1e-6
Result = tuple[dict[str, Tensor], dict[str, float]]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(1, 29, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Rows of 3 to 38 tokens.
EXAMPLES = [Example(ids(1 + i % 7, i), [*ids(1 + (5 * i) % 30, 100 + i), 0]) for i in range(24)]
COMPARISONS = [
    Comparison([Example(EXAMPLES[i].prompt_ids, EXAMPLES[(i + k) % 24].response_ids) for k in range(2 + i % 3)], pairs)
    for i in range(12)
    for pairs in [[(a, b) for a in range(2 + i % 3) for b in range(a)]]
]


def new_gpt(seed: int) -> GPT:
    """With weights that matter: at 0.02 all attention is near uniform."""
    gpt = GPT(GPTConfig(vocab_size=29, n_positions=64, n_layer=2, n_head=2, n_embd=16, eos_token_id=0), seed=seed)
    with torch.no_grad():
        for i, parameter in enumerate(gpt.parameters()):
            parameter += 0.1 * numbers(*parameter.shape, seed=seed + 10 * i)
    return gpt


def new_value_model(seed: int) -> ValueModel:
    gpt = new_gpt(seed)
    model = ValueModel.from_reward_model(RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        model.value.weight += 0.1 * numbers(1, 16)
    return model


def watched(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """An optimizer that notes the gradients of its first step and moves nothing."""
    seen: dict[str, Tensor] = {}
    # A constant cancels in every difference of two scores: what the reward model's last bias gets is rounding alone.
    none = "gpt.ln_f.bias" if isinstance(model, RewardModel) else ""

    def note(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if name != none})

    optimizer = adamw(model, learning_rate=0.0)
    optimizer.register_step_pre_hook(note)
    return optimizer, seen


def plain(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------- one step of every stage
def sft(tokens: int, rows: list[int], widen: int) -> Result:
    model = new_gpt(0)
    optimizer, seen = watched(model)
    batch = widened(pad([EXAMPLES[i] for i in rows]), widen)
    state = train_sft.State(model, optimizer)
    return seen, plain(train_sft.train_step(state, batch, train_sft.Config(max_grad_norm=1e9), max_tokens=tokens))


def reward(tokens: int, rows: list[int], widen: int) -> Result:
    model = RewardModel.from_gpt(new_gpt(1), generator=torch.Generator().manual_seed(1))
    optimizer, seen = watched(model)
    config = train_reward.Config(max_grad_norm=1e9)
    state = train_reward.State(model, optimizer)
    comparisons = [COMPARISONS[i] for i in rows if i < 12]
    return seen, plain(train_reward.train_step(state, comparisons, config, CPU, max_tokens=tokens, contrast=1.0))


def dpo(tokens: int, rows: list[int], widen: int) -> Result:
    policy = new_gpt(2)
    optimizer, seen = watched(policy)
    config = train_dpo.Config(beta=0.3, label_smoothing=0.1, max_grad_norm=1e9)
    # The reference's pass is in micro-batches too.
    comparisons = with_reference(new_gpt(3), [COMPARISONS[i] for i in rows if i < 12], CPU, max_tokens=tokens)
    return seen, plain(
        train_dpo.train_step(train_dpo.State(policy, optimizer), comparisons, config, CPU, max_tokens=tokens)
    )


def rollout_of(rows: list[int]) -> Rollout:
    """A rollout with numbers that no model gave, NaN where nothing may read."""
    batch = pad([EXAMPLES[i] for i in rows])
    every = {name: numbers(24, 64, seed=seed) for seed, name in enumerate(("old", "ref", "values"))}
    mask = batch.mask
    part = {name: torch.where(mask, value[rows, : mask.shape[1]], torch.nan) for name, value in every.items()}
    return Rollout(
        batch.tokens,
        batch.prompt_lengths,
        batch.lengths,
        finished=torch.tensor([i % 2 == 0 for i in rows]),
        old_logprobs=part["old"] - 3.0,
        ref_logprobs=part["ref"] - 3.0,
        values=part["values"],
        scores=numbers(24, seed=9)[rows],
        sampling_gap=torch.zeros(len(rows)),
        groups=torch.arange(len(rows)),
    )


def ppo(tokens: int, rows: list[int], widen: int) -> Result:
    """A whole iteration's statistics: rewards, whitening, GAE, then one step with everything that is logged."""
    policy, value_model = new_gpt(4), new_value_model(5)
    policy_optimizer, seen = watched(policy)
    value_optimizer, value_seen = watched(value_model)
    state = train_ppo.State(policy, value_model, policy_optimizer, value_optimizer, None)
    rollout = widened(rollout_of(rows), widen)
    experience = tiny.learn_from(rollout, beta=0.1, gamma=0.99, lam=0.9, whiten_rewards=True)
    config = train_ppo.Config(epochs=1, minibatches=1, clip=0.2, max_grad_norm=1e9)
    metrics = tiny.update(state, experience, config, max_tokens=tokens)
    return {**seen, **{f"value.{name}": g for name, g in value_seen.items()}}, plain(metrics)


def widened(batch: Batch, columns: int) -> Batch:
    """The batch with more columns: any token ids, and NaN in what is known of tokens."""
    if not columns:
        return batch
    result, width = copy.copy(batch), batch.tokens.shape[1]
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value.ndim == 2:
            more = torch.full((len(value), columns), 7 if field.name == "tokens" else torch.nan, dtype=value.dtype)
            setattr(result, field.name, torch.cat([value, more], dim=1))
    beyond = torch.arange(width + columns) >= batch.lengths[:, None]
    result.tokens = torch.where(beyond, 13, result.tokens)
    return result


STEPS: dict[str, Callable[[int, list[int], int], Result]] = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo}
ROWS = list(range(24))
SHUFFLED = [(7 * i + 5) % 24 for i in ROWS]
# (micro-batch in tokens, order of the rows, columns of padding more), to be compared with (100,000, in order, 0)
CHANGES = {
    "one row at a time": (1, ROWS, 0),
    "a few rows": (90, ROWS, 0),
    "other order": (100_000, SHUFFLED, 0),
    "wider padding": (100_000, ROWS, 20),
    "all at once": (130, SHUFFLED, 13),
}


def gradients_apart(one: Result, other: Result) -> dict[str, float]:
    """Relative difference of each gradient, by its norm, and of all together under "all"."""
    assert one[0].keys() == other[0].keys() and one[0]
    squares = {name: (g.square().sum(), (g - other[0][name]).square().sum()) for name, g in one[0].items()}
    squares["all"] = tuple(map(sum, zip(*squares.values(), strict=True)))
    return {name: (difference / size.clamp(min=1e-30)).sqrt().item() for name, (size, difference) in squares.items()}


def metrics_apart(one: Result, other: Result) -> dict[str, float]:
    """Relative difference of each metric; below 1, where some are differences that cancel, the difference itself."""
    assert one[1].keys() == other[1].keys()
    return {name: abs(value - other[1][name]) / max(1.0, abs(value)) for name, value in one[1].items()}


@pytest.fixture(scope="module")
def plainly() -> Callable[[str], Result]:
    known: dict[str, Result] = {}
    return lambda stage: known.get(stage) or known.setdefault(stage, STEPS[stage](100_000, ROWS, 0))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stage", STEPS)
def test_gradients_and_metrics_are_the_same_to_1e_6_in_float32(stage: str, change: str, plainly: Callable) -> None:
    one, other = plainly(stage), STEPS[stage](*CHANGES[change])
    gradients, metrics = gradients_apart(one, other), metrics_apart(one, other)
    assert gradients.pop("all") <= TOLERANCE
    # In a single bias the rows nearly cancel, so its rounding is larger beside it; a wrong mask or weight is 1e-2.
    assert max(gradients.values()) <= 5 * TOLERANCE, max(gradients, key=gradients.get)
    assert max(metrics.values()) <= TOLERANCE, max(metrics, key=metrics.get)


@pytest.mark.parametrize("stage", STEPS)
def test_the_gradients_are_there_to_be_compared(stage: str, plainly: Callable) -> None:
    """No parameter has a gradient of 0, and another batch has other gradients: the test above could fail."""
    gradients, metrics = plainly(stage)
    assert all(g.norm() > 0 for g in gradients.values()) and all(torch.isfinite(g).all() for g in gradients.values())
    apart = gradients_apart((gradients, metrics), STEPS[stage](100_000, ROWS[:-13], 0))
    assert min(apart.values()) > 1000 * TOLERANCE


# ------------------------------------------------------------------------------------------------------------ bfloat16
@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_on_a_cpu_is_finite_and_close_to_float32(name: str, tmp_path: Path) -> None:
    """bfloat16 has 8 bits, a relative 0.4 %: the metrics before the first update are within 3 % (of at least 1)."""
    rows = {}
    for dtype in ("float32", "bfloat16"):
        run = new_run(name, tmp_path / dtype)
        changes = {"iterations": 2, "epochs": 1, "minibatches": 1} if name == "ppo" else {"epochs": 1.0}
        settings = replace(tiny.STAGES[name][1](run), dtype=dtype, **changes)
        tiny.STAGES[name][0](settings)
        rows[dtype] = read_rows(run / name)
        model = (RewardModel if name == "reward" else GPT).from_pretrained(run / name / "model")
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
    first = {dtype: rows[dtype][0] for dtype in rows}
    compared = {"sft": ["loss"], "reward": ["loss"], "ppo": ["entropy", "ratio"], "dpo": ["loss", "logprob_chosen"]}
    for metric in compared[name]:  # the others depend on which tokens were sampled, or on ties
        assert first["bfloat16"][metric] == pytest.approx(first["float32"][metric], rel=0.03, abs=0.03)
    assert any(first["bfloat16"][metric] != first["float32"][metric] for metric in compared[name])
    assert len(rows["float32"]) == len(rows["bfloat16"])

"""What the speed benchmarks count as work, and that no stage makes a tensor of all logits."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ours
import speed_ppo
import workloads

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import kv_cache, model, reward_functions, rollout
from minirlhf.batch import Example, pad
from minirlhf.comparisons import pad_comparisons, with_reference
from minirlhf.generate import generate
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel, ValueModel

CPU = torch.device("cpu")
SMOKE = workloads.SIZES["smoke"]
EQUAL = replace(SMOKE, shortest=5, longest=5, batches=1)  # pairs of one length: nothing is padding


# ------------------------------------------------------------------------------------------------------- the workloads
def test_pairs_have_lengths_within_the_bounds_and_end_with_eos() -> None:
    size = workloads.SIZES["4x128"]
    pairs = [pair for batch in workloads.pair_batches(size) for pair in batch]
    lengths = [len(ids) for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected)]
    assert (min(lengths), max(lengths), len(pairs)) == (16, 64, 24 * 16)
    for pair in pairs:
        assert pair.chosen[-1] == pair.rejected[-1] == workloads.EOS
        assert min(pair.prompt + pair.chosen[:-1] + pair.rejected[:-1]) >= workloads.FIRST
    assert workloads.pair_batches(size)[3] == workloads.pair_batches(size)[3]


def test_batches_have_the_shapes_of_the_size() -> None:
    size = workloads.SIZES["4x128"]
    assert workloads.sft_batches(size).shape == (24, 16, 128)
    assert workloads.prompt_batches(size).shape == (24, 32, 32)
    assert workloads.generation_prompts(size).shape == (32, 32)
    assert workloads.size_of("124M", "cpu").sft_rows == 4 and workloads.size_of("124M", "cuda").rows == 256


@pytest.mark.parametrize("name", ["4x128", "smoke"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    size = workloads.SIZES[name]
    assert workloads.parameters(size) == sum(p.numel() for p in ours.model(size).parameters())


# ----------------------------------------------------------------------------------------------------------- the FLOPs
def counted(function: Callable[[], object]) -> int:
    """FLOPs of all matrix products, by torch; attention counts every key, read or masked."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def row_flops(tokens: int, positions: int) -> float:
    """A forward over a row whose every query is multiplied with every key, and the head at some positions."""
    return workloads.trunk_flops(EQUAL, tokens, tokens**2) + workloads.head_flops(EQUAL, positions)


def test_keys_that_are_attended_are_those_that_the_mask_shows() -> None:
    for comparison in ours.comparisons(SMOKE)[0]:
        batch = pad_comparisons([comparison])
        responses = [len(e.response_ids) for e in comparison.examples]
        assert workloads.attended(len(comparison.prompt_ids), responses) == batch.visible.sum()


def test_flops_of_an_sft_step() -> None:
    size = EQUAL
    gpt = ours.model(size)
    batch = pad([Example(row[:1], row[1:]) for row in workloads.sft_batches(size)[0].tolist()])
    state, config = train_sft.State(gpt, adamw(gpt, learning_rate=0.0)), train_sft.Config(micro_batch_tokens=1000)
    flops = counted(lambda: train_sft.train_step(state, batch, config, max_tokens=1000))
    n = size.sft_length - 1
    assert flops == 3 * size.sft_rows * row_flops(n, n)
    masked = 3 * size.sft_rows * size.layers * 4 * size.width * (n**2 - workloads.attended(n, []))
    assert workloads.useful_flops("sft", size) == flops - masked


def test_flops_of_a_reward_step() -> None:
    reward = RewardModel.from_gpt(ours.model(EQUAL), generator=torch.Generator().manual_seed(0))
    state = train_reward.State(reward, adamw(reward, learning_rate=0.0))
    config = train_reward.Config(micro_batch_tokens=1000)
    flops = counted(lambda: train_reward.train_step(state, ours.comparisons(EQUAL)[0], config, CPU, max_tokens=1000))
    score_head = 2 * EQUAL.width * 2  # of two responses
    assert flops == 3 * EQUAL.pairs * (row_flops(15, 0) + score_head)
    masked = 3 * EQUAL.pairs * EQUAL.layers * 4 * EQUAL.width * (15**2 - workloads.attended(5, [5, 5]))
    assert workloads.useful_flops("reward", EQUAL) == flops - masked - 3 * EQUAL.pairs * score_head


def test_flops_of_a_dpo_step() -> None:
    gpt = ours.model(EQUAL)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    state = train_dpo.State(gpt, adamw(gpt, learning_rate=0.0))

    def step() -> None:
        known = with_reference(reference, ours.comparisons(EQUAL)[0], CPU, max_tokens=1000)
        train_dpo.train_step(state, known, train_dpo.Config(), CPU, max_tokens=1000)

    flops = counted(step)
    assert flops == 4 * EQUAL.pairs * row_flops(15, 10)  # the head reads no position of the prompt but its last
    read = workloads.trunk_flops(EQUAL, 13, workloads.attended(5, [4, 4])) + workloads.head_flops(EQUAL, 10)
    assert workloads.useful_flops("dpo", EQUAL) == 4 * EQUAL.pairs * read


def test_flops_of_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "BLOCK", {"cpu": 1})  # no columns beyond those in use
    size = SMOKE
    prompts = workloads.generation_prompts(size).tolist()
    flops = counted(lambda: generate(ours.model(size), prompts, max_new_tokens=size.new_tokens, eos_id=None))
    p = size.prompt_length
    masked = size.rows * size.layers * 4 * size.width * (p**2 - workloads.attended(p, []))
    assert workloads.useful_flops("generate", size) == flops - masked


def test_flops_of_a_ppo_update_are_those_of_its_parts() -> None:
    size = replace(SMOKE, epochs=3)
    inputs, length = size.prompt_length + size.response_length - 1, size.prompt_length + size.response_length
    head = workloads.head_flops(size, size.response_length)
    trunk = workloads.trunk_flops(size, inputs, workloads.attended(inputs, []))
    reward = workloads.trunk_flops(size, length, workloads.attended(length, []))
    forwards = 2 * head + 3 * trunk + reward  # sampling and reference with a head, value model, reward model
    assert workloads.useful_flops("ppo", size) == pytest.approx(
        size.prompts * (forwards + 3 * 3 * (head + 2 * trunk)), rel=1e-12
    )


# ------------------------------------------------------------------------------------- no tensor of (B, T, V) anywhere
VOCABULARY = 1009  # a number that no other dimension has
ROWS = 7  # of one chunk of logits


class Watch(TorchDispatchMode):
    """The most rows over the vocabulary, and the most elements, of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
                # The gradient of the embedding, transposed, is as wide and as it has to be.
                over_vocabulary = leaf.shape[-1:] == (VOCABULARY,) and leaf.shape != (WIDE.width, VOCABULARY)
                self.rows = max(self.rows, leaf.numel() // VOCABULARY if over_vocabulary else 0)
        return result


WIDE = replace(SMOKE, vocabulary=VOCABULARY)


def sft_stage() -> Callable[[], object]:
    gpt = ours.model(WIDE)
    batch = pad([Example(row[:1], row[1:]) for row in workloads.sft_batches(WIDE)[0].tolist()])
    state, config = train_sft.State(gpt, adamw(gpt, learning_rate=0.0)), train_sft.Config(micro_batch_tokens=1000)

    def run() -> None:
        train_sft.train_step(state, batch, config, max_tokens=1000)
        examples = [Example(ids[:2], ids[2:]) for ids in batch.tokens.tolist()]
        train_sft.held_out(gpt, examples, CPU, max_tokens=1000)

    return run


def reward_stage() -> Callable[[], object]:
    reward = RewardModel.from_gpt(ours.model(WIDE), generator=torch.Generator().manual_seed(0))
    state = train_reward.State(reward, adamw(reward, learning_rate=0.0))
    batch, config = ours.comparisons(WIDE)[0], train_reward.Config(micro_batch_tokens=1000)

    def run() -> None:
        train_reward.train_step(state, batch, config, CPU, max_tokens=1000)
        train_reward.held_out(reward, batch, CPU, max_tokens=1000)

    return run


def dpo_stage() -> Callable[[], object]:
    gpt = ours.model(WIDE)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    state, config = train_dpo.State(gpt, adamw(gpt, learning_rate=0.0)), train_dpo.Config(micro_batch_tokens=1000)

    def run() -> None:
        known = with_reference(reference, ours.comparisons(WIDE)[0], CPU, max_tokens=1000)
        train_dpo.train_step(state, known, config, CPU, max_tokens=1000)
        train_dpo.held_out(gpt, known, config, CPU, max_tokens=1000)

    return run


def ppo_stage() -> Callable[[], object]:
    models = speed_ppo.models(WIDE, CPU)
    reward = reward_functions.reward_function(models.pop("reward_model"))
    config = replace(speed_ppo.settings(WIDE, "cpu"), minibatches=1, micro_batch_tokens=1000)
    trained: tuple[model.GPT, ValueModel] = (models["policy"], models["value_model"])
    state = train_ppo.State(*trained, *[adamw(m, learning_rate=0.0) for m in trained], None)
    prompts = workloads.prompt_batches(WIDE)[0].tolist()

    def run() -> None:
        settings = {"seed": 0, "eos_id": None, "max_new_tokens": 4, "temperature": 1.0, "missing_eos_score": None}
        keys = [(i,) for i in range(len(prompts))]
        collected = rollout.collect(
            **models, reward=reward, prompts=prompts, keys=keys, rescore=True, max_tokens=1000, **settings
        )
        speed_ppo.update(state, collected, config)

    return run


@pytest.mark.parametrize("stage", [sft_stage, reward_stage, dpo_stage, ppo_stage])
def test_no_stage_makes_a_tensor_of_all_logits(stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "MAX_LOGITS", ROWS * VOCABULARY)
    run = stage()
    with Watch() as watch:
        run()
    assert watch.rows <= ROWS  # neither (B, T, V) nor (M, V) of all positions that a loss reads
    assert watch.elements <= VOCABULARY * WIDE.width  # the embedding; B T V would be more for each of the stages
    assert min(WIDE.sft_rows * WIDE.sft_length, 2 * 9, WIDE.prompts * 8) > WIDE.width

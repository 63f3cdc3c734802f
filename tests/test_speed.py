"""What the speed benchmarks count and compare; that no stage makes a tensor of all logits. No test asserts a time."""

from __future__ import annotations

import argparse
import ast
import copy
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
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
import padding
import speed
import speed_all
import speed_dpo
import speed_generate
import speed_ppo
import speed_reward
import speed_scaling
import speed_sft
import worker
import workloads

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data, model, rollout
from minirlhf.generate import generate
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel, ValueModel

BENCHMARKS = Path(speed.__file__).parent
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
        batch = data.pad_comparisons([comparison])
        responses = [len(e.response_ids) for e in comparison.examples]
        assert workloads.attended(len(comparison.prompt_ids), responses) == batch.visible.sum()


def test_flops_of_an_sft_step() -> None:
    size = EQUAL
    gpt = ours.model(size)
    batch = data.pad([data.Example(row[:1], row[1:]) for row in workloads.sft_batches(size)[0].tolist()])
    state = train_sft.State(gpt, adamw(gpt, learning_rate=0.0))
    flops = counted(lambda: train_sft.train_step(state, batch, micro_batch_tokens=1000, max_grad_norm=1.0))
    n = size.sft_length - 1
    assert flops == 3 * size.sft_rows * row_flops(n, n)
    masked = 3 * size.sft_rows * size.layers * 4 * size.width * (n**2 - workloads.attended(n, []))
    assert workloads.useful_flops("sft", size) == flops - masked


def test_flops_of_a_reward_step() -> None:
    reward = RewardModel.from_gpt(ours.model(EQUAL), generator=torch.Generator().manual_seed(0))
    state = train_reward.State(reward, adamw(reward, learning_rate=0.0))
    step = {"device": CPU, "micro_batch_tokens": 1000, "max_grad_norm": 1.0}
    flops = counted(lambda: train_reward.train_step(state, ours.comparisons(EQUAL)[0], **step))
    score_head = 2 * EQUAL.width * 2  # of two responses
    assert flops == 3 * EQUAL.pairs * (row_flops(15, 0) + score_head)
    masked = 3 * EQUAL.pairs * EQUAL.layers * 4 * EQUAL.width * (15**2 - workloads.attended(5, [5, 5]))
    assert workloads.useful_flops("reward", EQUAL) == flops - masked - 3 * EQUAL.pairs * score_head


def test_flops_of_a_dpo_step() -> None:
    gpt = ours.model(EQUAL)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    state = train_dpo.State(gpt, adamw(gpt, learning_rate=0.0))

    def step() -> None:
        known = train_dpo.with_reference(reference, ours.comparisons(EQUAL)[0], CPU, max_tokens=1000)
        train_dpo.train_step(state, known, train_dpo.Config(micro_batch_tokens=1000), CPU)

    flops = counted(step)
    assert flops == 4 * EQUAL.pairs * row_flops(15, 10)  # the head reads no position of the prompt but its last
    read = workloads.trunk_flops(EQUAL, 13, workloads.attended(5, [4, 4])) + workloads.head_flops(EQUAL, 10)
    assert workloads.useful_flops("dpo", EQUAL) == 4 * EQUAL.pairs * read


def test_flops_of_generation() -> None:
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
    batch = data.pad([data.Example(row[:1], row[1:]) for row in workloads.sft_batches(WIDE)[0].tolist()])
    state = train_sft.State(gpt, adamw(gpt, learning_rate=0.0))

    def run() -> None:
        train_sft.train_step(state, batch, micro_batch_tokens=1000, max_grad_norm=1.0)
        examples = [data.Example(ids[:2], ids[2:]) for ids in batch.tokens.tolist()]
        train_sft.held_out(gpt, examples, CPU, max_tokens=1000)

    return run


def reward_stage() -> Callable[[], object]:
    reward = RewardModel.from_gpt(ours.model(WIDE), generator=torch.Generator().manual_seed(0))
    state = train_reward.State(reward, adamw(reward, learning_rate=0.0))
    batch = ours.comparisons(WIDE)[0]

    def run() -> None:
        train_reward.train_step(state, batch, device=CPU, micro_batch_tokens=1000, max_grad_norm=1.0)
        train_reward.held_out(reward, batch, CPU, max_tokens=1000)

    return run


def dpo_stage() -> Callable[[], object]:
    gpt = ours.model(WIDE)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    state, config = train_dpo.State(gpt, adamw(gpt, learning_rate=0.0)), train_dpo.Config(micro_batch_tokens=1000)

    def run() -> None:
        known = train_dpo.with_reference(reference, ours.comparisons(WIDE)[0], CPU, max_tokens=1000)
        train_dpo.train_step(state, known, config, CPU)
        train_dpo.held_out(gpt, known, config, CPU)

    return run


def ppo_stage() -> Callable[[], object]:
    models = speed_ppo.models(WIDE, CPU)
    reward = train_ppo.reward_function(models.pop("reward_model"))
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
        experience = train_ppo.learn_from(collected, beta=0.1, gamma=1.0, lam=0.95, whiten_rewards=False)
        train_ppo.update(state, experience, config)

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


# ------------------------------------------------------------------------------------------------------------- running
class Here:
    """A channel to nobody: a worker's step runs in the test's own process."""

    def __init__(self) -> None:
        self.state = -1
        self.now = iter(range(10**6)).__next__

    def ready(self, state: int) -> None:
        self.state = state


def settings(**more: Any) -> argparse.Namespace:
    known = {"size": "smoke", "dtype": "float32", "device": "cpu", "threads": 1, "clock": "cpu", "peer": None}
    return argparse.Namespace(**known | {"rounds": 4, "seconds": 60.0} | more)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PPO benchmark puts a clock into `rollout.sample`; take it out again."""
    monkeypatch.setattr(rollout, "sample", rollout.sample)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("script", "models"), [(speed_sft, 1), (speed_reward, 1), (speed_dpo, 1), (speed_ppo, 2), (speed_generate, 0)]
)
def test_each_stage_makes_steps(script: Any, models: int, dtype: str, untouched: None) -> None:
    channel = Here()
    step = script.prepare(settings(dtype=dtype), channel)
    parts = [step(number) for number in range(3)]  # one more than there are batches
    weights = 4 * workloads.parameters(SMOKE)
    assert channel.state == pytest.approx(3 * models * weights, rel=0.01)  # gradients and two moments, and small heads
    assert all(seconds > 0 for part in parts if part for seconds in part.values())


FAKE = """
import json, sys
print(json.dumps({"ready": True, "trl": "1.0"}), flush=True)
log = open(sys.argv[1], "a")
seconds = float(sys.argv[2])
for line in sys.stdin:
    for _ in range(int(line)):
        log.write(sys.argv[3]); log.flush()
        if seconds < 0: raise RuntimeError("no more memory here")
        print(json.dumps({"seconds": seconds, "scoring_s": seconds / 2, "wall": 1.0, "others": 0.25,
                          "peak_mib": 90, "above_floor_mib": 10 * seconds}), flush=True)
"""


def fake_sides(monkeypatch: pytest.MonkeyPatch, log: Path, **seconds: float) -> None:
    sides = {name: [sys.executable, "-c", FAKE, str(log), str(value), name[0]] for name, value in seconds.items()}
    monkeypatch.setattr(speed, "commands", lambda stage, given: sides)


def test_sides_take_turns_and_their_medians_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sides(monkeypatch, tmp_path / "log", ours=2.0, trl=6.0)
    results = speed.compare("dpo", settings(), {"float32": 50.0})
    assert (tmp_path / "log").read_text() == "ot" + 4 * "ot"  # a warm-up each, then turns
    mine, peer = results
    assert (mine["median_s"], peer["median_s"], mine["n"], mine["parts"]) == (2.0, 6.0, 4, {"scoring_s": 1.0})
    assert (mine["rate"], mine["unit"], mine["others"]) == (SMOKE.pairs / 2.0, "pairs/s", 0.25)
    page = "\n".join(speed_all.against_peers([r | {"size": "4x128"} for r in results]))
    assert "| 3.00 | 4.0 | missed by 25% | 0.33 | 0.4 | met |" in page


def test_a_worker_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sides(monkeypatch, tmp_path / "log", ours=-1.0)
    with pytest.raises(SystemExit, match="(?s)ours: the worker ended.*no more memory here"):
        speed.compare("sft", settings(), {"float32": 50.0})


def test_the_table_of_a_real_worker(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    choice = ["--size", "smoke", "--stages", "generate", "--rounds", "3", "--matrix", "64", "--threads", "1"]
    results = speed_all.main([*choice, "--out", str(tmp_path)])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| generate | smoke"))
    assert "| 3 |" in row and "tokens/s" in row
    written = json.loads(next(tmp_path.glob("*-speed.json")).read_text())
    assert written["results"] == results and written["torch"] == torch.__version__


def test_a_worker_answers_step_by_step(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    stdout = os.dup(1)
    channel = worker.Channel(settings())
    os.system("echo a library says hello")
    channel.ready(2**20, trl="1.0")
    for _ in range(2):
        channel.wait()
        torch.ones(2**24).sum()
        channel.done(scoring_s=3.0)
    channel.answers.close()
    os.dup2(stdout, 1)
    out, error = capfd.readouterr()
    ready, *steps = map(json.loads, out.splitlines())
    assert ready["trl"] == "1.0" and "hello" in error  # what a library prints is no answer
    assert [step["scoring_s"] for step in steps] == [3.0, 3.0]
    assert all(0 < step["above_floor_mib"] < 70 for step in steps)  # 64 of the ones, 1 of them expected


def test_the_bound_of_decoding_reads_weights_and_cache_once_a_token() -> None:
    size = replace(SMOKE, rows=2, prompt_length=3, new_tokens=2)
    cache = 2 * 1 * 16 * 4 * 2  # keys and values, 1 layer of 16 channels, float32, 2 rows: bytes a position
    expected = 2 * 4 * workloads.parameters(size) + cache * (3 + 4)
    assert speed_all.decode_bound(size, 1e-9, "float32") == expected  # at one byte a second


def test_live_bytes_counts_what_is_alive_at_once() -> None:
    with speed_scaling.LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        a = b.view(10, 100)  # no storage of its own
        c = torch.zeros(1500)
    assert live.peak == 4 * 2500 and live.now == 4 * 2500
    del a, b, c
    assert live.now == 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaling benchmark at a size that takes no time, with logits in chunks as at the true one."""
    monkeypatch.setattr(speed_scaling, "SHAPE", workloads.Size(1, 2, 16, 64, 1024))
    monkeypatch.setattr(speed_scaling, "SCORED", replace(speed_scaling.SCORED, vocabulary=2048))
    monkeypatch.setattr(model, "MAX_LOGITS", 64 * 2048)


def test_memory_of_scoring_stops_growing_with_length(small: None) -> None:
    short, long = speed_scaling.scoring(64), speed_scaling.scoring(128)
    assert long.all_logits_mib == 2 * short.all_logits_mib
    assert long.mib < 1.1 * short.mib and long.mib < long.all_logits_mib  # hidden states alone grow


def test_the_scaling_plot_is_drawn(small: None, tmp_path: Path) -> None:
    series = speed_scaling.main(["--rounds", "1", "--points", "2", "--threads", "1", "--out", str(tmp_path)])
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png"}
    assert all(points[0].seconds > 0 for name, points in series.items() if name != "scoring")


def test_padding_is_what_the_longest_row_of_a_micro_batch_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "micro_batches", lambda lengths, budget: [torch.arange(len(lengths))])

    def example(prompt: int, response: int) -> data.Example:
        return data.Example([5] * prompt, [6] * response)

    lengths = [(1, 9), (2, 3)] * 16  # 32 rows, the batch of the small preset: 16 of 10 tokens and 16 of 5
    texts = {
        "demonstrations": [example(*n) for n in lengths],
        "comparisons": [data.Comparison([example(4, 2), example(4, 6)], [(0, 1)]) for _ in range(32)],
    }
    result = padding.measure("sft", "tiny", texts)
    assert (result["padding"], result["micro_batches_a_step"]) == (0.25, 1.0)  # 80 of 320 positions
    assert padding.measure("dpo", "tiny", texts)["apart"] == round(16 / 12, 2)  # a prompt of 4 twice, not once


def test_padding_of_real_dialogues(real_data: Path) -> None:
    results = padding.main(["--limit", "70"])
    assert len(results) == 8 and all(0 <= r["padding"] < 1 for r in results)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_peers_need_nothing_of_this_project() -> None:
    peers = [*(BENCHMARKS / "peers").glob("*.py"), BENCHMARKS / "workloads.py", BENCHMARKS / "worker.py"]
    assert len(peers) == 8
    for path in peers:
        assert not [name for name in imports(path) if name.split(".")[0] in ("minirlhf", "ours") or "train_" in name]

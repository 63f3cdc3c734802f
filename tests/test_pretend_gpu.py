"""Everything runs on a GPU, pretended by pretend_gpu.py, and gives the CPU's numbers bit for bit.

What decodes reads prompts and cached keys in passes of other shapes on a GPU, and the last digits depend on the shape.
So the CPU, too, takes a GPU's shapes here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_gpu import Graph, pretend_gpu
from safetensors.torch import load_file, save_file
from tiny import ENCODING, EOS, LONGEST, PROMPTS, SEED, copy_of, equal, finished_run, run_stage, spy
from torch import Tensor, nn

from minirlhf import evaluate, kv_cache
from minirlhf import generate as decoding
from minirlhf.batch import Batch, local_micro_batches
from minirlhf.encode import encode_prompt
from minirlhf.evaluate import calibration
from minirlhf.feedback import collect as candidates
from minirlhf.feedback import machine as labelling
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import collect

DEVICES = ("cpu", "cuda")
EARLIER = {"sft": (), "reward": ("sft", "feedback"), "ppo": ("sft", "reward"), "dpo": ("sft", "feedback")}
SHORT: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 1.0, "validation_every": 2},
    "reward": {"epochs": 1.0, "validation_every": 1, "patience": 2, "gradient_checkpointing": True},
    "ppo": {"iterations": 2, "epochs": 1, "checkpoint_every": 1},
    "dpo": {"epochs": 1.0, "validation_every": 2},
}


@pytest.fixture(autouse=True)
def shapes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (decoding.COMPACT_BELOW, decoding.CHECK_EVERY, decoding.PREFILL_POSITIONS, kv_cache.BLOCK):
        monkeypatch.setitem(table, "cpu", table["cuda"])


def machine(kind: str) -> contextlib.AbstractContextManager:
    """What `--device kind` needs."""
    return contextlib.nullcontext() if kind == "cpu" else pretend_gpu(kind)


def on_both(function: Callable[[str], Any]) -> list[Any]:
    """What the function returns for the CPU and for the GPU."""
    found = []
    for device in DEVICES:
        with machine(device):
            found.append(function(device))
    return found


def on_host(batch: Batch) -> dict[str, Tensor]:
    return vars(batch.to(torch.device("cpu")))


def prompts() -> list[list[int]]:
    return [encode_prompt(ENCODING, prompt) for prompt in PROMPTS]


# ------------------------------------------------------------------------------------------------------- the product
@pytest.mark.parametrize("stage", EARLIER)
def test_a_stage_learns_on_a_gpu_what_it_learns_on_the_cpu(stage: str, tmp_path: Path) -> None:
    def learned(device: str) -> tuple[dict[str, Tensor], str]:
        run = copy_of(finished_run(), tmp_path / device, *EARLIER[stage])
        run_stage(stage, run, device=device, dtype="float32", **SHORT[stage])
        weights = load_file(run / stage / "model" / "model.safetensors")
        return weights, (run / stage / "metrics.jsonl").read_text(encoding="utf-8")

    (weights, metrics), (gpu_weights, gpu_metrics) = on_both(learned)
    assert equal(gpu_weights, weights)
    assert gpu_metrics == metrics and metrics.count("\n") > 1


def test_a_rollout_on_a_gpu_is_that_of_the_cpu() -> None:
    def rollout(device: str) -> dict[str, Tensor]:
        policy = GPT.from_pretrained(finished_run() / "ppo" / "model").to(device)
        reference = GPT.from_pretrained(finished_run() / "sft" / "model").to(device)
        reward_model = RewardModel.from_pretrained(finished_run() / "reward" / "model").to(device)
        return on_host(
            collect(
                policy,
                reference,
                ValueModel.from_reward_model(reward_model),
                lambda batch: reward_model(batch.tokens, batch.lengths),
                prompts(),
                keys=[(row,) for row in range(len(PROMPTS))],
                seed=SEED,
                eos_id=EOS,
                max_new_tokens=LONGEST,
                temperature=0.8,
                missing_eos_score=-1.5,
                rescore=True,
                max_tokens=64,
                groups=[row // 2 for row in range(len(PROMPTS))],
            )
        )

    cpu, gpu = on_both(rollout)
    assert equal(gpu, cpu)


def test_an_evaluation_on_a_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    def summary(device: str) -> dict[str, Any]:
        run = copy_of(finished_run(), tmp_path / device, "sft", "reward", "ppo", "dpo")
        options = {"max_prompts": 6, "best_of": (2,), "max_new_tokens": LONGEST, "seed": SEED}
        return evaluate.main(evaluate.Config(run=run, device=device, **options))

    cpu, gpu = on_both(summary)
    assert gpu == cpu
    assert len(cpu["models"]) == 4


@pytest.mark.parametrize("slots", [3, None])
@pytest.mark.parametrize("eos_id", [EOS, None])
def test_decoding_by_captured_steps_samples_what_the_cpu_samples(
    slots: int | None, eos_id: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays, compacted = spy(monkeypatch, Graph, "replay"), spy(monkeypatch, decoding.Decoder, "compact")
    for device in DEVICES:
        monkeypatch.setitem(decoding.CHECK_EVERY, device, 4)

    def samples(device: str) -> dict[str, Tensor]:
        model = GPT.from_pretrained(finished_run() / "sft" / "model").to(device)
        return on_host(generate(model, prompts(), max_new_tokens=20, eos_id=eos_id, seed=SEED, slots=slots))

    cpu, gpu = on_both(samples)
    assert equal(gpu, cpu)
    assert len(replays) > 5
    assert compacted or eos_id is None or slots  # three slots may all end between two looks


def test_the_rows_of_micro_batches_are_chosen_on_the_host_which_waits_once() -> None:
    lengths = [5, 3, 9, 2, 7, 4]
    with pretend_gpu() as gpu:
        parts = local_micro_batches(torch.tensor(lengths, device="cuda"), 12)
        assert sum(gpu.syncs.values()) == 1
        assert len(parts) > 1 and all(part.is_cuda for part in parts)
        on_the_gpu = [part.tolist() for part in parts]
    assert on_the_gpu == [part.tolist() for part in local_micro_batches(torch.tensor(lengths), 12)]


def test_no_command_asks_an_apple_gpu_for_float64(tmp_path: Path) -> None:
    run = copy_of(finished_run(), tmp_path / "run", "sft", "feedback", "reward")
    with pretend_gpu("mps"):
        calibration.main(calibration.Config(run=run, device="mps"))
        asked = {"prompts": str(run / "prompts.jsonl"), "max_prompts": 3, "candidates": 2, "max_new_tokens": LONGEST}
        candidates.main(candidates.Config(run=run, device="mps", **asked))
        labelling.judge_model(labelling.ByJudge(run=run, device="mps", model=str(run / "sft" / "model")))


# --------------------------------------------------------------------------------------------- the pretended GPU itself
MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {  # x (2, 3) on the GPU, y (2, 3) on the CPU
    "a sum": lambda x, y: x + y,
    "a product": lambda x, y: x @ y.T,
    "a choice": lambda x, y: torch.where(y > 0, x, x),
    "a stack": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "rows of an embedding": lambda x, y: nn.functional.embedding(torch.tensor([1]), x),
    "a number changed in place": lambda x, y: y.sum().add_(x.sum()),
    "values put at an index": lambda x, y: x.index_put_((torch.tensor([0]),), y[:1]),
    "values put into the CPU's": lambda x, y: y.index_put_((torch.tensor([0]),), x[:1]),
    "an assigned tensor": lambda x, y: x.masked_fill_(y > 0, 0.0),
}


@pytest.mark.parametrize("mixture", MIXED)
def test_a_mixture_of_devices_is_refused(mixture: str) -> None:
    with pretend_gpu(), pytest.raises(RuntimeError, match="same device"):
        MIXED[mixture](torch.ones(2, 3, device="cuda"), torch.ones(2, 3))


@pytest.mark.parametrize("index", [[1, 0], [True, False]])
def test_a_gpu_index_into_a_cpu_tensor_is_refused(index: list) -> None:
    with pretend_gpu(), pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(2, 3)[torch.tensor(index, device="cuda")]


def test_what_cuda_mixes_is_computed_on_the_gpu() -> None:
    with pretend_gpu() as gpu:
        x, zero = torch.ones(2, 3, device="cuda"), torch.zeros(())
        mixed = [x + zero, zero + x.sum(), x[torch.tensor([1])], x[[0, 1]], x.clone().fill_(zero), torch.ones(3).to(x)]
        assert all(y.device == torch.device("cuda:0") and y.is_cuda for y in mixed)
        assert not gpu.syncs
        assert [y.cpu().tolist() for y in mixed] == [[[1] * 3] * 2, 6, [[1] * 3], [[1] * 3] * 2, [[0] * 3] * 2, [1] * 3]


WAITS: list[Callable[[Tensor], object]] = [
    lambda x: x[0].item(),
    lambda x: int(x[0]),
    lambda x: bool(x[0]),
    lambda x: f"{x[0]:.1f}",
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    lambda x: x.to("cpu", torch.float64),
    lambda x: torch.zeros(3).copy_(x),
    lambda x: torch.equal(x, x),
    lambda x: x.nonzero(),
    lambda x: x[x > 1],
    lambda x: x.unique(),
]


@pytest.mark.parametrize("read", WAITS)
def test_the_host_waits_where_a_result_is_read(read: Callable[[Tensor], object]) -> None:
    with pretend_gpu() as gpu:
        read(torch.arange(3.0, device="cuda"))
    assert gpu.syncs == {("tests/test_pretend_gpu.py", read.__code__.co_firstlineno): 1}


def test_a_gpu_tensor_is_no_array() -> None:
    with pretend_gpu():
        for convert in (Tensor.numpy, np.asarray):
            with pytest.raises(TypeError, match="can't convert"):
                convert(torch.ones(2, device="cuda"))


def test_a_module_moves_with_its_parameters_and_is_saved_and_copied(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    before, expected = list(module.parameters()), {k: v.clone() for k, v in module.state_dict().items()}
    with pretend_gpu():
        module.to("cuda")
        assert all(p is q and q.is_cuda for p, q in zip(before, module.parameters(), strict=True))
        save_file(module.state_dict(), tmp_path / "weights.safetensors")
        torch.save(module.state_dict(), tmp_path / "weights.pt")
        x = torch.ones(1, 3, requires_grad=True)
        module(x.to("cuda")).sum().cpu().backward()
        assert torch.equal(x.grad, expected["weight"].sum(0, keepdim=True))
        stored = torch.load(tmp_path / "weights.pt", weights_only=False)
        with torch.no_grad():
            module.weight.zero_()
        module.load_state_dict(stored)
        module.cpu()
    assert equal(module.state_dict(), expected)
    assert equal(load_file(tmp_path / "weights.safetensors"), expected)


def test_clipping_and_a_step_of_the_optimizer_wait_for_nothing() -> None:
    with pretend_gpu() as gpu:
        module = nn.Linear(3, 2).to("cuda")
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        module(torch.ones(1, 3, device="cuda")).sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
        assert not gpu.syncs
        assert all(value.is_cuda for moments in optimizer.state.values() for value in moments.values())


def test_a_capture_has_no_effect_a_replay_has_and_neither_may_wait() -> None:
    with pretend_gpu():
        x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x[1:] += (x * 2)[1:]
        assert x.tolist() == [1, 1, 1]
        graph.replay()
        graph.replay()
        assert x.tolist() == [1, 9, 9]
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                x.tolist()

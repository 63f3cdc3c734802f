"""Memory: `--micro-batch-tokens auto` halves until it fits and changes no result, and what is said without it.

Memory is refused in two ways: by a model that raises above a number of tokens, as a GPU's allocator would, and by the
operating system, which limits the address space of a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import CHANGES, MODULES, Stop, exit_code, forked, new_run, stop_at

from minirlhf import distributed, world
from minirlhf import model as model_module
from minirlhf.batch import Batch, Example, over_micro_batches, pad
from minirlhf.files import write_records
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.runs import checkpoint, stage
from minirlhf.runs.log import read_rows
from minirlhf.runs.plan import FIRST_ELSEWHERE
from minirlhf.runtime import UserError, is_out_of_memory

STEPS = {"sft": {"epochs": 1.0}, "reward": {"epochs": 1.0}, "ppo": {"iterations": 2}, "dpo": {"epochs": 1.0}}


def run(name: str, folder: Path, **changes: object) -> None:
    settings = {**CHANGES[name], **STEPS[name], "checkpoint_every": 1, "micro_batch_tokens": "auto", **changes}
    tiny.run_stage(name, folder, **settings)


def result(folder: Path) -> tuple[bytes, str]:
    return (folder / "model" / "model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_text()


def found(folder: Path) -> int:
    """What the newest checkpoint says has been found."""
    return json.loads((checkpoint.latest(folder / "checkpoints") / "state.json").read_text())["fitted_tokens"]


def limit_forward(patch: pytest.MonkeyPatch, most: int, *, training: bool = True) -> None:
    """From now on a forward pass (that is trained on) with more than `most` tokens is out of memory."""
    hidden = GPT.hidden

    def limited(self: GPT, tokens: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if torch.is_grad_enabled() >= training and tokens.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return hidden(self, tokens, *args, **kwargs)

    patch.setattr(GPT, "hidden", limited)


@pytest.mark.parametrize("name", MODULES)
def test_auto_halves_until_it_fits_and_then_is_that_number(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    auto, given = (new_run(name, tmp_path / kind) for kind in ("auto", "given"))
    with pytest.MonkeyPatch.context() as patch:
        limit_forward(patch, 32 if name == "ppo" else 96)
        run(name, auto)
        tokens = found(auto / name)
        assert 16 <= tokens <= 96
        run(name, given, micro_batch_tokens=tokens)  # fits, as it says
    if name in ("ppo", "dpo"):  # the first rollout, or the reference, was scored in larger micro-batches
        rows = [read_rows(folder / name) for folder in (auto, given)]
        assert all(row == pytest.approx(other, rel=1e-3, abs=1e-5) for row, other in zip(*rows, strict=True))
    else:
        assert result(auto / name) == result(given / name)
    said = [line for line in capsys.readouterr().out.splitlines() if "do not fit" in line]
    halvings = (FIRST_ELSEWHERE // tokens).bit_length() - 1
    assert len(said) == halvings and said[-1].endswith(f" now {tokens}")  # once each, and never again


# Calls of `clip_gradients`, with all gradients there: of PPO the last is the value model's in its third minibatch.
@pytest.mark.parametrize(("name", "call"), [(n, c) for n in MODULES for c in (1, 6 if n == "ppo" else 2)])
def test_a_step_that_starts_again_leaves_no_trace(name: str, call: int, tmp_path: Path) -> None:
    """All rows fit in one micro-batch, before and after the halving: the bits are those of a run without it."""
    undisturbed, disturbed = (new_run(name, tmp_path / kind) for kind in ("undisturbed", "disturbed"))
    run(name, undisturbed)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, MODULES[name], "clip_gradients", call, error=torch.OutOfMemoryError)
        run(name, disturbed)
    assert result(disturbed / name) == result(undisturbed / name)
    assert (found(undisturbed / name), found(disturbed / name)) == (0, FIRST_ELSEWHERE // 2)


@pytest.mark.parametrize("name", MODULES)
def test_memory_that_runs_out_once_the_weights_have_moved_ends_the_run(name: str, tmp_path: Path) -> None:
    folder = new_run(name, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, MODULES[name], "train_step", 2, after=True, error=torch.OutOfMemoryError)
        with pytest.raises(UserError, match=rf"^{name}, step {0 if name == 'ppo' else 1}: out of memory"):
            run(name, folder)
    newest = checkpoint.latest(folder / name / "checkpoints")
    assert (newest and newest.name) == (None if name == "ppo" else "00000001")  # nothing of the unfinished step


def test_a_pass_without_gradient_takes_smaller_micro_batches_by_itself() -> None:
    gpt = GPT(GPTConfig(vocab_size=11, n_positions=8, n_layer=1, n_head=1, n_embd=8), seed=0)
    batch = pad([Example([1, 2], [3] * (1 + i % 5)) for i in range(12)])

    def score(part: Batch) -> torch.Tensor:
        return gpt.logprobs(part.tokens, part.mask)

    expected = score(batch)  # all rows at once
    with pytest.MonkeyPatch.context() as patch:
        limit_forward(patch, 20, training=False)
        calls = tiny.spy(patch, GPT, "logprobs")
        torch.testing.assert_close(over_micro_batches(score, batch, 1000), expected, rtol=1e-6, atol=1e-6)
        assert len(calls) > 1
        limit_forward(patch, 2, training=False)
        with pytest.raises(torch.OutOfMemoryError):
            over_micro_batches(score, batch, 1000)


def test_what_was_found_goes_on_after_a_stop_unless_a_number_is_given(tmp_path: Path) -> None:
    whole, stopped = new_run("sft", tmp_path / "whole"), new_run("sft", tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        limit_forward(patch, 100)
        run("sft", whole)
        with pytest.MonkeyPatch.context() as inner:
            stop_at(inner, MODULES["sft"], "train_step", 9, after=True)  # seven ran out of memory
            with pytest.raises(Stop):
                run("sft", stopped)
    given = tiny.copy_of(stopped, tmp_path / "given", "sft")
    with pytest.MonkeyPatch.context() as patch:
        steps = tiny.spy(patch, MODULES["sft"], "train_step")
        run("sft", stopped, resume=True)  # no limit now: without the number in the checkpoint it would begin anew
        assert {call.arguments["max_tokens"] for call in steps} == {found(whole / "sft")}
        assert result(stopped / "sft") == result(whole / "sft")
        steps.clear()
        run("sft", given, resume=True, micro_batch_tokens=16)
        assert {call.arguments["max_tokens"] for call in steps} == {16}


def test_where_a_single_row_does_not_fit_the_error_says_what_else_to_try(tmp_path: Path) -> None:
    folder = new_run("sft", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        limit_forward(patch, 2)
        words = r"^sft, step 0: out of memory with --micro-batch-tokens 1 --batch-size 8; the peak was [\d.]+ GiB. "
        with pytest.raises(UserError, match=words + "Try --gradient-checkpointing, then --batch-size 4; --gradient"):
            run("sft", folder)


def test_moments_that_do_not_fit_are_said_before_the_first_step(tmp_path: Path) -> None:
    folder = new_run("sft", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, stage, "allocate_moments", 1, error=torch.OutOfMemoryError)
        with pytest.raises(UserError, match="^sft: out of memory for the optimizer's moments; take a smaller model"):
            run("sft", folder)
    assert not (folder / "sft").exists()


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    folder = new_run("dpo", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, MODULES["dpo"], "train_step", 1, error=RuntimeError)
        with pytest.raises(RuntimeError):
            run("dpo", folder)


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"), True),
        (RuntimeError("shape mismatch"), False),
        (OSError("can't allocate memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, known: bool) -> None:
    assert is_out_of_memory(error) is known


def test_several_processes_are_given_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run("dpo", tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--micro-batch-tokens auto: is for one process"):
        run("dpo", folder)


# --------------------------------------------------------------------------------------------- a limit that is real
LIMIT = 64 << 20  # bytes of address space beyond what the process has; 4,096 tokens in one pass need some 130 MB


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of about 90 tokens, so that a batch of 48 has more than 4,096."""
    folder = tmp_path_factory.mktemp("long")
    text = " ".join(world.ideal(prompt) for prompt in tiny.PROMPTS)
    records = [{"prompt": f"{i}: {text[:300]}", "response": text[i : 60 + i]} for i in range(48)]
    write_records(folder / "train.jsonl", records)
    write_records(folder / "validation.jsonl", records[:2])
    return folder


def limited_run(folder: Path, tokens: int | str) -> Callable[[], None]:
    def work() -> None:
        tiny.run_stage("sft", folder, epochs=1.0, batch_size=48)  # loads what a training step needs beside its tensors
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT, resource.RLIM_INFINITY))
        changes = {"n_layer": 4, "n_embd": 128, "batch_size": 48, "micro_batch_tokens": tokens}
        try:
            tiny.run_stage("sft", folder, epochs=2.0, checkpoint_every=1, **changes)
        except UserError as error:
            (folder / "error").write_text(str(error))
            raise SystemExit(7) from None

    return work


def refused(long_rows: Path, folder: Path) -> None:
    given, auto = (tiny.copy_of(long_rows, folder / name) for name in ("given", "auto"))
    assert exit_code(forked(limited_run(given, 8192), folder / "errors")) == 7, (folder / "errors").read_text()
    message = (given / "error").read_text()
    assert message.startswith("sft, step 0: out of memory with --micro-batch-tokens 8192 --batch-size 48; the peak was")
    assert "Try --micro-batch-tokens 4096, then --gradient-checkpointing, then --batch-size 24;" in message
    assert exit_code(forked(limited_run(auto, "auto"), folder / "errors")) == 0, (folder / "errors").read_text()
    assert 0 < found(auto / "sft") < 4096 and len(read_rows(auto / "sft")) == 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know the size of the address space")
def test_memory_that_the_system_refuses(long_rows: Path, tmp_path: Path) -> None:
    """From a new process: a fork of this one would use again what the tests before it have freed."""
    process = multiprocessing.get_context("spawn").Process(target=refused, args=(long_rows, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0, "its traceback is in stderr"


# --------------------------------------------------------------------------------------------- gradient checkpointing
def kept_and_gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> tuple[int, dict]:
    """Bytes that the forward pass keeps for the backward pass, each storage once, and the gradients."""
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return sum(size for storage, size in kept.items() if storage not in parameters), gradients


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", ["policy", "reward", "value"])
def test_checkpointed_gradients_are_the_same_bits_and_less_is_kept(kind: str, bfloat16: bool) -> None:
    gpt = GPT(GPTConfig(vocab_size=11, n_positions=32, n_layer=6, n_head=2, n_embd=16), seed=0)
    tokens = torch.randint(11, (4, 32), generator=torch.Generator().manual_seed(0))
    mask, lengths = torch.ones(4, 31, dtype=torch.bool), torch.full((4,), 32)
    reward = RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(1))
    model = {"policy": gpt, "reward": reward, "value": ValueModel.from_reward_model(reward)}[kind]
    if kind == "value":
        torch.nn.init.ones_(model.value.weight)  # at 0 no gradient would reach the trunk
    arguments = (tokens, lengths if kind == "reward" else mask)
    forward = model.logprobs if kind == "policy" else model

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            return forward(*arguments).square().sum()

    plain, expected = kept_and_gradients(model, loss)
    (gpt if kind == "policy" else model.gpt).gradient_checkpointing = True
    kept, gradients = kept_and_gradients(model, loss)
    assert tiny.equal(gradients, expected)
    # A block keeps some 17 times its input (B, T, C), and 6 inputs are kept instead.
    assert kept < plain / 3


@pytest.mark.parametrize("name", MODULES)
def test_the_scripts_hand_it_to_the_models_they_train(name: str, tmp_path: Path) -> None:
    folder, other = new_run(name, tmp_path / "a"), new_run(name, tmp_path / "b")
    with pytest.MonkeyPatch.context() as patch:
        calls = tiny.spy(patch, model_module, "checkpoint")
        run(name, folder)
        assert not calls
        run(name, other, gradient_checkpointing=True)
        models = {id(call.arguments["function"]) for call in calls}
    assert len(models) == (2 if name == "ppo" else 1)  # one block each
    assert result(folder / name) == result(other / name)

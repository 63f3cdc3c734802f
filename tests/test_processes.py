"""Two processes compute what one computes, write what one writes, and end together. The jobs are in `two_processes`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import two_processes
from safetensors.torch import load_file
from torch import Tensor, nn
from two_processes import STAGES, STEPS, Stop

from minirlhf import distributed, rollout
from minirlhf.generate import Samples
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.runs import checkpoint
from minirlhf.runs.log import read_rows
from minirlhf.runtime import UserError, resolve_device

ROOT = Path(__file__).parent.parent
JOBS = [name for name in two_processes.JOBS if name != "resume"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the jobs are forked")


def run_jobs(folder: Path, *jobs: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(folder), *jobs]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the jobs have left."""
    folder = tmp_path_factory.mktemp("jobs")
    for job in JOBS:
        (folder / job).mkdir()
        (folder / job / "script").mkdir()
        tiny.write_inputs(folder / job / "script")
    run_jobs(folder, *JOBS)
    return folder


def codes(folder: Path, job: str) -> list[int | str]:
    return json.loads((folder / f"{job}.json").read_text())


def said(folder: Path, job: str) -> str:
    """Standard error of both processes."""
    return "".join((folder / f"{job}.{rank}.err").read_text() for rank in range(2))


# ----------------------------------------------------------------------------------------------------- the same numbers
@pytest.fixture(scope="module")
def steps(jobs: Path) -> list[dict]:
    assert codes(jobs, "steps") == [0, 0], said(jobs, "steps")
    return [torch.load(jobs / "steps" / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", STAGES)
def test_gradients_are_those_of_one_process(name: str, steps: list[dict]) -> None:
    """In float32, with unequal token counts and with a batch that leaves a process without rows."""
    for found in steps:
        for expected, gradients in zip(two_processes.gradients(name), found[name][0], strict=True):
            largest = max(g.abs().max() for g in expected.values())
            for key, gradient in expected.items():
                torch.testing.assert_close(gradients[key], gradient, atol=1e-6 * largest.item(), rtol=1e-6, msg=key)


@pytest.mark.parametrize("name", STAGES)
def test_twenty_steps_give_the_parameters_of_one_process(name: str, steps: list[dict]) -> None:
    parameters, measured = two_processes.trained(name)
    first, second = (found[name][1] for found in steps)
    assert len(measured) == len(first[1]) == STEPS
    for key, parameter in parameters.items():
        torch.testing.assert_close(first[0][key], parameter, atol=1e-12, rtol=1e-12, msg=key)
        assert torch.equal(first[0][key], second[0][key])
    for ours, theirs in zip(measured, first[1], strict=True):
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            atol = 1e-7 if "accuracy" in key else 1e-10  # it is counted in float32
            torch.testing.assert_close(theirs[key], value, atol=atol, rtol=1e-10, msg=key)


# -------------------------------------------------------------------------------- one process, then two, then one again
NEEDS = {"sft": (), "reward": ("sft", "feedback"), "ppo": ("sft", "reward"), "dpo": ("sft", "feedback")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every stage in float64: in `whole` by one process throughout, in `parted` begun by one and continued by two."""
    folder = tmp_path_factory.mktemp("runs")
    source = tiny.copy_of(tiny.finished_run(), folder / "source", "sft", "feedback", "reward")
    for kind, stage in ((GPT, "sft"), (RewardModel, "reward")):
        model = kind.from_pretrained(source / stage / "model").double()
        model.save_pretrained(source / stage / "model")
    torch.set_default_dtype(torch.float64)
    try:
        for name in STAGES:
            tiny.copy_of(source, folder / "whole" / name, *NEEDS[name])
            tiny.copy_of(source, folder / "parted" / name, *NEEDS[name])
            two_processes.run(name, folder / "whole" / name)
            with pytest.raises(Stop):
                two_processes.run(name, folder / "parted" / name, calls=two_processes.CALLS[name][0])
        run_jobs(folder, "resume")
        yield folder
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_goes_on_in_two_processes_and_again_in_one(name: str, runs: Path) -> None:
    assert codes(runs, "resume") == [0, 0], said(runs, "resume")
    parted, whole = (runs / kind / name / name for kind in ("parted", "whole"))
    newest = checkpoint.latest(parted / "checkpoints")
    middle = checkpoint.verify(newest)
    assert re.search(rf"{name}: step {middle.step} of \d+ is saved", said(runs, "resume"))
    printed = [(runs / f"resume.{rank}.out").read_text() for rank in range(2)]
    assert f"{name}: continues after step " in printed[0] and not printed[1]
    two_processes.run(name, parted.parent, resume=True)

    rows, expected = read_rows(parted), read_rows(whole)
    assert 0 < middle.step < len(rows) == len(expected)  # no row twice, none left out
    for row, other in zip(rows, expected, strict=True):
        assert list(row) == list(other)
        for key, value in other.items():
            assert row[key] == pytest.approx(value, rel=1e-10, abs=1e-7 if "accuracy" in key else 1e-10), key
    last = [checkpoint.latest(folder / "checkpoints") for folder in (parted, whole)]
    for file in ("checkpoints/" + last[0].name + "/state.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(parted / file), load_file(whole / file)
        assert ours.keys() == theirs.keys() and next(iter(ours.values())).dtype == torch.float64
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-12, rtol=1e-12, msg=key)
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (parted, whole)]
    assert {name for name in files[0] ^ files[1] if not name.startswith("checkpoints/")} == set()


# ------------------------------------------------------------------------------------------------------ ending together
@pytest.mark.parametrize(
    ("job", "code", "message"),
    [
        ("bad_input", 2, r"error: .*nowhere.jsonl: no such file\n"),
        ("alone_only", 2, "error: this command runs in one process, .*no torchrun\n"),
        ("own_error", 2, "error: of process [01]\n"),
        ("bug", 1, "Traceback (.*\n)*ZeroDivisionError\n+"),
        ("other_settings", 2, r"error: sft: process \[1\] and process 0 would not train the same: .*\n"),
    ],
)
def test_an_error_ends_both_with_one_message(job: str, code: int, message: str, jobs: Path) -> None:
    assert codes(jobs, job) == [code, code]
    assert re.fullmatch(message, said(jobs, job))


def test_a_wrong_flag_and_help_are_said_once(jobs: Path) -> None:
    assert codes(jobs, "bad_flag") == [2, 2] and codes(jobs, "help") == [0, 0]
    assert said(jobs, "bad_flag").count("Unrecognized options: --nonsense") == 1
    help_texts = [(jobs / f"help.{rank}.out").read_text() for rank in range(2)]
    assert "--micro-batch-tokens" in help_texts[0] and not help_texts[1]


@pytest.mark.parametrize(
    ("job", "code", "message"),
    [
        ("no_memory", 2, "error: sft, step {step}: out of memory with "),
        ("not_finite", 2, "error: sft, step {step}: loss is nan: stopped before the optimizer step"),
        ("killed", 1, "error: another process has ended without a word, killed or out of memory"),
    ],
)
def test_an_error_in_one_of_them_ends_both_and_keeps_the_last_finished_step(
    job: str, code: int, message: str, jobs: Path
) -> None:
    expected = [code, -signal.SIGKILL if job == "killed" else code]
    assert codes(jobs, job) == expected, said(jobs, job)
    folder = jobs / job / "script" / "sft"
    manifest = checkpoint.verify(checkpoint.latest(folder / "checkpoints"))
    assert manifest.step == len(read_rows(folder)) > 0
    lines = said(jobs, job).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["error", "sft"], lines
    assert any(line.startswith(message.format(step=manifest.step)) for line in lines)
    assert any(line.startswith(f"sft: step {manifest.step} of 12 is saved") for line in lines)
    tensors = load_file(checkpoint.latest(folder / "checkpoints") / "state.safetensors").values()
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


def with_argument(text: str) -> list[int]:
    """Numbers of the processes that have `text` among their arguments."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in table.splitlines() if text in line]


def test_sigterm_to_torchrun_saves_the_last_finished_step_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    settings = ["--n-layer", "1", "--n-embd", "16", "--checkpoint-every", "5", "--device", "cpu"]
    script = [str(ROOT / "train_sft.py"), "--run", str(tmp_path), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "err").open("w") as err:
        torchrun = subprocess.Popen([*command, *script], stderr=err, env=environment)
    begun = tmp_path / "sft" / "checkpoints" / "latest"
    until = time.monotonic() + 60
    while not begun.exists() and torchrun.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    torchrun.send_signal(signal.SIGTERM)
    assert torchrun.wait(timeout=60) != 0
    said = (tmp_path / "err").read_text()
    assert said.count("stopped by SIGTERM") == 1, said
    manifest = checkpoint.verify(checkpoint.latest(tmp_path / "sft" / "checkpoints"))
    assert manifest.step == len(read_rows(tmp_path / "sft")) > 0
    assert said.count(f"sft: step {manifest.step} of ") == 1
    assert not with_argument(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------- alone
def test_alone_nothing_is_started_copied_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_reduce", None)
    with distributed.started() as group:
        assert group.store is None and not torch.distributed.is_initialized()
        assert group.writer_first(lambda: 3) == 3
    assert distributed.world_size() == 1 and distributed.rank() == 0 and distributed.is_writer()
    x = torch.ones(2)
    assert distributed.all_sum(x) is x and distributed.all_max(x) is x
    assert distributed.share(torch.tensor([3, 9, 5])).tolist() == [0, 1, 2]
    model = nn.Linear(2, 1)
    model(x).sum().backward()
    before = model.weight.grad
    distributed.sum_gradients(model)
    assert model.weight.grad is before
    distributed.barrier()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 2, 7, 40])
def test_every_item_is_in_one_share_and_shares_weigh_alike(
    count: int, items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = torch.randint(1, 100, (items,), generator=torch.Generator().manual_seed(items))
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    shares = []
    for number in range(count):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        shares.append(distributed.share(sizes))
    assert sorted(torch.cat(shares).tolist()) == list(range(items))
    sums = [int(sizes[own].sum()) for own in shares]
    assert max(sums) - min(sums) <= sizes.max()


def test_gradients_are_sent_in_buckets_and_one_that_nobody_has_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with equal gradients: the sum is the double."""
    sent = []

    def double(x: Tensor, op: object) -> Tensor:
        sent.append(x.numel())
        return x.mul_(2)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_reduce", double)
    monkeypatch.setattr(distributed, "BUCKET", 8)
    model = nn.ParameterList([nn.Parameter(torch.arange(n).float()) for n in (3, 4, 20, 1, 2, 5)])
    model[2].requires_grad_(False)
    sum(p.square().sum() for i, p in enumerate(model) if i != 3).backward()
    distributed.sum_gradients(model)
    assert sent == [5, 7, 7]  # which of them have a gradient; then 3 + 4, and 2 + 5
    assert model[3].grad is None and model[2].grad is None
    for i in (0, 1, 4, 5):
        assert torch.equal(model[i].grad, 4 * model[i])


def test_rows_from_elsewhere_keep_their_place_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three rows this process has the last and the first; the other one's row is longer."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_max", lambda width: width + 1)
    monkeypatch.setattr(distributed, "all_sum", lambda x: x)
    part = Samples(
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([1, 1]),
        torch.tensor([2, 2]),
        torch.tensor([[-0.5], [-1.5]]),
        torch.tensor([True, False]),
    )
    whole = rollout.joined(part, [2, 0], 3)
    assert whole.tokens.tolist() == [[3, 4, 0], [0, 0, 0], [1, 2, 0]]
    assert whole.logprobs.tolist() == [[-1.5, 0.0], [0.0, 0.0], [-0.5, 0.0]]
    assert whole.finished.tolist() == [False, False, True] and whole.finished.dtype == torch.bool
    nothing = rollout.joined(part, [], 3)
    assert nothing.tokens.shape == (3, 3) and not nothing.tokens.any()


def test_each_of_several_processes_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device mps"):  # gloo sums no tensor there
        resolve_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for number in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert resolve_device("auto") == torch.device("cuda", number)
    assert chosen == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc-per-node: more processes than the 2 GPUs here"):
        resolve_device("cuda")


def test_the_table_of_memory_follows_the_formulas_beside_it() -> None:
    shapes = {
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    for name, (layers, heads, channels) in shapes.items():
        config = GPTConfig(vocab_size=50257, n_positions=1024, n_layer=layers, n_head=heads, n_embd=channels)
        count = sum(p.numel() for p in GPT(config, seed=None).parameters())
        kept = 8192 * channels
        sizes = [16 * count, 20 * count, 40 * count, 38 * kept * layers, kept * (4 * layers + 38)]
        cells = [name, f"{count:,}", *(f"{size / 2**30:.1f}" for size in sizes)]
        assert f"| {' | '.join(cells)} |" in text

"""What `test_processes` runs in two processes and in one: `python two_processes.py FOLDER JOB...`.

Each job runs in two processes that are told of each other as torchrun tells its own, in a group over gloo. This script
imports everything once and forks, because each import of torch takes seconds. A process writes to
FOLDER/<job>.<rank>.out and .err, and its exit code stands in FOLDER/<job>.json; one that hangs is killed.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from test_stages import COMPARISONS, CPU, EXAMPLES, new_gpt, new_reward_model
from torch import Tensor, nn

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import distributed, reward_functions
from minirlhf.batch import pad
from minirlhf.comparisons import with_reference
from minirlhf.config import run_script
from minirlhf.optim import adamw
from minirlhf.reward import ValueModel
from minirlhf.rollout import collect, rollout_metrics
from minirlhf.runtime import UserError

LIMIT = 60  # seconds for a job
STAGES = ("sft", "reward", "dpo", "ppo")
STEPS = 20
# Unequal lengths, and batches with as many rows as there are processes, with more and with fewer.
ROWS = [[0, 1, 2], [1], [1, 3, 5, 4], [0, 2]]
PAIRS = [[0, 1], [0], [0, 1, 2], [1, 2]]
# Some parameters have a gradient of exactly 0 but for rounding (a bias of the keys, a constant added to all scores).
# Of a rounding of 1e-17 Adam makes a step of 1e-17 / eps learning rates, so the default eps, 1e-8, would be too small.
EPS = 1e-5
MODULES = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo, "dpo": train_dpo}


# ------------------------------------------------------------------------------------------------ optimizer steps alone
def sft_steps(dtype: torch.dtype, learning_rate: float) -> Iterator[tuple[nn.Module, dict]]:
    """The model and the metrics after each optimizer step, in this and the next three."""
    model = new_gpt(0).to(dtype)
    state = train_sft.State(model, adamw(model, learning_rate=learning_rate, eps=EPS, weight_decay=0.1))
    while True:
        batch = pad([EXAMPLES[i] for i in ROWS[state.step % 4]])
        yield model, train_sft.train_step(state, batch, train_sft.Config(max_grad_norm=10.0), max_tokens=10)


def reward_steps(dtype: torch.dtype, learning_rate: float) -> Iterator[tuple[nn.Module, dict]]:
    model = new_reward_model(new_gpt(1)).to(dtype)
    state = train_reward.State(model, adamw(model, learning_rate=learning_rate, eps=EPS, weight_decay=0.01))
    while True:
        batch = [COMPARISONS[i] for i in PAIRS[state.step % 4]]
        config = train_reward.Config(max_grad_norm=10.0)
        yield model, train_reward.train_step(state, batch, config, CPU, max_tokens=10, contrast=1.0)


def dpo_steps(dtype: torch.dtype, learning_rate: float) -> Iterator[tuple[nn.Module, dict]]:
    policy, reference = new_gpt(2).to(dtype), new_gpt(3).to(dtype).requires_grad_(False)
    config = train_dpo.Config(beta=0.3, max_grad_norm=10.0)
    state = train_dpo.State(policy, adamw(policy, learning_rate=learning_rate, eps=EPS))
    comparisons = with_reference(reference, COMPARISONS, CPU, max_tokens=10)
    while True:
        batch = [comparisons[i] for i in PAIRS[state.step % 4]]
        metrics = train_dpo.train_step(state, batch, config, CPU, max_tokens=10)
        yield policy, metrics | train_dpo.held_out(policy, comparisons, config, CPU, max_tokens=10)


def ppo_steps(dtype: torch.dtype, learning_rate: float) -> Iterator[tuple[nn.Module, dict]]:
    """A rollout of seven prompts, then optimizer steps of four rows, of one and of four; then the next rollout."""
    policy, reference = new_gpt(3).to(dtype), new_gpt(4).to(dtype).requires_grad_(False)
    reward_model = new_reward_model(new_gpt(6)).to(dtype)
    value_model = ValueModel.from_reward_model(new_reward_model(new_gpt(5))).to(dtype)
    both = nn.ModuleDict({"policy": policy, "value_model": value_model})
    config = train_ppo.Config(value_clip=0.05, temperature=0.7, max_grad_norm=10.0)
    adams = [adamw(m, learning_rate=learning_rate, eps=EPS) for m in (policy, value_model)]
    state = train_ppo.State(policy, value_model, *adams, None)
    prompts = [[*e.prompt_ids[:1], i] for i, e in enumerate(EXAMPLES)] + [[1]]
    while True:
        rollout = collect(
            policy,
            reference,
            value_model,
            reward_functions.reward_function(reward_model),
            prompts,
            keys=[(state.iteration, i) for i in range(len(prompts))],
            seed=0,
            eos_id=0,
            max_new_tokens=5,
            temperature=0.7,
            missing_eos_score=-1.0,
            rescore=state.iteration % 2 == 1,
            max_tokens=10,
        )
        experience = tiny.learn_from(rollout, beta=0.2, gamma=0.9, lam=0.8, whiten_rewards=True)
        seen = rollout_metrics(rollout) | {"tokens": rollout.tokens.float(), "returns": experience.returns}
        for rows in ([0, 1, 2, 3], [6], [1, 2, 4, 5]):
            part = experience.rows(torch.tensor(rows))
            yield both, seen | train_ppo.train_step(state, part, config, beta=0.2, max_tokens=10)
        state.iteration += 1


ALONE: dict[str, Callable[[torch.dtype, float], Iterator[tuple[nn.Module, dict]]]] = {
    "sft": sft_steps,
    "reward": reward_steps,
    "dpo": dpo_steps,
    "ppo": ppo_steps,
}


def gradients(name: str) -> list[dict[str, Tensor]]:
    """The gradients of the first four batches in float32, all at the same weights."""
    found = []
    for _, (model, _) in zip(range(4), ALONE[name](torch.float32, 0.0), strict=False):
        found.append({key: p.grad.clone() for key, p in model.named_parameters()})
    return found


def trained(name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The parameters after 20 steps in float64, and what was measured in each step."""
    measured = []
    for _, (model, metrics) in zip(range(STEPS), ALONE[name](torch.float64, 1e-3), strict=False):
        measured.append({key: torch.as_tensor(value).double() for key, value in metrics.items()})
        parameters = {key: p.detach().clone() for key, p in model.named_parameters()}
    return parameters, measured


# --------------------------------------------------------------------------------------------------------- whole stages
EVERY = {"sft": 4, "reward": 2, "ppo": 1, "dpo": 2}
CHANGES = {"sft": {"epochs": 4.0, "validation_every": 5}, "ppo": {"kl_target": 0.5, "kl_horizon": 30.0}}
CALLS = {"sft": (4, 5), "reward": (2, 2), "ppo": (6, 6), "dpo": (2, 2)}  # of train_step, to the two interruptions


class Stop(Exception):
    """Stands for whatever ends a process."""


def run(name: str, folder: Path, *, calls: int | None = None, **changes: Any) -> None:
    """A stage of `tiny`, or what it does before so many calls of its `train_step`."""
    count = 0
    step = MODULES[name].train_step

    def counted(*args: Any, **kwargs: Any) -> dict:
        nonlocal count
        count += 1
        if count == calls:
            raise Stop
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES[name], "train_step", counted)
        patch.setattr(MODULES[name], "adamw", functools.partial(adamw, eps=EPS))
        tiny.run_stage(name, folder, **{"checkpoint_every": EVERY[name], **CHANGES.get(name, {}), **changes})


def script(folder: Path, **changes: Any) -> None:
    """`train_sft.py` as it is started from the command line."""
    sys.argv = ["train_sft.py"]
    config = tiny.sft_config(folder / "script")
    config = replace(config, train=str(config.train), validation=str(config.validation), epochs=4.0)
    config = replace(config, **changes)
    run_script(train_sft.main, {"tiny": config}, several=True)


def only_in(rank: int, calls: int, act: Callable[[Tensor], Tensor]) -> None:
    """In one of the processes, from that many micro-batches on, do this to the loss."""
    original, seen = train_sft.masked_mean, []

    def changed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(None)
        loss = original(x, *args, **kwargs)
        return act(loss) if len(seen) >= calls and distributed.rank() == rank else loss

    train_sft.masked_mean = changed


def no_memory(loss: Tensor) -> Tensor:
    raise MemoryError


def die(loss: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return loss


# ----------------------------------------------------------------------------------------------------------------- jobs
def job_steps(folder: Path) -> None:
    """Everything that is compared with one process; afterwards each process holds the same."""
    with distributed.started():
        found = {name: (gradients(name), trained(name)) for name in STAGES}
        torch.save(found, folder / f"{distributed.rank()}.pt")


def job_resume(folder: Path) -> None:
    """The middle of every stage, whose beginning and end are made in one process."""
    torch.set_default_dtype(torch.float64)
    with distributed.started():
        for name in STAGES:
            with pytest.raises(Stop):
                run(name, folder / "parted" / name, calls=CALLS[name][1], resume=True)
            distributed.barrier()


def job_no_memory(folder: Path) -> None:
    only_in(1, 10, no_memory)
    script(folder)


def job_not_finite(folder: Path) -> None:
    only_in(1, 10, lambda loss: loss * float("nan"))
    script(folder)


def job_killed(folder: Path) -> None:
    only_in(1, 10, die)
    script(folder)


def job_bad_input(folder: Path) -> None:
    script(folder, train=str(folder / "nowhere.jsonl"))


def job_bad_flag(folder: Path) -> None:
    sys.argv = ["train_sft.py", "--nonsense"]
    run_script(train_sft.main, train_sft.PRESETS, several=True)


def job_help(folder: Path) -> None:
    sys.argv = ["train_sft.py", "--help"]
    run_script(train_sft.main, train_sft.PRESETS, several=True)


def job_other_settings(folder: Path) -> None:
    script(folder, seed=int(os.environ["RANK"]))


def job_alone_only(folder: Path) -> None:
    sys.argv = ["evaluate.py"]
    run_script(train_sft.main, train_sft.PRESETS)


def job_bug(folder: Path) -> None:
    def broken(config: object) -> None:
        if distributed.rank() == 1:
            raise ZeroDivisionError
        distributed.barrier()

    sys.argv = ["train_sft.py"]
    run_script(broken, train_sft.PRESETS, several=True)


def job_own_error(folder: Path) -> None:
    """Both processes fail at the same time, each for a reason of its own."""

    def broken(config: object) -> None:
        raise UserError(f"of process {distributed.rank()}")

    sys.argv = ["train_sft.py"]
    run_script(broken, train_sft.PRESETS, several=True)


JOBS = {name.removeprefix("job_"): value for name, value in globals().items() if name.startswith("job_")}


# -------------------------------------------------------------------------------------------------------------- forking
def fork(job: str, folder: Path, rank: int, port: int) -> int:
    """A process of the job; returns its id."""
    child = os.fork()
    if child:
        return child
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{job}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    code = 1
    try:
        JOBS[job](folder / job if (folder / job).is_dir() else folder)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, until: float) -> int | str:
    """The exit code of a process, negative where a signal ended it; "hung" where it had to be killed."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    new_gpt(0)  # the first model makes torch import as much again: once, rather than in every process
    for job in sys.argv[2:]:
        # As torchrun does it: the store lives in the parent, and outlives every one of the processes.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        children = [fork(job, folder, rank, store.port) for rank in range(2)]
        until = time.monotonic() + LIMIT
        (folder / f"{job}.json").write_text(json.dumps([wait(child, until) for child in children]))


if __name__ == "__main__":
    main()

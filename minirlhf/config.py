"""Settings: what every stage is told, the ranges of numbers, and the command line.

A setting cannot hold nonsense: every number declares its range, and is checked at once.

    @dataclass
    class Config(Settings):
        learning_rate: NotNegative = 3e-3
        kl_target: Positive | None = None

A numeric field without a range is a TypeError as soon as the class is used, so none can be forgotten. Nothing that is
outside its range gets as far as a script's `main`. Where two settings must fit each other, `main` says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from minirlhf import distributed
from minirlhf.runtime import Interrupted, UserError, interruptible, project_file, require


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`. An infinite bound is never reached, and nan is in no range.

    above  True where `low` itself is not allowed;  below  the same for `high`
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        lower = self.low < value if self.above else self.low <= value
        upper = value < self.high if self.below else value <= self.high
        return lower and upper and math.isfinite(value)

    def __str__(self) -> str:
        low, high = (f"{bound:g}" if abs(bound) < 2**53 else f"{bound}" for bound in (self.low, self.high))
        words = [f"{'above' if self.above else 'at least'} {low}"] if math.isfinite(self.low) else []
        words += [f"{'below' if self.below else 'at most'} {high}"] if math.isfinite(self.high) else []
        return " and ".join(words) or "finite"


class Name:
    """Names of a folder within the run that are not those of a stage which others read."""

    TAKEN = ("sft", "feedback", "labels", "reward")

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(r"\w[\w.-]*", value) is not None and value not in self.TAKEN

    def __str__(self) -> str:
        return f"a name of letters, digits, '.', '-' and '_', and none of {', '.join(self.TAKEN)}"


Count = Annotated[int, Range(low=1)]
AtLeastTwo = Annotated[int, Range(low=2)]
Steps = Annotated[int, Range(low=0)]
Seed = Annotated[int, Range(low=0, high=2**63 - 1)]
Positive = Annotated[float, Range(low=0, above=True)]
NotNegative = Annotated[float, Range(low=0)]
Finite = Annotated[float, Range()]
Fraction = Annotated[float, Range(low=0, high=1)]
Share = Annotated[float, Range(low=0, high=1, above=True, below=True)]  # of data that is divided: neither none nor all
Smoothing = Annotated[float, Range(low=0, high=0.5)]
Port = Annotated[int, Range(low=0, high=65_535)]  # 0 takes a free one
FolderName = Annotated[str, Name()]
Aggregate = Literal["mean", "worst", "mean-minus-variance"]
TrackerName = Literal["tensorboard", "wandb"]
TokenBudget = Count | Literal["auto"]


@dataclass(eq=False)
class Settings:
    """Base of every configuration: raises UserError that names the flag where a value is not one its field allows."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, allowed in field_ranges(kind).items():
            value = getattr(self, name)
            for part in value if isinstance(value, tuple) else (value,):
                word = part is None or (isinstance(part, str) and isinstance(allowed, Range))  # such as `auto`
                infinite = isinstance(part, float) and not math.isfinite(part)
                words = f"{flag(name)} {part}: must be {'a finite number' if infinite else allowed}"
                require(word or part in allowed, words)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            blank = isinstance(value, str) and not value.strip() and field.default is None
            require(not blank, f"{flag(field.name)}: is blank; leave it out for the default")


@dataclass
class RunConfig(Settings):
    """Settings of every stage: where it writes, its seed, where it computes, and whether it goes on."""

    run: Path = Path("runs/tiny")
    """Folder of the run; each stage writes a folder of its own in it."""
    seed: Seed = 0
    """Seed of all that is random: initial weights, splits, data order, sampling, minibatches."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    resume: bool = False
    """Go on from the newest whole checkpoint, from the start where there is none; a finished stage is left as it is."""


@dataclass
class TrainConfig(RunConfig):
    """Settings of every stage that trains."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of matrix products; auto is bfloat16 on CUDA, else float32."""
    checkpoint_every: Count = 100
    """Steps (iterations of PPO and online DPO) between two checkpoints; the newest two and the best are kept."""
    track: TrackerName | None = None
    """Show the metrics in `tensorboard` or `wandb` as well; Weights & Biases stays offline unless WANDB_MODE is set."""
    dry_run: bool = False
    """Say what would be done and about what it takes, read no weights and write nothing."""
    micro_batch_tokens: TokenBudget = 2048
    """Padded tokens per forward pass; `auto` halves until it fits. Changes memory and speed, not the gradient."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone and compute the rest again backward: less memory, one more forward pass."""


@dataclass
class SamplingConfig(RunConfig):
    """Settings of every stage that samples: the policy, the prompts, the sampling and the reward."""

    policy: str | None = None
    """Folder or hub name of the model that policy and reference start from, by default `<run>/sft/model`."""
    reward_model: str | None = None
    """Folder or hub name of the reward model; by default `<run>/reward/model`, and none where `reward` is given.
    PPO's value model starts from it."""
    ensemble: tuple[str, ...] = ()
    """Folders or hub names of further reward models, with the same tokenizer: the score is that of all together."""
    aggregate: Aggregate = "mean"
    """What makes one score of an ensemble's: their mean, the worst, or the mean less `variance_penalty` variances."""
    variance_penalty: NotNegative = 1.0
    """See `aggregate`."""
    reward: tuple[str, ...] = ()
    """Functions package.module:function, (prompts, responses) -> scores, that are added up; see
    minirlhf/reward_functions.py. The score of a reward model is added only where `reward_model` or `ensemble` names
    one."""
    prompts: str = str(project_file("world", "prompts.train.jsonl"))
    """Prompts: a file of any known format (of pairs or demonstrations, their prompts), or a hub name."""
    split: str = ""
    """Part of `prompts`: a split of a hub data set, a slice, or both, e.g. test, [:90%], train[:1000]."""
    columns: tuple[str, ...] = ()
    """Fields with other names, as ours=theirs: prompt=query."""
    max_new_tokens: Count = 32
    """Length limit of a response in tokens."""
    temperature: Positive = 1.0
    """Of sampling and of every log-probability: policy, reference and training."""


def flag(name: str) -> str:
    """A field's name on the command line."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def field_ranges(config: Any) -> dict[str, Range | Name]:
    """The ranges that the fields of a configuration declare; raises TypeError where a numeric field has none."""
    hints = typing.get_type_hints(config, include_extras=True)
    ranges: dict[str, Range | Name] = {}
    for field in dataclasses.fields(config):
        for kind, allowed in _declared(hints[field.name]):
            if allowed is None:
                raise TypeError(f"{config.__name__}.{field.name} is {kind.__name__} and declares no range")
            ranges[field.name] = allowed
    return ranges


def _declared(hint: Any) -> Iterator[tuple[Any, Range | Name | None]]:
    """The types within a type that are numbers or declare what they allow, e.g. float in `tuple[float, ...]`."""
    kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    allowed = next((note for note in notes if isinstance(note, Range | Name)), None)
    if allowed or kind in (int, float):
        yield kind, allowed
    elif typing.get_origin(kind) is not Literal:
        for part in typing.get_args(kind):
            yield from _declared(part)


def run_script(main: Callable[[Any], object], presets: dict[str, Any], *, several: bool = False) -> None:
    """The entry point of every script: `--preset NAME`, then one flag for each field of its configuration.

    several  it may run in several processes, started by torchrun
    Exit code 0, or 2 with one line on standard error for a UserError; `--debug` shows the traceback instead.
    SIGTERM and Ctrl-C stop it in order with 143 and 130, a second one at once.
    """
    import tyro

    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    words.add_argument("--debug", action="store_true")
    words.add_argument("--preset", nargs="?", const="", default=next(iter(presets)))
    chosen, _ = words.parse_known_args()
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    description = sys.modules["__main__"].__doc__
    with distributed.started() as group:
        try:
            alone = distributed.world_size() == 1
            require(several or alone, "this command runs in one process, and only train_*.py in several: no torchrun")
            require(chosen.preset in presets, f"--preset {chosen.preset}: not one of {', '.join(presets)}")
            default = presets[chosen.preset]
            with interruptible():
                stated = {"default": default, "args": arguments, "description": description}
                main(group.writer_first(lambda: tyro.cli(type(default), **stated)))
        except UserError as error:
            if chosen.debug:
                raise
            group.end(2, f"error: {error}")
        except Interrupted as error:
            group.end(128 + error.number, f"stopped by {error}")


def run_into_a_pipe(main: Callable[[Any], object], presets: dict[str, Any]) -> None:
    """`run_script` for a command whose output a program may read that stops before the end, such as `head`."""
    try:
        try:
            run_script(main, presets)
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes what is left at its exit
        sys.exit(getattr(error.__context__, "code", 0))  # that of the command, where it had come to its end

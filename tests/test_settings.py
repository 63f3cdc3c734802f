"""Settings that no script can use: every numeric field has a range, and nothing outside it becomes a configuration."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest

from minirlhf.config import Count, Positive, Range, Settings, field_ranges, flag
from minirlhf.runtime import UserError

sys.path.append(str(Path(__file__).parent.parent / "studies"))

CONFIGS = [
    "ablate.Config",
    *(f"train_{stage}.Config" for stage in ("sft", "reward", "ppo", "dpo")),
    *(
        f"minirlhf.{module}.Config"
        for module in (
            "__main__",
            "evaluate.comparison",
            "evaluate",
            "online_dpo",
            "rejection",
            "data.__main__",
        )
    ),
    *(f"minirlhf.feedback.{module}.Config" for module in ("__main__", "collect", "label", "pairs", "stats")),
    *(f"minirlhf.feedback.label_studio.{name}" for name in ("ExportConfig", "ImportConfig")),
]


def config_of(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_numeric_field_has_a_range_and_no_number_gets_past_it(path: str) -> None:
    config = config_of(path)
    ranges = field_ranges(config)
    numeric = {f.name for f in fields(config) if type(f.default) in (int, float)}  # bool is neither
    assert numeric <= ranges.keys()
    default = config()
    for name, allowed in ranges.items():
        for value in outside(allowed):
            several = isinstance(getattr(default, name), tuple)
            with pytest.raises(UserError, match=f"^{flag(name)} .*must be "):
                replace(default, **{name: (value,) if several else value})


def outside(allowed: object) -> list:
    """Values just outside a range, and the numbers that are in none."""
    if not isinstance(allowed, Range):
        return ["..", "a/b", "sft", "-x"]
    below = [allowed.low if allowed.above else allowed.low - 1e-6] if math.isfinite(allowed.low) else []
    above = [allowed.high if allowed.below else allowed.high * (1 + 1e-6)] if math.isfinite(allowed.high) else []
    return [*below, *above, math.nan, math.inf, -math.inf]


def test_a_number_without_a_range_cannot_be_used() -> None:
    @dataclass
    class Config(Settings):
        forgotten: Literal["a"] | float | None = None

    Config.__annotations__["forgotten"] = Literal["a"] | float | None
    with pytest.raises(TypeError, match="Config.forgotten is float and declares no range"):
        Config()


@dataclass
class Example(Settings):
    count: Count | Literal["auto"] = 1
    sizes: tuple[Positive, ...] = ()
    half: Annotated[float, Range(low=0, high=0.5, below=True)] = 0.0
    file: str | None = None
    split: str = ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 0}, "--count 0: must be at least 1"),
        ({"sizes": (1.0, -2.0)}, "--sizes -2.0: must be above 0"),
        ({"half": 0.5}, "--half 0.5: must be at least 0 and below 0.5"),
        ({"half": math.nan}, "--half nan: must be a finite number"),
        ({"file": " "}, "--file: is blank; leave it out for the default"),
        ({"count": "auto", "sizes": (0.1,), "half": 0.0, "file": "a", "split": ""}, None),
    ],
)
def test_the_error_names_flag_value_and_range(changes: dict, words: str | None) -> None:
    if words is None:
        assert Example(**changes).count == "auto"
        return
    with pytest.raises(UserError) as caught:
        Example(**changes)
    assert str(caught.value) == words

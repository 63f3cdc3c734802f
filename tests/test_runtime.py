"""Devices, number formats, streams of randomness, and how a script ends."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from minirlhf import runtime
from minirlhf.config import run_script
from minirlhf.runtime import Stream, UserError, autocast, require, resolve_device, resolve_dtype


@dataclass
class Config:
    preset: Literal["small", "large"] = "small"
    """Which defaults."""
    width: int = 1
    """How wide."""
    folder: Path = Path("here")
    """Where."""


PRESETS = {"small": Config(), "large": Config(preset="large", width=100)}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, main=None) -> list[Config]:
    """The configurations that a script's main receives for these arguments."""
    received: list[Config] = []
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    run_script(main or received.append, PRESETS)
    return received


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Config()),
        (["--width", "3", "--folder", "there"], Config(width=3, folder=Path("there"))),
        (["--preset", "large"], Config(preset="large", width=100)),
        (["--preset=large", "--folder=x"], Config(preset="large", width=100, folder=Path("x"))),
        (["--width", "7", "--preset", "large"], Config(preset="large", width=7)),
    ],
)
def test_flags_change_the_preset(arguments: list[str], expected: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *arguments) == [expected]


def fail(config: Config) -> None:
    raise UserError("the file is not there; give another")


def test_a_mistake_of_the_users_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, main=fail)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the file is not there; give another\n" and captured.out == ""


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError):
        run(monkeypatch, "--debug", main=fail)
    assert run(monkeypatch, "--debug", "--width", "2") == [Config(width=2)]


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, main=broken)


@pytest.mark.parametrize("arguments", [["--preset", "huge"], ["--preset=huge"], ["--preset"]])
def test_an_unknown_preset_names_those_there_are(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2 and "small, large" in capsys.readouterr().err


def test_require() -> None:
    require(True, "fine")
    with pytest.raises(UserError, match="^no$"):
        require(False, "no")


def test_no_two_uses_of_randomness_share_a_stream() -> None:
    # An enum takes a repeated value as a second name of the first: members then outnumber values.
    assert len(Stream.__members__) == len({int(stream) for stream in Stream.__members__.values()})
    assert len(Stream) == len(Stream.__members__) and min(Stream) >= 0


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest_device_there_is(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu").type == "cpu"
    for name, available in (("cuda", cuda), ("mps", mps)):
        if available:
            assert resolve_device(name).type == name
        else:
            with pytest.raises(UserError, match=f"--device {name}: not available"):
                resolve_device(name)


def test_auto_is_bfloat16_on_cuda_alone() -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) == resolve_dtype("auto", torch.device("mps")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_dtype("float32", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_matrix_products_in_the_format(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with autocast(torch.device("cpu"), dtype):
        assert (x @ x).dtype == dtype


def test_shipped_files_are_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert runtime.project_file("world", "prompts.test.jsonl").is_file()

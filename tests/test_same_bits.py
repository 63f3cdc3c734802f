"""The alarm of a restructuring: what it compares, and that it says where the first difference is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import same_bits

ROWS = [{"step": 0, "loss": 0.5}, {"step": 1, "loss": float("nan"), "parts": {"kl": [0.0, 2.0]}}]


def write(folder: Path, rows: list[dict], weights: list[float]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_file({"a": torch.zeros(2), "b": torch.tensor(weights)}, folder / "model.safetensors")
    (folder / "run.json").write_text(str(folder), encoding="utf-8")
    place = f"/tmp/same-bits-x_1/{'commit' if folder.name == 'old' else 'here'}/sft/model"
    (folder / "comparison.json").write_text(json.dumps({"reference": place}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("rows", "weights", "names", "expected"),
    [
        (ROWS, [1.0, 0.0], {}, None),
        (ROWS, [1.0, -0.0], {}, "model.safetensors b[1]: 0.0, -0.0 (1 of 2 values)"),
        (ROWS, [1.0], {}, "model.safetensors b: torch.float32 (2,), torch.float32 (1,)"),
        (ROWS[:1], [1.0, 0.0], {}, "metrics.jsonl 2 rows, 1 rows"),
        ([{"loss": 0.25, "step": 0}, ROWS[1]], [1.0, 0.0], {}, "metrics.jsonl row 0, loss: 0.5, 0.25"),
        ([ROWS[0], ROWS[1] | {"kl": 1}], [1.0, 0.0], {}, "metrics.jsonl row 1, kl: nothing, 1"),
        ([ROWS[0], ROWS[1] | {"parts": {"kl": [0, 2.0]}}], [1.0, 0.0], {}, "metrics.jsonl row 1, parts.kl.0: 0.0, 0"),
        ([{"step": 0, "cost": 0.5}], [1.0, 0.0], {"loss": "cost"}, "metrics.jsonl 2 rows, 1 rows"),
        ([{"step": 0, "cost": 0.5}, {**ROWS[1], "loss": 1}], [1.0, 0.0], {"loss": "cost"}, "metrics.jsonl row 1, cost"),
        (ROWS, [1.0, 0.0], {"loss": "cost"}, "metrics.jsonl row 0, cost: 0.5, nothing"),
    ],
)
def test_the_first_difference_of_a_file_is_said(
    rows: list[dict], weights: list[float], names: dict[str, str], expected: str | None, tmp_path: Path
) -> None:
    old, new = write(tmp_path / "old", ROWS, [1.0, 0.0]), write(tmp_path / "new", rows, weights)
    found = same_bits.differences(old, new, names)
    assert found == [] if expected is None else len(found) == 1 and found[0].startswith(expected), found


def test_a_missing_file_and_a_case_without_files_differ(tmp_path: Path) -> None:
    old, new = (write(tmp_path / name, ROWS, [1.0, 0.0]) for name in ("old", "new"))
    (old / "metrics.jsonl").unlink()
    (new / "model.safetensors").unlink()
    assert sorted(same_bits.differences(old, new, {})) == [
        "metrics.jsonl is in this tree alone",
        "model.safetensors is in the commit alone",
    ]
    assert same_bits.differences(tmp_path / "none", tmp_path / "nothing", {}) == ["nothing to compare"]

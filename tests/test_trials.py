"""Studies of many trials: each once, in its own folder, whatever interrupts them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))
from trials import Trial, read_result, run_trials

from minirlhf.runtime import UserError


def count(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a trial, which counts in its folder how often it was run and fails where its settings say so."""
    times = folder / "times"
    times.write_text(times.read_text() + "x" if times.exists() else "x")
    if settings.get("fails") and len(times.read_text()) < 2:
        raise ValueError("as told")
    return {"double": 2 * settings["number"], "times": len(times.read_text())}


def trials(*numbers: int, **settings: Any) -> list[Trial]:
    return [Trial(f"trial-{n}", {"number": n, **settings}) for n in numbers]


def test_each_runs_once_and_a_second_command_reads_what_is_there(tmp_path: Path) -> None:
    first = run_trials(count, trials(3, 1), tmp_path, jobs=2)
    assert first == {"trial-3": {"double": 6, "times": 1}, "trial-1": {"double": 2, "times": 1}}
    assert list(first) == ["trial-3", "trial-1"]
    more = run_trials(count, trials(1, 2, 3), tmp_path)
    assert more == {n: {"double": d, "times": 1} for n, d in (("trial-1", 2), ("trial-2", 4), ("trial-3", 6))}


def test_a_trial_that_fails_is_named_the_others_go_on_and_it_is_tried_again(tmp_path: Path) -> None:
    both = [*trials(1, fails=True), *trials(2)]
    with pytest.raises(UserError, match="trial-1 failed"):
        run_trials(count, both, tmp_path)
    assert "as told" in (tmp_path / "trial-1" / "error.txt").read_text()
    assert read_result(tmp_path, both[1]) == {"double": 4, "times": 1}
    assert run_trials(count, both, tmp_path)["trial-1"] == {"double": 2, "times": 2}
    assert not (tmp_path / "trial-1" / "error.txt").exists()


def test_no_trial_starts_after_its_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_trials(count, trials(1, 2), tmp_path, minutes=0) == {}
    assert "2 of 2 trials are left" in capsys.readouterr().out
    assert not (tmp_path / "trial-1").exists()


def test_a_result_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run_trials(count, trials(1), tmp_path)
    path = tmp_path / "trial-1" / "result.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "settings": {"number": 5}}))
    with pytest.raises(UserError, match="result of other settings"):
        run_trials(count, trials(1), tmp_path)


def test_two_trials_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one name"):
        run_trials(count, trials(1, 1), tmp_path)

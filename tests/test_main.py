"""`python -m minirlhf`: the order of the stages, what is passed to them, and that an earlier run is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import tiny

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import __main__ as main
from minirlhf.evaluate import evaluation
from minirlhf.feedback import __main__ as feedback
from minirlhf.runtime import project_file

MODULES = {
    "sft": train_sft,
    "feedback": feedback,
    "reward": train_reward,
    "ppo": train_ppo,
    "dpo": train_dpo,
    "evaluate": evaluation,
}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Stages that only note their configuration; the last leaves answers behind as the real one does."""
    ran: list[tuple[str, object]] = []

    def stand_in(name: str):
        def stage(config) -> None:
            ran.append((name, config))
            if name == "evaluate":
                answers = [{"prompt": f"\n\nHuman: {i}", "sft": " a", "ppo": " b", "dpo": " c"} for i in range(5)]
                (config.run / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))

        return stage

    monkeypatch.setattr(main, "STAGES", {name: (stand_in(name), config) for name, (_, config) in main.STAGES.items()})
    monkeypatch.setattr(main, "report_on", lambda config: config.run / "report.html")
    return ran


def test_the_stages_are_the_scripts_in_the_order_in_which_they_need_each_other() -> None:
    assert list(main.STAGES) == list(MODULES)
    for name, module in MODULES.items():
        assert main.STAGES[name] == (module.main, module.Config)


@pytest.mark.parametrize("preset", ["tiny", "smoke"])
def test_every_stage_gets_run_seed_and_device(preset: str, stages: list, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seconds = main.main(main.Config(preset=preset, run=run, seed=7, device="cpu"))
    assert [name for name, _ in stages] == list(MODULES) == list(seconds)
    assert json.loads((run / "seconds.json").read_text()) == seconds
    for name, config in stages:
        smaller = main.SMOKE[name] if preset == "smoke" else {}
        expected = {"run": run, "seed": 7, "device": "cpu", **main.DEMO.get(name, {}), **smaller}
        assert asdict(config) == {**asdict(MODULES[name].Config()), **expected}


def test_the_smoke_preset_makes_stages_smaller_and_changes_nothing_else() -> None:
    assert main.SMOKE.keys() == MODULES.keys()
    for name, smaller in main.SMOKE.items():
        default = MODULES[name].Config()
        assert all(value < getattr(default, field) for field, value in smaller.items()), name


def test_a_second_run_moves_the_first_aside_and_says_where(
    stages: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main.main(main.Config(run=run, seed=1, device="cpu"))
    (run / "mine").write_text("kept")
    capsys.readouterr()
    main.main(main.Config(run=run, seed=2, device="cpu"))
    assert (tmp_path / "run.1" / "mine").read_text() == "kept" and not (run / "mine").exists()
    printed = capsys.readouterr().out
    assert f"{run} held an earlier run: it is now {run}.1" in printed
    assert "Human: 2" in printed and "Human: 3" not in printed  # three examples
    assert "  sft: a\n  ppo: b\n  dpo: c\n" in printed


def test_a_run_that_goes_on_keeps_its_folder_and_its_times(stages: list, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main.main(main.Config(run=run, device="cpu"))
    (run / "mine").write_text("kept")
    (run / "seconds.json").write_text(json.dumps({"sft": 100.0}))
    stages.clear()
    seconds = main.main(main.Config(run=run, device="cpu", resume=True))
    assert (run / "mine").exists() and not (tmp_path / "run.1").exists()
    assert 100 <= seconds["sft"] < 101 and seconds["ppo"] < 1  # what an earlier attempt took counts
    for name, config in stages:
        assert name == "evaluate" or config.resume


def test_stages_of_one_run_find_each_others_results(tmp_path: Path) -> None:
    """The paths that `tiny` leaves to the defaults: each stage reads what earlier stages of the same run wrote."""
    run = tiny.finished_run()
    for stage in ("feedback", "reward", "ppo", "dpo"):
        config = json.loads((run / stage / "run.json").read_text())["config"]
        assert all(config.get(name) is None for name in ("policy", "model", "reward_model", "comparisons"))
    for stage in ("reward", "dpo"):
        inputs = json.loads((run / stage / "run.json").read_text())["inputs"]
        assert next(iter(inputs)) == str(run / "feedback" / "rankings.jsonl")


def test_training_never_reads_the_test_prompts() -> None:
    files = {
        name: {f.name: getattr(module.Config(), f.name) for f in fields(module.Config)}
        for name, module in MODULES.items()
    }
    world = {
        name: {k: Path(v).name for k, v in f.items() if isinstance(v, str | Path) and Path(v).suffix}
        for name, f in files.items()
    }
    assert world == {
        "sft": {"train": "demonstrations.train.jsonl"},
        "feedback": {"prompts": "prompts.train.jsonl"},
        "reward": {},
        "ppo": {"prompts": "prompts.train.jsonl"},
        "dpo": {},
        "evaluate": {"prompts": "prompts.test.jsonl"},
    }
    assert project_file("world", "prompts.test.jsonl").is_file()

"""Health hints: each is said when it should be and no other is; healthy runs give none, resumed ones the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import train_dpo
import train_ppo
from minirlhf import reward_functions
from minirlhf.batch import Batch
from minirlhf.files import read_records
from minirlhf.rollout import Rollout
from minirlhf.runs.health import HINTS, RULES, Hints, Row
from minirlhf.runs.log import read_rows
from minirlhf.runs.stage import Stage

STEPS = 60
SETTINGS = {
    "ppo": SimpleNamespace(rollout_size=128, kl_target=1.0, beta=0.1),
    "reward": SimpleNamespace(),
    "dpo": SimpleNamespace(beta=1.0),
}


def healthy(kind: str) -> list[Row]:
    """Rows like those of the demo, with its figures at the beginning and at the end (seed 0)."""
    ends = {
        "ppo": {
            "score": (0.09, 0.91),
            "score_std": (1.0, 0.4),
            "kl": (-1.5e-7, 1.25),
            "response_length": (10.5, 9.7),
            "eos_rate": (1.0, 1.0),
            "explained_variance": (0.0, 0.9),
            "sampling_gap": (0.0, 0.0),
            "entropy": (0.33, 0.127),
            "clip_fraction": (0.09, 0.002),
            "first_ratio_deviation": (1.4e-6, 2.9e-6),
        },
        "reward": {"loss": (0.67, 0.18), "accuracy": (0.54, 0.91)},
        "dpo": {"accuracy": (0.54, 0.93), "reward_chosen": (0.0, -0.6), "margin": (0.0, 2.6)},
    }[kind]
    rows = []
    for step in range(STEPS):
        part = step / (STEPS - 1)
        rows.append({"step": step} | {name: (1 - part) * a + part * b for name, (a, b) in ends.items()})
    return rows


def read_hints(stage: Path) -> list[Row]:
    return read_records(stage / HINTS)


def hints(kind: str, rows: list[Row], folder: Path, **changes: object) -> list[tuple[int, str]]:
    """Step and name of what is said about the rows."""
    config = SimpleNamespace(**vars(SETTINGS[kind]) | changes)
    folder.mkdir(exist_ok=True)
    seen = Hints(folder, config, steps=STEPS)
    for row in rows:
        seen.see(row)
    return [(hint["step"], hint["hint"]) for hint in read_hints(folder)]


@pytest.mark.parametrize("kind", SETTINGS)
def test_healthy_rows_give_no_hint(kind: str, tmp_path: Path) -> None:
    assert hints(kind, healthy(kind), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# (hint, stage, first step at which it is said, what changes the healthy rows, what is not enough)
Change = Callable[[Row], dict[str, float]]
late = 30  # where what goes wrong begins
CASES: list[tuple[str, str, int, Change, Change]] = [
    (
        "first-ratio",
        "ppo",
        30,
        lambda row: {"first_ratio_deviation": 1.1e-4},
        lambda row: {"first_ratio_deviation": 0.9e-4},
    ),
    (  # in half types there is a gap to sampling, and more rounding
        "first-ratio",
        "ppo",
        30,
        lambda row: {"first_ratio_deviation": 0.021, "sampling_gap": 0.03},
        lambda row: {"first_ratio_deviation": 0.019, "sampling_gap": 0.03},
    ),
    # one rollout of 128: -14 / 128 - 0.01 = -0.119; ten of them: -0.021, first at the tenth
    (
        "kl-below-0",
        "ppo",
        30,
        lambda row: {"kl": -0.12},
        lambda row: {"kl": -0.118 if row["step"] == 30 else row["kl"]},
    ),
    ("kl-below-0", "ppo", 39, lambda row: {"kl": -0.022}, lambda row: {"kl": -0.020}),
    # the third of three that have a mean above 3: rows 30 and 31 are 3.3, and row 29 is 0.6
    ("kl-beyond-target", "ppo", 32, lambda row: {"kl": 3.3}, lambda row: {"kl": 2.9}),
    ("clip-fraction", "ppo", 30, lambda row: {"clip_fraction": 0.51}, lambda row: {"clip_fraction": 0.49}),
    (  # -0.12 takes all five rows to be beyond the limit; a value model that has yet to learn is a little below 0
        "explained-variance",
        "ppo",
        34,
        lambda row: {"explained_variance": -0.12},
        lambda row: {"explained_variance": -0.09},
    ),
    ("length", "ppo", 32, lambda row: {"response_length": 22.0}, lambda row: {"response_length": 20.0}),
    ("equal-rewards", "ppo", 30, lambda row: {"score_std": 0.0}, lambda row: {"score_std": 1e-3}),
    ("no-eos", "ppo", 30, lambda row: {"eos_rate": 0.0}, lambda row: {"eos_rate": 0.02}),
    ("entropy", "ppo", 32, lambda row: {"entropy": 0.02}, lambda row: {"entropy": 0.04}),
    # half of the steps are done, and 50 batches are there
    ("chance", "reward", 49, lambda row: {"accuracy": 0.5}, lambda row: {"accuracy": 0.56}),
    # measured on held-out pairs at step 30, after half of the steps
    (
        "chance",
        "dpo",
        30,
        lambda row: {"validation_accuracy": 0.54},
        lambda row: {"validation_accuracy": 0.56},
    ),
    # more than a quarter of the margin: rows 20 to 39 decide first, of which ten are changed
    (
        "both-fall",
        "dpo",
        39,
        lambda row: {"reward_chosen": -4.0, "margin": 4.0},
        lambda row: {"reward_chosen": -0.9, "margin": 4.0},
    ),
    (  # about a nat and a half, with the ten rows before
        "both-fall",
        "dpo",
        39,
        lambda row: {"reward_chosen": -2.6, "margin": 2.0},
        lambda row: {"reward_chosen": -0.4, "margin": 2.0},
    ),
    *(  # a smaller part of the margin; less than a nat; a margin that does not rise
        ("both-fall", "dpo", 39, lambda row: {"reward_chosen": -4.0, "margin": 4.0}, fine)
        for fine in (
            lambda row: {"reward_chosen": -1.2, "margin": 6.0},
            lambda row: {"reward_chosen": -0.9, "margin": 2.0},
            lambda row: {"reward_chosen": -4.0, "margin": -1.0},
        )
    ),
]


@pytest.mark.parametrize(("name", "kind", "step", "wrong", "fine"), CASES, ids=[case[0] for case in CASES])
def test_each_hint_is_said_once_and_alone(
    name: str, kind: str, step: int, wrong: Change, fine: Change, tmp_path: Path
) -> None:
    def changed(change: Change) -> list[Row]:
        always = kind == "reward"  # whose first half is not judged
        return [{**row, **change(row)} if always or row["step"] >= late else row for row in healthy(kind)]

    found = hints(kind, changed(wrong), tmp_path / "wrong")
    assert [hint for _, hint in found] == [name]
    assert found[0][0] == step
    assert hints(kind, changed(fine), tmp_path / "fine") == []


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in CASES} == RULES.keys()
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    _, _, hints_of_the_page = page.partition("\n## Hints\n")
    assert set(re.findall(r"^\| `([\w-]+)` \|", hints_of_the_page, re.M)) == RULES.keys()


def test_a_long_answer_without_a_better_score_is_not_of_the_rewards_making(tmp_path: Path) -> None:
    rows = [{**row, "response_length": 10.0 + row["step"], "score": -row["step"]} for row in healthy("ppo")]
    assert hints("ppo", rows, tmp_path) == []


def test_the_first_iterations_of_a_value_model_and_early_training_are_not_judged(tmp_path: Path) -> None:
    rows = [{**row, "explained_variance": -2.0 if row["step"] < 3 else 0.5} for row in healthy("ppo")]
    assert hints("ppo", rows, tmp_path) == []
    rows = [{**row, "validation_accuracy": 0.5 if row["step"] < 28 else 0.9} for row in healthy("dpo")]
    assert hints("dpo", rows, tmp_path) == []


def test_the_first_three_iterations_are_the_measure_of_entropy_and_length(tmp_path: Path) -> None:
    """Means of 1 nat and of 10 tokens; of two of them they would be 1.5 and 13."""
    first = [(3.0, 20.0), (0.0, 6.0), (0.0, 4.0)]
    rows = healthy("ppo")
    for row, (entropy, length) in zip(rows, first, strict=False):
        row |= {"entropy": entropy, "response_length": length}
    still = [row if row["step"] < 3 else {**row, "entropy": 0.105, "response_length": 19.5} for row in rows]
    assert hints("ppo", still, tmp_path / "still") == []
    gone = [row if row["step"] < 3 else {**row, "entropy": 0.095, "response_length": 20.5} for row in rows]
    assert {name for _, name in hints("ppo", gone, tmp_path / "gone")} == {"entropy", "length"}


def test_an_iteration_without_a_number_is_passed_over(tmp_path: Path) -> None:
    """Online DPO logs no margin in an iteration without a pair; the others are judged as if it were not there."""
    names = ("accuracy", "reward_chosen", "margin")
    rows = [{**row, "reward_chosen": -4.0} if row["step"] >= late else row for row in healthy("dpo")]
    gaps = [{"step": row["step"]} if row["step"] in (3, 31, 35) else row for row in rows]
    assert hints("dpo", gaps, tmp_path) == [(39, "both-fall")] and set(names) <= rows[0].keys()


def test_the_newest_iteration_alone_says_that_the_ratio_is_off(tmp_path: Path) -> None:
    rows = healthy("ppo")
    rows[7]["first_ratio_deviation"] = 1.5e-4  # with the one before it the mean is below the limit, 1e-4
    assert hints("ppo", rows, tmp_path) == [(7, "first-ratio")]


def test_without_a_target_no_kl_is_beyond_it(tmp_path: Path) -> None:
    rows = [{**row, "kl": 50.0} for row in healthy("ppo")]
    assert hints("ppo", rows, tmp_path, kl_target=None) == []


def test_the_bound_on_a_negative_kl_holds_for_samples() -> None:
    """P(mean log-ratio of n samples <= -x) <= exp(-n x), for two distributions over three tokens, by simulation."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    draws = torch.multinomial(policy, 20_000 * 8, replacement=True, generator=torch.Generator().manual_seed(0))
    means = (policy / reference).log()[draws].view(20_000, 8).mean(dim=1)
    for x in (0.05, 0.1, 0.3):
        assert (means <= -x).double().mean() <= torch.tensor(-8 * x).exp()


# --------------------------------------------------------------------------------------------------------- real stages
def run_ppo(folder: Path, **changes: object) -> list[str]:
    """Names of the hints of a small PPO run."""
    run = tiny.copy_of(tiny.finished_run(), folder, "sft", "reward")
    tiny.run_stage("ppo", run, **changes)
    return [hint["hint"] for hint in read_hints(run / "ppo")]


def change_rollouts(patch: pytest.MonkeyPatch, change: Callable[[Rollout], Rollout]) -> None:
    collect = train_ppo.collect
    patch.setattr(train_ppo, "collect", lambda *args, **kwargs: change(collect(*args, **kwargs)))


def test_a_stage_says_that_old_log_probabilities_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_rollouts(monkeypatch, lambda r: replace(r, old_logprobs=torch.where(r.mask, r.old_logprobs - 0.01, 0.0)))
    assert run_ppo(tmp_path, iterations=1) == ["first-ratio"]


def test_a_stage_says_that_the_kl_is_negative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_rollouts(monkeypatch, lambda r: replace(r, ref_logprobs=torch.where(r.mask, r.ref_logprobs + 2.0, 0.0)))
    assert run_ppo(tmp_path, iterations=1) == ["kl-below-0"]


def test_a_stage_says_that_the_kl_leaves_its_target(tmp_path: Path) -> None:
    assert run_ppo(tmp_path, kl_target=1e-3) == ["kl-beyond-target"]


def test_a_stage_says_that_no_response_ends(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no-eos" in run_ppo(tmp_path, max_new_tokens=1, iterations=1)
    said = capsys.readouterr().err
    assert "hint: ppo, step 0, no-eos: 0% of the responses end by themselves (eos_rate)" in said


def constant(_: object) -> Callable[[Batch], torch.Tensor]:
    return lambda batch: torch.full((len(batch),), 0.25)


def test_a_resumed_stage_has_the_hints_of_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(reward_functions, "reward_function", constant)
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward")
    settings = {"missing_eos_score": None, "checkpoint_every": 1}
    with pytest.MonkeyPatch.context() as patch:
        finish = Stage.finish

        def stopped(self: Stage, step: int, *args: object, **kwargs: object) -> None:
            finish(self, step, *args, **kwargs)
            if step == 1:
                raise KeyboardInterrupt

        patch.setattr(Stage, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            tiny.run_stage("ppo", run, **settings)
    before = (run / "ppo" / "hints.jsonl").read_text()
    tiny.run_stage("ppo", run, resume=True, **settings)
    assert capsys.readouterr().err.count("equal-rewards") == 1, "said once a run, not once a process"
    assert (run / "ppo" / "hints.jsonl").read_text() == before
    assert [(hint["step"], hint["hint"]) for hint in read_hints(run / "ppo")] == [(0, "equal-rewards")]
    marker = json.loads((run / "ppo" / "stage.json").read_text())
    assert "hints.jsonl" in marker["outputs"]
    tiny.run_stage("ppo", run, resume=True, **settings)  # finished, and left as it is


def test_hints_of_rows_that_a_resumed_run_drops_are_dropped(tmp_path: Path) -> None:
    rows = [{**row, "eos_rate": 0.0} if row["step"] >= late else row for row in healthy("ppo")]
    assert hints("ppo", rows, tmp_path) == [(late, "no-eos")]
    again = Hints(tmp_path, SETTINGS["ppo"], steps=STEPS, rows=rows[:late])
    assert read_hints(tmp_path) == []
    (said,) = again.see(rows[late])
    assert said.startswith(f"step {late}, no-eos: ") and again.see(rows[late + 1]) == []
    once_more = Hints(tmp_path, SETTINGS["ppo"], steps=STEPS, rows=rows[: late + 1])
    assert [hint["step"] for hint in read_hints(tmp_path)] == [late] and once_more.see(rows[late + 1]) == []


def test_a_stage_that_learns_nothing_says_so(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "feedback")
    train_dpo.main(replace(tiny.dpo_config(run), learning_rate=0.0))
    assert read_rows(run / "dpo")[-1]["validation_accuracy"] == 0.5  # every pair is a tie
    assert [hint["hint"] for hint in read_hints(run / "dpo")] == ["chance"]

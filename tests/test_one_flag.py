"""A new user's file and one flag: real command lines, from an empty folder, with files of each form people have.

The real files are read in place; a slice of each is written to the test's own folder, so that a run takes seconds.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from labelling import benchmark

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data, tokenizer
from minirlhf.config import run_script
from minirlhf.encode import encode_demonstrations
from minirlhf.feedback import label_studio
from minirlhf.files import write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runs.log import read_rows

ROWS = 40  # a tenth is held out, and a batch is 32


def command(module: ModuleType, *arguments: str, **smaller: Any) -> None:
    """A command line, from its words on; raises SystemExit as the process would end.

    smaller  defaults that only make the run shorter
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
        run_script(module.main, {"tiny": replace(module.PRESETS["tiny"], **smaller)})


def hh(real: Path, folder: Path) -> Path:
    file = folder / "hh.jsonl.gz"
    with gzip.open(real / "preference" / "hh-helpful-base.train.jsonl.gz", "rt", encoding="utf-8") as whole:
        lines = [line for line in whole if len(line) < 700][:ROWS]
    with gzip.open(file, "wt", encoding="utf-8") as some:
        some.writelines(lines)
    return file


def alpaca(real: Path, folder: Path) -> Path:
    file = folder / "alpaca.json"
    rows = json.loads((real / "sft" / "small-instructions.json").read_text(encoding="utf-8"))
    file.write_text(json.dumps(rows[:ROWS]), encoding="utf-8")
    return file


def label_studio_export(real: Path, folder: Path) -> Path:
    """Tasks as `python -m minirlhf.feedback export` writes them, labelled as Label Studio's export has it."""
    pairs = data.load(real / "preference" / "polite-instructions.json", "pairs", split=f"[:{ROWS}]")
    answers = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]} for r in pairs]
    write_records(folder / "candidates.jsonl", answers)
    config = label_studio.ExportConfig(candidates=folder / "candidates.jsonl", output=folder / "tasks.json")
    tasks = json.loads(label_studio.export_tasks(config).read_text(encoding="utf-8"))
    better = {record["chosen"].strip() for record in pairs}
    for number, task in enumerate(tasks):
        side = "left" if task["data"]["answer1"] in better else "right"
        result = {"type": "pairwise", "from_name": "comparison", "value": {"selected": side}}
        task |= {"id": number, "annotations": [{"completed_by": 1, "was_cancelled": False, "result": [result]}]}
    file = folder / "export.json"
    file.write_text(json.dumps(tasks), encoding="utf-8")
    return file


FORMS = {"hh": hh, "alpaca": alpaca, "label-studio": label_studio_export}


def assert_trained(stage: str, kind: Any) -> None:
    rows = read_rows(Path("runs/tiny") / stage)
    assert rows and all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    kind.from_pretrained(f"runs/tiny/{stage}/model")


@pytest.mark.parametrize("form", FORMS)
def test_one_flag_trains_a_model(
    form: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(FORMS[form](real_data, tmp_path))
    if form != "alpaca":  # a pair needs a model to start from: the error is the command that makes it
        for module in (train_reward, train_dpo):
            with pytest.raises(SystemExit, match="2"):
                command(module, "--comparisons", file)
            assert f"run `python train_sft.py --run runs/tiny --train {file}` first" in capsys.readouterr().err
    command(train_sft, "--train", file, n_layer=1, n_embd=64)
    assert_trained("sft", GPT)
    rows = read_rows(Path("runs/tiny/sft"))
    assert rows[-1]["loss"] < rows[0]["loss"]
    if form == "alpaca":
        with pytest.raises(SystemExit, match="2"):
            command(train_ppo)
        assert "run `python train_reward.py --run runs/tiny` first" in capsys.readouterr().err
        return
    command(train_dpo, "--comparisons", file, epochs=1.0)
    assert_trained("dpo", GPT)
    if form == "hh":
        command(train_reward, "--comparisons", file, epochs=1.0, reference_samples=8)
        assert_trained("reward", RewardModel)


def test_rows_of_real_files_fit_a_new_model(real_data: Path, capsys: pytest.CaptureFixture) -> None:
    """The context that a new model gets by default, in tokens of the world's vocabulary: nearly everything stays."""
    config = train_sft.Config(train="a user's file")
    encoding = tokenizer.load("world")
    width = train_sft.new_shape(config, encoding).n_positions
    assert width == 512 and train_sft.new_shape(train_sft.Config(), encoding).n_positions == 96
    assert train_sft.new_shape(train_sft.Config(train="x", n_positions=8), encoding).n_positions == 8
    records = data.load(real_data / "preference" / "hh-helpful-base.train.jsonl.gz", "demonstrations")
    capsys.readouterr()
    kept = encode_demonstrations(encoding, records, max_length=width)
    cut = sum(example.cut > 0 for example in kept)
    assert (len(records), len(kept), cut) == (1392, 1351, 404)
    said = capsys.readouterr().out
    assert "demonstrations: 41 of 1392 left out, nothing to learn from in 512 tokens" in said
    assert "demonstrations: 404 of 1392 lost the start of their prompt to fit 512 tokens" in said
    for record in records[:200]:  # bytes make up what the world's words do not
        ids = tokenizer.encode(encoding, record["prompt"] + record["response"])
        assert tokenizer.decode(encoding, ids) == record["prompt"] + record["response"]


def test_comparisons_without_prompts_train_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts, one better than the other: the one prompt, nothing, is asked for every reference sample."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": "", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(40)]
    write_records(tmp_path / "pairs.jsonl", pairs)
    command(train_sft, "--train", "pairs.jsonl", n_layer=1, n_embd=16, epochs=1.0)
    command(train_reward, "--comparisons", "pairs.jsonl", reference_samples=6, epochs=1.0)
    after = json.loads((tmp_path / "runs/tiny/reward/normalisation.json").read_text())["after"]
    assert abs(after["mean"]) < 1e-4 and abs(after["std"] - 1) < 1e-4


def test_the_pairs_and_prompts_of_the_sentiment_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/using.md, with a stand-in of the set's columns and order."""
    import datasets

    page = (Path(__file__).parent.parent / "docs" / "using.md").read_text(encoding="utf-8")
    rows = [{"text": f"review {i} is long and says so", "label": int(i >= 6)} for i in range(12)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    monkeypatch.chdir(tmp_path)
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    pairs = data.load("imdb-pairs.jsonl", "pairs")
    numbers = [(int(p["chosen"].split()[1]), int(p["rejected"].split()[1])) for p in pairs]
    assert sorted(better for better, _ in numbers) == list(range(6, 12)) and {w for _, w in numbers} == set(range(6))
    prompts = data.load("imdb-prompts.jsonl", "prompts")
    assert [p["prompt"] for p in prompts] == [f"review {i} is long" for i in range(12)]


# ------------------------------------------------------------------------------------------------------- the benchmarks
@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of benchmarks/ import their shared module by its bare name."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


def test_three_steps_of_the_gpt2_preset_at_a_reduced_size(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = benchmark("gpt2_steps")

    def in_this_process(target: Any, config: Any) -> dict[str, Any]:
        assert config.preset == "gpt2"
        target(config)
        return {"seconds": 0.0, "cpu_seconds": 0.0, "peak_gib": 0.0}

    monkeypatch.setattr(steps, "measure", in_this_process)
    results = steps.main(["--size", "tiny"])
    assert [(r["recipe"], r["stage"]) for r in results] == [(r, s) for r in ("hh", "sentiment") for s in steps.STAGES]
    assert all(len(r["step_seconds"]) == 3 and min(r["step_tokens"]) > 0 for r in results)


def test_sft_is_a_plain_transformers_loop(benchmarks: None, tmp_path: Path) -> None:
    """With float64 weights, so that rounding hides nothing: schedule, groups, clipping, mask, denominators, batches."""
    parity = benchmark("sft_parity")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 48}
    model = parity.initial_model(tmp_path / "initial", "world", 1, shape)
    GPT.from_pretrained(model).double().save_pretrained(model)
    text = " ".join(f"{i} cats eat {i * i} fish." for i in range(300))
    alpaca = [
        {"instruction": f"Add {i} and {i}.", "input": "", "output": f"It is {2 * i}." * (i % 5)} for i in range(150)
    ]
    for name, content in (("text", text.replace(". ", ".\n")), ("alpaca", json.dumps(alpaca))):
        (tmp_path / name).write_text(content)
        config = parity.task_config(
            tmp_path / f"run-{name}", model, tmp_path / name, epochs=4.0, learning_rate=2e-2, seed=1
        )
        result = parity.compare(config)
        assert result["steps"] >= 20 and result["held_out_minirlhf"] < 0.75 * result["held_out_before"]
        assert result["relative_difference"] < 1e-6  # the held-out loss is logged in float32
        assert result["largest_difference_of_a_training_loss"] < 1e-5  # transformers takes its loss in float32

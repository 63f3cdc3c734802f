"""The worked example of an answer that can be checked: its problems, what counts as right, and the whole of it once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
from labelling import benchmark

from minirlhf import data, reward_functions, tokenizer
from minirlhf.batch import pad
from minirlhf.encode import encode_demonstrations
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward_functions import arithmetic
from minirlhf.runs.log import read_rows


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """studies/arithmetic.py with small files of problems."""
    for folder in ("studies", "data"):
        monkeypatch.syspath_prepend(Path(__file__).parent.parent / folder)
    module = benchmark("arithmetic", "studies")
    monkeypatch.setattr(module.make_arithmetic, "SIZES", {"demonstrations": 200, "problems": 100, "test": 50})
    yield module
    sys.modules.pop("arithmetic")


def test_problems_are_right_in_one_file_only_and_the_same_each_time(study: ModuleType, tmp_path: Path) -> None:
    make = study.make_arithmetic
    files, again = make.write(tmp_path / "a", 0), make.write(tmp_path / "b", 0)
    other = make.write(tmp_path / "c", 1)
    prompts = []
    for name in files:
        assert files[name].read_bytes() == again[name].read_bytes() != other[name].read_bytes()
        records = data.load(files[name], "demonstrations")
        texts = [r["prompt"] for r in records], [r["response"] for r in records]
        assert arithmetic(*texts) == [1.0] * make.SIZES[name]
        for prompt, answer in zip(*texts, strict=True):
            *lines, last = answer.strip().split("\n")
            assert len(lines) == make.TERMS - 1 and last == f"#### {lines[-1].split('=')[1]}"
            assert all(eval(line.replace("=", "==")) for line in lines)
            assert prompt.startswith("\n\nHuman: ") and int(last[5:]) >= 0
        prompts += texts[0]
    assert len(set(prompts)) == 350  # no held-out problem is learned from


def test_the_longest_worked_answer_has_room(study: ModuleType) -> None:
    encoding = tokenizer.load("world")
    longest = f" {9 + 9}\n".replace(
        " 18\n", " 9+9=18\n18+9=27\n27+9=36\n#### 36"
    )  # largest numbers, each of two digits
    assert reward_functions.final_answer(longest) == 9 * study.make_arithmetic.TERMS
    (row,) = encode_demonstrations(encoding, [{"prompt": "9+9+9+9", "response": longest}], max_length=64)
    assert pad([row]).mask.sum() <= study.LONGEST


def test_what_is_counted_as_right(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are problems and columns their answers; a stand-in for the model answers the first with its number."""
    shape = GPTConfig(vocab_size=tiny.ENCODING.n_vocab, n_positions=8, n_layer=1, n_head=1, n_embd=4)
    GPT(shape, seed=0).save_pretrained(tmp_path)
    tokenizer.save(tiny.ENCODING, tmp_path)
    monkeypatch.setattr(study, "generate", lambda model, prompts, *, keys, **settings: keys)
    monkeypatch.setattr(
        study.reward_functions, "texts", lambda encoding, keys: (None, [f"#### {i + k}" for _, i, k in keys])
    )
    right = study.answers(tmp_path, ["0+0", "1+1", "2+1"], samples=3, temperature=1.0, seed=0)
    assert right.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_measures_of_known_answers(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = {"sft": [[1, 0], [0, 0], [0, 0], [1, 0]], "rl": [[1, 1], [1, 0], [0, 0], [1, 1]]}

    def answers(folder: Path, prompts: list[str], *, samples: int, temperature: float, seed: int) -> np.ndarray:
        found = np.array(sampled[folder.name], dtype=float)
        return found if temperature else found[:, 1:]

    monkeypatch.setattr(study, "answers", answers)
    found = study.measure({name: Path(name) for name in sampled}, ["p"] * 4, 0)
    means = {name: {kind: value["mean"] for kind, value in m.items()} for name, m in found.items()}
    # SFT: 2 of 8 sampled, 0 of 4 greedy, 2 of 4 problems; RL: 5 of 8, 2 of 4, 3 of 4.
    assert means["sft"] == {"sampled": 0.25, "greedy": 0.0, "pass_at_8": 0.5, "gain": 0.0}
    assert means["rl"] == {"sampled": 0.625, "greedy": 0.5, "pass_at_8": 0.75, "gain": 0.375}
    # The gains are 1/2, 1/2, 0 and 1/2 a problem: paired, no draw of problems gives a loss.
    low, high = found["rl"]["gain"]["interval"]
    assert low >= 0 and high == 0.5
    assert "| 0 | rl | 62.5 (" in study.table({"0": found}) and "+37.5 (+" in study.table({"0": found})


def test_the_whole_example_once(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", "--smoke", "--run", str(tmp_path), "--seeds", "3"])
    study.main()
    (path,) = tmp_path.glob("*-arithmetic.json")
    result = json.loads(path.read_text())
    assert list(result["seeds"]["3"]) == ["sft", "ppo", "rloo", "longer", "rejection"]
    assert result["seeds"]["3"]["sft"]["gain"]["mean"] == 0 and result["problems"] == 20
    assert {"seed-3/sft", "seed-3/ppo", "seed-3/rloo", "seed-3/longer/sft", "seed-3/rejection-sft/sft"} <= set(
        result["training_seconds"]
    )
    steps = [sum(row["optimizer_steps"] for row in read_rows(tmp_path / "seed-3" / way)) for way in ("ppo", "rloo")]
    longer = len(read_rows(tmp_path / "seed-3" / "longer" / "sft"))  # whole batches an epoch: a few more
    assert steps[0] == steps[1] <= longer <= 1.2 * steps[0]
    learned = data.load(tmp_path / "seed-3" / "right.jsonl", "demonstrations")
    assert arithmetic([r["prompt"] for r in learned], [r["response"] for r in learned]) == [1.0] * len(learned)
    before = path.read_bytes()
    study.main()  # finished stages are left as they are, and the figures are the same
    assert json.loads(before)["seeds"] == json.loads(path.read_text())["seeds"]

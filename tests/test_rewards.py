"""Rewards from functions: how one is found, what it is given, what it may not return, and answers that are checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_ppo
from minirlhf import data, reward_functions
from minirlhf.batch import pad
from minirlhf.encode import encode_example
from minirlhf.files import write_records
from minirlhf.reward_functions import AnswerKey, Reward, arithmetic, final_answer, function_reward, work_out
from minirlhf.runs.log import read_rows
from minirlhf.runtime import UserError

BATCH = pad(
    [encode_example(tiny.ENCODING, f" is it {n}?", " yes" * n, max_length=40) for n in (1, 3, 2)],
)


@pytest.fixture(autouse=True)
def modules_of_the_test_alone() -> Iterator[None]:
    """A module written for one test is not found by the next."""
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


# ------------------------------------------------------------------------------------------------------ finding them
def test_a_function_in_the_current_folder_and_one_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_a.py").write_text("def count(prompts, responses):\n    return [len(r) for r in responses]\n")
    assert reward_functions.load("own_a:count")([""], ["four"]) == [4]
    assert reward_functions.load("minirlhf.rewards:arithmetic") is arithmetic


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("own_none:f", "--reward own_none:f: cannot import own_none: No module named 'own_none'"),
        ("own_b:missing", "--reward own_b:missing: nothing called missing in "),
        ("own_b:number", "--reward own_b:number: number is a int, and cannot be called"),
        ("own_wrong:f", "--reward own_wrong:f: cannot import own_wrong: "),
        ("own_needs:f", "--reward own_needs:f: cannot import own_needs: No module named 'own_nothing'"),
        ("own_b", "must be package.module:function"),
        ("own_b.py:f:g", "must be package.module:function"),
        (":f", "must be package.module:function"),
        ("../own_b:f", "must be package.module:function"),
    ],
)
def test_what_cannot_be_found(spec: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_b.py").write_text("number = 3\n")
    (tmp_path / "own_wrong.py").write_text("def f(:\n")
    (tmp_path / "own_needs.py").write_text("import own_nothing\n")
    with pytest.raises(UserError) as caught:
        reward_functions.load(spec)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- what they get and give
def of(function: object) -> Reward:
    return function_reward("own:f", function, tiny.ENCODING)


def test_texts_have_no_eos_and_scores_come_back_by_row() -> None:
    seen = []

    def score(prompts: list[str], responses: list[str]) -> list[int]:
        seen.append((prompts, responses))
        return [response.count("yes") for response in responses]

    scores = of(score)(BATCH)
    assert scores.dtype == torch.float32 and scores.tolist() == [1, 3, 2]
    assert seen == [([" is it 1?", " is it 3?", " is it 2?"], [" yes", " yes yes yes", " yes yes"])]
    assert of(lambda p, r: torch.tensor([0.5, 1.0, -1.0]))(BATCH).tolist() == [0.5, 1, -1]
    unconditional = pad([encode_example(tiny.ENCODING, "", " yes", max_length=40)])
    assert reward_functions.texts(tiny.ENCODING, unconditional) == ([""], [" yes"])


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, 2.0], "--reward own:f: gave 2 scores for 3 responses"),
        ([1.0] * 4, "--reward own:f: gave 4 scores for 3 responses"),
        ([1.0, float("nan"), 0.0], "--reward own:f: gave nan to ' yes yes yes'; a score must be a finite number"),
        ([1.0, 0.0, float("inf")], "gave inf to ' yes yes'"),
        (["good", "bad", "bad"], "must return one number per response"),
        (None, "must return one number per response, not None"),
        (0.5, "must return one number per response, not 0.5"),
    ],
)
def test_what_they_may_not_give(returned: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        of(lambda prompts, responses: returned)(BATCH)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_function_raises_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        of(lambda prompts, responses: [1 / 0])(BATCH)


def test_several_are_added_up() -> None:
    functions = {"own:f": lambda p, r: [1, 2, 3], "own:g": lambda p, r: [10, 20, 30]}
    total = reward_functions.reward_of(train_ppo.Config(), [], functions, tiny.ENCODING)
    assert total(BATCH).tolist() == [11, 22, 33]


# -------------------------------------------------------------------------------------------------------- in the stage
def ppo(run: Path, **changes: object) -> list[dict]:
    train_ppo.main(replace(tiny.ppo_config(run), iterations=1, missing_eos_score=None, **changes))
    return read_rows(run / "ppo")


def test_functions_replace_the_reward_model_or_are_added_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    finished = tiny.finished_run()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_c.py").write_text(
        "def one(prompts, responses):\n    return [1.0] * len(prompts)\n"
        "def long(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    rollouts = tiny.spy(monkeypatch, train_ppo, "end_iteration")
    run = tiny.copy_of(finished, tmp_path / "alone", "sft")  # no reward model there
    (row,) = ppo(run, reward=("own_c:long", "own_c:one"))
    alone = rollouts[-1].arguments["experience"]
    lengths = torch.tensor([float(len(r)) for r in reward_functions.texts(tiny.ENCODING, alone)[1]])
    torch.testing.assert_close(alone.scores, lengths + 1)
    assert row["score"] == pytest.approx(lengths.mean().item() + 1) and "value_loss" in row

    reward_model = str(finished / "reward" / "model")
    only = tiny.copy_of(finished, tmp_path / "only", "sft", "reward")
    ppo(only)
    both = tiny.copy_of(finished, tmp_path / "both", "sft")
    ppo(both, reward=("own_c:long",), reward_model=reward_model)
    model_alone, summed = (call.arguments["experience"].scores for call in rollouts[-2:])
    torch.testing.assert_close(summed, model_alone + lengths)  # the same rollout: the same seed and policy

    resumed = replace(tiny.ppo_config(run), iterations=1, missing_eos_score=None, reward=("own_c:long", "own_c:one"))
    train_ppo.main(replace(resumed, resume=True))
    assert "ppo: is finished" in capsys.readouterr().out
    (tmp_path / "own_c.py").write_text((tmp_path / "own_c.py").read_text() + "# altered\n")
    with pytest.raises(UserError, match=r"own_c\.py: altered since"):
        train_ppo.main(replace(resumed, resume=True))


def test_a_function_that_is_not_there_ends_the_stage_before_it_begins(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft")
    with pytest.raises(UserError, match="cannot import own_gone"):
        ppo(run, reward=("own_gone:f",))
    assert not (run / "ppo").exists()


# ------------------------------------------------------------------------------------------------------ final answers
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", 7),
        ("#### 1\n#### 2", 2),
        ("####72", 72),
        ("#### -3", -3),
        ("#### 1,234,567.", 1234567),
        ("#### $18.50", Fraction(37, 2)),
        ("#### 3.00 apples", 3),
        ("#### 0.1", Fraction(1, 10)),
        ("the answer is 7", None),
        ("####", None),
        ("#### seven", None),
        ("### 7", None),
        ("", None),
    ],
)
def test_the_final_answer(text: str, answer: object) -> None:
    assert final_answer(text) == answer


def test_right_or_wrong_by_the_expression_of_the_prompt() -> None:
    prompt = "\n\nHuman: 31 + 58 - 12\n\nAssistant:"
    assert arithmetic([prompt] * 4, [" #### 77", " 31 + 58 = 89\n#### 77.0", "77", "#### 78"]) == [1, 1, 0, 0]
    assert arithmetic(["What is 3+4*5?", "2 * -3 =", "007 + 1"], ["#### 23", "#### -6", "#### 8"]) == [1, 1, 1]
    with pytest.raises(UserError, match="no arithmetic in the prompt 'Who is it"):
        arithmetic(["Who is it?"], ["#### 1"])


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), min_size=1, max_size=5), st.integers(0, 99))
def test_expressions_are_worked_out_as_python_does(rest: list[tuple[str, int]], first: int) -> None:
    expression = f"{first}" + "".join(f" {sign} {number}" for sign, number in rest)
    assert work_out(expression) == eval(expression)
    assert arithmetic([f"\n\nHuman: {expression}\n\nAssistant:"], [f" #### {eval(expression)}"]) == [1]


def test_the_answer_key_reads_the_form_of_gsm8k(tmp_path: Path) -> None:
    rows = [{"question": f"Add {n} and 1.", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in (1, 2)]
    write_records(tmp_path / "gsm8k.jsonl", rows)
    key = AnswerKey.read(str(tmp_path / "gsm8k.jsonl"))
    prompts = [record["prompt"] for record in data.load(tmp_path / "gsm8k.jsonl", "prompts")]
    assert prompts[0] == "\n\nHuman: Add 1 and 1.\n\nAssistant:"
    assert key(prompts, [" It is 2.\n#### 2", "#### 2"]) == [1, 0]
    with pytest.raises(UserError, match="no known answer to the prompt 'Add 1"):
        key(["Add 1 and 1."], ["#### 2"])
    with pytest.raises(UserError, match="without `#### answer`"):
        AnswerKey([("p", "2")])
    with pytest.raises(UserError, match="two final answers to the prompt 'p': 2 and 3"):
        AnswerKey([("p", "#### 2"), ("p", "#### 3")])


def test_the_answer_key_of_the_real_file(real_data: Path) -> None:
    file = str(real_data / "sft" / "gsm8k.train.jsonl.gz")
    key = AnswerKey.read(file)
    records = data.load(file, "demonstrations")
    assert len(key.answers) == len(records) == 3000
    right = key([r["prompt"] for r in records], [r["response"] for r in records])
    assert right == [1.0] * 3000

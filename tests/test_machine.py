"""Labels by machine: each labeller says what its model says, about the questions that people are asked."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from tiny import ENCODING, PROMPTS

import train_sft
from minirlhf import data, tokenizer
from minirlhf.batch import Example, pad
from minirlhf.encode import encode_example, encode_prompt
from minirlhf.evaluate import judges
from minirlhf.evaluate.judges import comparison_text
from minirlhf.feedback import machine, pairs, stats
from minirlhf.feedback.agreement import order_bias, share
from minirlhf.feedback.labels import Candidates, Label, read_labels
from minirlhf.feedback.machine import by_orders, tasks_and_file, write_labels
from minirlhf.feedback.pairs import worked_comparisons
from minirlhf.feedback.tasks import Task, make_tasks
from minirlhf.files import write_records
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runtime import UserError
from minirlhf.world import Labeller


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three answers to each of twelve prompts of the world, of very different length."""
    file = tmp_path_factory.mktemp("machine") / "candidates.jsonl"
    answers = [" Yes.", " I do not know.", " The seal lives in the sea and likes swimming and is grey and eats fish."]
    write_records(file, [{"prompt": p, "responses": answers} for p in PROMPTS[:12]])
    return file


# ----------------------------------------------------------------------------------------------------------- all alike
def test_the_questions_are_those_that_people_are_asked(candidates: Path, tmp_path: Path) -> None:
    config = machine.MachineConfig(
        candidates=candidates, output=tmp_path / "m.jsonl", labeller="m", pairs_per_prompt=2, seed=5
    )
    seen, _ = tasks_and_file(config)
    people = make_tasks(config, "anna", repeat_share=0.1)
    assert {task.key for task in seen} == {task.key for task in people if not task.repeat}
    assert len(seen) == 24 and len({task.shown for task in seen}) == 2


def test_what_a_machine_says_is_written_as_labels(candidates: Path, tmp_path: Path, capsys) -> None:
    config = machine.MachineConfig(candidates=candidates, output=tmp_path / "m.jsonl", labeller="m", max_items=4)
    tasks, output = tasks_and_file(config)
    labels = [task.label("m", said) for task, said in zip(tasks, [(0, 1), (1, 0), (0, 0), None], strict=True)]
    labels[1] = replace(labels[1], scores=(1.5, 2.0), orders=(0.75, 0.5))
    write_labels(output, labels)
    first, second, third, fourth = read_labels(tmp_path / "m.jsonl")
    assert first.verdict == ("left" if first.shown[0] == 0 else "right") and first.ranks == (0, 1)
    assert second.verdict == ("left" if second.shown[0] == 1 else "right") and second.ranks == (1, 0)
    assert second.scores == (1.5, 2.0) and second.orders == (0.75, 0.5)
    assert (third.verdict, fourth.verdict) == ("tie", "skip") and {x.labeller for x in (first, fourth)} == {"m"}
    assert "4 labels, 1 of them skips" in capsys.readouterr().out
    with pytest.raises(UserError, match="m.jsonl: exists already"):
        tasks_and_file(config)


def test_rankings_have_their_verdict(candidates: Path, tmp_path: Path) -> None:
    config = machine.MachineConfig(candidates=candidates, output=tmp_path / "m.jsonl", max_items=2, mode="rankings")
    (one, other), output = tasks_and_file(config)
    write_labels(output, [one.label("m", (2, 0, 1)), other.label("m", (0, 0, 0))])
    ranked, tie = read_labels(tmp_path / "m.jsonl")
    assert (ranked.verdict, ranked.ranks, tie.verdict) == ("ranked", (2, 0, 1), "tie")


def task(*shown: int) -> Task:
    return Task(Candidates("p", tuple(f" {i}" for i in range(len(shown)))), shown)


@pytest.mark.parametrize(
    "orders, margin, ranks",
    [
        ((0.9, 0.2), 0.0, (1, 0)),  # shown[0] is response 1: (0.9 + 0.8) / 2 = 0.85 for it
        ((0.9, 0.95), 0.0, (0, 1)),  # likes whatever comes first: (0.9 + 0.05) / 2 = 0.475
        ((1.0, 1.0), 0.0, (0, 0)),  # nothing but a liking for the first place
        ((0.6, 0.5), 0.06, (0, 0)),  # 0.55, within the margin
        ((0.6, 0.5), 0.04, (1, 0)),
    ],
)
def test_both_orders_are_averaged(orders: tuple, margin: float, ranks: tuple) -> None:
    label = by_orders(machine.ByJudge(tie_margin=margin), task(1, 0), [orders])
    assert (label.ranks, label.orders, label.scores) == (ranks, orders, None)


def test_a_ranking_is_by_the_sum_over_all_pairs() -> None:
    # places 0, 1, 2 show responses 2, 0, 1; P(0 beats 1) = 0.9, P(0 beats 2) = 0.4, P(1 beats 2) = 0.52
    orders = [(0.9, 0.1), (0.5, 0.7), (0.52, 0.48)]
    # places: 0.9 + 0.4 = 1.3, 0.1 + 0.52 = 0.62, 0.6 + 0.48 = 1.08
    found = by_orders(machine.ByJudge(), task(2, 0, 1), orders)
    assert found.ranks == (2, 1, 0) and found.orders is None
    assert found.scores == pytest.approx((0.31, 0.54, 0.65))
    tied = by_orders(machine.ByJudge(tie_margin=0.1), task(2, 0, 1), [(0.5, 0.5), (0.9, 0.1), (0.9, 0.1)])
    assert tied.ranks == (0, 1, 0)


def test_a_judge_that_always_takes_the_first_has_no_preference_and_is_found_out() -> None:
    labels = [Label("p", (" a", f" {i}"), (0, 0), "tie", "j", shown=(0, 1), orders=(1.0, 0.8)) for i in range(3)]
    labels.append(Label("p", (" a", " b"), (0, 1), "left", "j", shown=(0, 1), orders=(0.7, 0.1)))
    bias = order_bias(labels)["j"]
    # (3 x 1.8 + 0.8) / 8 = 0.775; the first three say "the first" twice
    assert bias == {"first": pytest.approx(0.775), "contradictions": share(3, 4)}
    summary = stats.summarise(labels)
    assert summary["order_bias"] == {"j": bias}
    words = "j gives the one it reads first a probability of 0.775 on average; its two orders contradict each other in"
    assert f"{words} 75.0% (30.1% to 95.4%) of 4 pairs" in stats.table(summary)


# ----------------------------------------------------------------------------------------------------------- labellers
def test_simulated_people_with_their_settings(candidates: Path, tmp_path: Path) -> None:
    settings = {"temperature": 0.0, "noise": 0.4, "length_bias": 0.05, "seed": 4}
    output = machine.simulated(
        machine.Simulated(candidates=candidates, output=tmp_path / "s.jsonl", mode="rankings", **settings)
    )
    people = Labeller(**settings)
    labels = read_labels(output)
    assert len(labels) == 12 and {label.labeller for label in labels} == {"simulated"}
    for found in labels:
        assert list(found.ranks) == people.rank(found.prompt, found.responses, key=found.item)
    honest = Labeller(**{**settings, "noise": 0.0, "length_bias": 0.0})
    assert any(list(x.ranks) != honest.rank(x.prompt, x.responses, key=x.item) for x in labels)


def test_other_prompts_than_the_worlds_are_refused(tmp_path: Path) -> None:
    write_records(tmp_path / "c.jsonl", [{"prompt": "Hello?", "responses": [" Yes.", " No."]}])
    with pytest.raises(UserError, match="--by simulated: not a prompt of the zoo: 'Hello[?]'"):
        machine.simulated(machine.Simulated(candidates=tmp_path / "c.jsonl", output=tmp_path / "s.jsonl"))
    assert not (tmp_path / "s.jsonl").exists()


def test_a_reward_model_ranks_by_its_score(candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TASKS", 5)  # 12 tasks in 3 parts
    run = tiny.finished_run()
    config = machine.ByReward(
        run=run, candidates=candidates, output=tmp_path / "r.jsonl", mode="rankings", device="cpu"
    )
    labels = read_labels(machine.reward_model(replace(config, micro_batch_tokens=64)))
    model = RewardModel.from_pretrained(run / "reward" / "model")
    for found in labels:
        scores = []
        for text in found.responses:
            row = encode_example(ENCODING, found.prompt, text, max_length=96)
            batch = pad([row])
            scores.append(model(batch.tokens, batch.lengths).item())
        assert found.scores == pytest.approx(scores, abs=1e-5)  # float32 in another batch
        assert list(found.ranks) == [sorted(scores, reverse=True).index(score) for score in scores]
    assert len({found.ranks for found in labels}) > 1, "ranks that are all alike would not tell rows apart"


def test_a_reward_model_scores_ids_as_they_were_sampled_and_skips_what_does_not_fit(tmp_path: Path) -> None:
    row = {"prompt": PROMPTS[0], "responses": [" Yes.", " No."], "response_ids": [[5, 6, 7], [8]]}
    long = {"prompt": PROMPTS[1], "responses": [" Yes.", " No" * 100]}
    write_records(tmp_path / "c.jsonl", [row, long])
    run = tiny.finished_run()
    config = machine.ByReward(run=run, candidates=tmp_path / "c.jsonl", output=tmp_path / "r.jsonl", device="cpu")
    by_prompt = {found.prompt: found for found in read_labels(machine.reward_model(config))}
    assert by_prompt[PROMPTS[1]].verdict == "skip"
    model = RewardModel.from_pretrained(run / "reward" / "model")
    prompt = encode_prompt(ENCODING, PROMPTS[0])
    batch = pad([Example(prompt, ids) for ids in row["response_ids"]])
    found = by_prompt[PROMPTS[0]]
    expected = dict(zip(row["responses"], model(batch.tokens, batch.lengths).tolist(), strict=True))
    assert found.scores == pytest.approx([expected[text] for text in found.responses], abs=1e-5)


# --------------------------------------------------------------------------------------------------------------- judge
def share_of_a(model: GPT, text: str) -> float:
    """P(" A") / (P(" A") + P(" B")) by the softmax's definition."""
    prompt = encode_prompt(ENCODING, text)
    a, b = (
        tiny.response_logprobs(model, prompt, tokenizer.encode(ENCODING, verdict)).sum().exp()
        for verdict in (" A", " B")
    )
    return (a / (a + b)).item()


def test_a_judge_model_is_asked_in_both_orders(candidates: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(judges, "QUESTIONS", 10)  # 24 questions in 3 parts
    folder = tiny.finished_run() / "sft" / "model"
    config = machine.ByJudge(
        candidates=candidates,
        output=tmp_path / "j.jsonl",
        model=str(folder),
        instruction="Judge. ",
        micro_batch_tokens=128,
        device="cpu",
    )
    labels = read_labels(machine.judge_model(config))
    model = GPT.from_pretrained(folder)
    assert len(labels) == 12
    for found in labels:
        first, second = (found.responses[i] for i in found.shown)
        q = share_of_a(
            model, f"\n\nHuman: Judge. {found.prompt}\n\n[A]{first}\n\n[B]{second}\n\nBetter: [\n\nAssistant:"
        )
        back = share_of_a(
            model, f"\n\nHuman: Judge. {found.prompt}\n\n[A]{second}\n\n[B]{first}\n\nBetter: [\n\nAssistant:"
        )
        assert found.orders == pytest.approx((q, back), abs=1e-5)  # float32 in another batch
        assert found.ranks == by_orders(config, task(*found.shown), [found.orders]).ranks


def test_a_judge_model_ranks_from_all_pairs(candidates: Path, tmp_path: Path) -> None:
    folder = tiny.finished_run() / "sft" / "model"
    config = machine.ByJudge(
        candidates=candidates,
        output=tmp_path / "j.jsonl",
        mode="rankings",
        model=str(folder),
        max_items=3,
        device="cpu",
    )
    model = GPT.from_pretrained(folder)
    for found in read_labels(machine.judge_model(config)):
        for i, score in enumerate(found.scores):
            mine, rest = found.responses[i], [text for text in found.responses if text != found.responses[i]]
            shares = [
                (share_of_a(model, comparison_text(found.prompt, mine, other)), 1)
                + (share_of_a(model, comparison_text(found.prompt, other, mine)),)
                for other in rest
            ]
            assert score == pytest.approx(sum((q + one - back) / 2 for q, one, back in shares) / 2, abs=1e-5)


def test_a_comparison_too_long_for_the_judge_loses_its_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tiny.finished_run() / "sft" / "model"
    long = PROMPTS[0].replace("Human:", "Human:" + " please" * 90)
    write_records(tmp_path / "c.jsonl", [{"prompt": long, "responses": [" Yes.", " No."]}])
    config = machine.ByJudge(
        candidates=tmp_path / "c.jsonl", output=tmp_path / "j.jsonl", model=str(folder), device="cpu"
    )
    (found,) = read_labels(machine.judge_model(config))
    assert (
        "2 of 2 questions to the judge model lost their start to fit the judge's 96 tokens" in capsys.readouterr().out
    )
    model, verdicts = GPT.from_pretrained(folder), [tokenizer.encode(ENCODING, v) for v in (" A", " B")]
    first, second = (found.responses[i] for i in found.shown)
    ids = encode_prompt(ENCODING, comparison_text(long, first, second))[-(96 - max(map(len, verdicts))) :]
    a, b = (tiny.response_logprobs(model, ids, verdict).sum().exp() for verdict in verdicts)
    assert found.orders[0] == pytest.approx((a / (a + b)).item(), abs=1e-5)  # float32 in another batch


def test_worked_comparisons_show_every_pair_in_both_orders() -> None:
    record = {"prompt": "p", "responses": [" x", " y", " z"], "ranks": [1, 0, 1]}
    shown = {(row["prompt"], row["response"]) for row in worked_comparisons(record)}
    assert shown == {
        ("\n\nHuman: p\n\n[A] y\n\n[B] x\n\nBetter: [\n\nAssistant:", " A"),
        ("\n\nHuman: p\n\n[A] x\n\n[B] y\n\nBetter: [\n\nAssistant:", " B"),
        ("\n\nHuman: p\n\n[A] y\n\n[B] z\n\nBetter: [\n\nAssistant:", " A"),
        ("\n\nHuman: p\n\n[A] z\n\n[B] y\n\nBetter: [\n\nAssistant:", " B"),
    }
    assert len(worked_comparisons(record)) == 4


def test_training_reads_worked_comparisons_as_they_are(tmp_path: Path) -> None:
    """A reader that took them for messages would put a dialogue around them that no judge is asked in."""
    rows = worked_comparisons({"prompt": PROMPTS[0], "responses": [" Yes.", " No."], "ranks": [0, 1]})
    write_records(tmp_path / "v.jsonl", rows)
    assert data.load(tmp_path / "v.jsonl", "demonstrations") == rows


def test_labels_train_a_judge_that_labels(tmp_path: Path) -> None:
    """From labels to verdicts, to a judge that gives verdicts and nothing else, and to its labels."""
    rows = [{"prompt": f"{i:02}", "responses": [" Yes.", " No."], "ranks": [0, 1]} for i in range(20)]
    write_records(tmp_path / "labels.jsonl", rows)
    files = {"labels": (tmp_path / "labels.jsonl",), "output": tmp_path / "train.jsonl"}
    pairs.main(pairs.Config(**files, form="verdicts", held_out_share=0.2))
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 32  # 16 prompts, both orders
    held_out = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    config = tiny.sft_config(tmp_path / "judge")
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "held-out.jsonl")}
    folder = train_sft.main(replace(config, **files, learning_rate=1e-2))
    model, prompt = GPT.from_pretrained(folder), encode_prompt(ENCODING, held_out[0]["prompt"])
    verdicts = [tokenizer.encode(ENCODING, verdict) for verdict in (" A", " B")]
    assert sum(tiny.response_logprobs(model, prompt, verdict).sum().exp() for verdict in verdicts) > 0.5
    write_records(tmp_path / "c.jsonl", rows)
    labelling = machine.ByJudge(candidates=tmp_path / "c.jsonl", output=tmp_path / "j.jsonl", model=str(folder))
    assert len(read_labels(machine.judge_model(labelling))) == 20


# ------------------------------------------------------------------------------------------------------- command lines
def test_by_names_the_labeller_wherever_it_stands(candidates: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for number, flags in enumerate((["--by", "simulated", "--noise", "1"], ["--noise", "1", "--by=simulated"])):
        output = tmp_path / f"{number}.jsonl"
        files = ["--candidates", str(candidates), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["feedback", "label", *files, *flags])
        runpy.run_module("minirlhf.feedback", run_name="__main__", alter_sys=True)
        assert len(read_labels(output)) == 12
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    for flags in (["--by", "nobody"], ["--by"], ["--by="]):
        monkeypatch.setattr(sys, "argv", ["feedback", "label", *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("minirlhf.feedback", run_name="__main__", alter_sys=True)
        assert stop.value.code == 2 and "not one of label --by simulated, label --by reward" in capsys.readouterr().err


def test_people_and_machines_agree_in_the_statistics(candidates: Path, tmp_path: Path) -> None:
    """The same items by name, so that `stats` can compare them."""
    one = machine.simulated(machine.Simulated(candidates=candidates, output=tmp_path / "a.jsonl", temperature=0.0))
    other = machine.reward_model(
        machine.ByReward(run=tiny.finished_run(), candidates=candidates, output=tmp_path / "b.jsonl", device="cpu")
    )
    first, second = read_labels(one), read_labels(other)
    assert {x.item for x in first} == {x.item for x in second}
    assert json.loads(one.read_text().splitlines()[0])["labeller"] == "simulated"

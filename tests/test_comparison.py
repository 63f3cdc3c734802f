"""Models against each other: every figure by its definition, laws of models that change places, and mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_bad_commands import assert_clear, make_files, tree
from test_evaluate import score
from tiny import ENCODING, EOS

from minirlhf import data, tokenizer
from minirlhf.config import run_script
from minirlhf.encode import Record, encode_prompt
from minirlhf.evaluate import __main__ as evaluate
from minirlhf.evaluate import comparison, evaluation
from minirlhf.evaluate.comparison import table
from minirlhf.evaluate.judges import Answers, JudgeModel, ModelFolder, RewardScorer, comparison_text
from minirlhf.evaluate.statistics import bootstrap_interval, length_controlled
from minirlhf.evaluate.texts import RUDE_WORDS, distinct_n, rude_words, self_overlap
from minirlhf.files import write_records
from minirlhf.generate import generate
from minirlhf.hf import folder
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.runtime import Stream, UserError
from minirlhf.tokenizer import response_text
from minirlhf.world import judge

COUNT, SAMPLES = 6, 3
PROMPTS = tiny.PROMPTS[:COUNT]


def config_of(models: tuple[str, ...], out: Path, **changes) -> comparison.Config:
    run = tiny.finished_run()
    settings = {"prompts": str(run / "prompts.jsonl"), "max_prompts": COUNT, "samples": SAMPLES, "seed": tiny.SEED}
    settings |= {"max_new_tokens": tiny.LONGEST, "micro_batch_tokens": 100, "device": "cpu", "out": out}
    return comparison.Config(models=tuple(str(run / m) for m in models), **(settings | changes))


def answers_in(out: Path) -> list[Record]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[Record], Path]:
    """A comparison with everything that can be asked for; the judge model is a model that was taught no verdicts."""
    out, run = tmp_path_factory.mktemp("comparison"), tiny.finished_run()
    more = {"judge": "world", "judge_model": str(run / "sft"), "reward_model": str(run / "reward")}
    summary = comparison.main(config_of(("sft", "ppo/model"), out, **more))
    return summary, answers_in(out), out


def load(stage: str) -> GPT:
    return GPT.from_pretrained(tiny.finished_run() / stage / "model").eval().requires_grad_(False)


def sampled_alone(model: GPT, i: int, k: int) -> list[int]:
    prompt = encode_prompt(ENCODING, PROMPTS[i])
    keys = [(Stream.EVALUATION, i, k)]
    limits = {"max_new_tokens": tiny.LONGEST, "eos_id": EOS, "seed": tiny.SEED}
    return generate(model, [prompt], keys=keys, **limits).response_ids()[0]


def of(answers: list[Record], model: str, name: str) -> np.ndarray:
    """(P, K) a figure of all answers of a model."""
    return np.array([a[name] for a in answers if a["model"] == model]).reshape(COUNT, SAMPLES)


# ------------------------------------------------------------------------------------------------------------- answers
def test_every_answer_by_its_definition(whole: tuple) -> None:
    _, answers, out = whole
    assert len(data.load(out / "answers.jsonl", "demonstrations")) == len([a for a in answers if a["response"].strip()])
    expected = [(m, i, k) for m in ("sft", "ppo") for i in range(COUNT) for k in range(SAMPLES)]
    models = {name: load(name) for name in ("sft", "ppo")}
    for answer, (model, i, k) in zip(answers, expected, strict=True):
        ids, prompt = sampled_alone(models[model], i, k), encode_prompt(ENCODING, PROMPTS[i])
        assert (answer["model"], answer["prompt"], answer["sample"]) == (model, PROMPTS[i], k)
        assert answer["response"] == response_text(ENCODING, ids)
        assert (answer["length"], answer["finished"]) == (len(ids), ids[-1] == EOS)
        mark = judge(PROMPTS[i], answer["response"])
        for part in ("total", "helpful", "honest", "harmless"):
            assert answer[part] == getattr(mark, part)
        assert answer["reward"] == pytest.approx(score(PROMPTS[i], ids), abs=1e-5)
        under = [tiny.response_logprobs(models[name], prompt, ids).sum().item() for name in (model, "sft")]
        assert answer["kl"] == pytest.approx(under[0] - under[1], abs=1e-4)  # a sum of float32 numbers


def test_every_figure_is_that_of_the_answers(whole: tuple, capsys: pytest.CaptureFixture) -> None:
    summary, answers, out = whole
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["prompts"], summary["samples"], summary["baseline"]) == (COUNT, SAMPLES, "sft")
    assert summary["reference"] == str(tiny.finished_run() / "sft" / "model")
    words = rude_words(RUDE_WORDS)
    for name, row in summary["models"].items():
        plain = ("total", "helpful", "honest", "harmless", "kl", "length", "reward")
        values = {figure: of(answers, name, figure) for figure in plain} | {"eos_rate": of(answers, name, "finished")}
        texts = of(answers, name, "response")
        values["rude"] = np.array([[bool(words.findall(text)) for text in own] for own in texts])
        values["self_overlap"] = np.array([[self_overlap(list(own))] for own in texts])
        points = np.sign(of(answers, name, "total") - of(answers, "sft", "total")) / 2 + 0.5
        values["win_rate"] = points
        for figure, found in values.items():
            by_prompt = found.mean(axis=1)
            assert row[figure]["mean"] == pytest.approx(by_prompt.mean(), abs=1e-6), figure
            ends = bootstrap_interval(by_prompt, seed=tiny.SEED)
            assert row[figure]["interval"] == pytest.approx(ends, abs=1e-6), figure
        longer = of(answers, name, "length") - of(answers, "sft", "length")
        assert row["length_controlled_win_rate"]["mean"] == pytest.approx(length_controlled(points, longer))
        low, high = row["length_controlled_win_rate"]["interval"]
        assert low <= row["length_controlled_win_rate"]["mean"] <= high
        for n in (1, 2):
            assert row[f"distinct_{n}"] == distinct_n(texts.ravel().tolist(), n)
        pairs = np.corrcoef(of(answers, name, "reward").ravel(), of(answers, name, "total").ravel())[0, 1]
        assert row["reward_correlation"]["mean"] == pytest.approx(pairs, abs=1e-5)
    assert summary["models"]["ppo"]["win_rate"]["mean"] != 0.5


def probability_of_a(text: str) -> float:
    """P(" A") among " A" and " B" after a text that may be longer than the context."""
    model = load("sft")
    verdicts = [tokenizer.encode(ENCODING, v) for v in (" A", " B")]
    ids = encode_prompt(ENCODING, text)[-(model.config.n_positions - max(map(len, verdicts))) :]
    a, b = (tiny.response_logprobs(model, ids, verdict).sum() for verdict in verdicts)
    return torch.sigmoid(a - b).item()


def test_the_judge_model_is_asked_in_both_orders(whole: tuple) -> None:
    summary, answers, _ = whole
    mine, theirs = (of(answers, name, "response").ravel().tolist() for name in ("ppo", "sft"))
    points, first, contradicting = [], [], []
    for prompt, a, b in zip(np.repeat(PROMPTS, SAMPLES).tolist(), mine, theirs, strict=True):
        if a == b:
            points.append(0.5)
            continue
        one, other = (probability_of_a(comparison_text(prompt, x, y)) for x, y in ((a, b), (b, a)))
        points.append(((one > 0.5) + (other < 0.5)) / 2)
        first += [one > 0.5, other > 0.5]
        contradicting.append((one > 0.5) == (other > 0.5))
    row = summary["models"]["ppo"]["judge_model"]
    assert row["win_rate"]["mean"] == pytest.approx(np.mean(points))
    assert row["first_preferred"] == pytest.approx(np.mean(first))
    assert row["contradictions"] == pytest.approx(np.mean(contradicting))
    against_itself = summary["models"]["sft"]["judge_model"]
    assert against_itself["win_rate"] == {"mean": 0.5, "interval": (0.5, 0.5)}
    assert against_itself["first_preferred"] is None  # equal texts are no question


def test_the_instruction_comes_before_the_question(capsys: pytest.CaptureFixture) -> None:
    folder = ModelFolder.find(str(tiny.finished_run() / "sft"), GPT)
    asked, found = ("What?", " Yes.", " No."), []
    for instruction in ("", "The bear eats honey. "):
        found += JudgeModel(folder, instruction, torch.device("cpu"), 100).preferred([asked])
        expected = probability_of_a(comparison_text(*asked, instruction=instruction))
        # As log odds, since this model is sure of itself; a difference of float32 numbers.
        assert np.log(1 / found[-1] - 1) == pytest.approx(np.log(1 / expected - 1), abs=1e-4)
    assert abs(np.log(1 / found[0] - 1) - np.log(1 / found[1] - 1)) > 0.1 and capsys.readouterr().out == ""
    JudgeModel(folder, "", torch.device("cpu"), 100).preferred([asked, ("What? " * 99, " Yes.", " No.")])
    assert (
        "1 of 2 questions to the judge model lost their start to fit the judge's 96 tokens" in capsys.readouterr().out
    )


def test_the_table_has_every_figure_and_no_empty_column(whole: tuple) -> None:
    summary, _, _ = whole
    *parts, foot = table(summary).split("\n\n")
    heads = [re.split(r"\s{2,}", part.split("\n")[0])[1:] for part in parts]
    assert [head[0] for head in heads] == ["judge", "win rate", "judge model: win rate", "KL", "reward"]
    assert heads[0][2:] == ["helpful", "honest", "harmless"]
    assert heads[3][2:] == ["length", "EOS", "distinct-1", "distinct-2", "self-overlap", "rude"]
    assert {head[1] for head in heads} == {"95 % interval"}
    ppo = summary["models"]["ppo"]
    diverse = re.split(r"\s{2,}", parts[3].split("\n")[2])[5:7]
    assert diverse == [f"{ppo[f'distinct_{n}']:.3f}" for n in (1, 2)]
    cells = re.split(r"\s{2,}", parts[0].split("\n")[2])
    low, high = ppo["total"]["interval"]
    assert cells[:3] == ["ppo", f"{ppo['total']['mean']:z.2f}", f"{low:z.2f} to {high:z.2f}"]
    assert cells[3:] == [f"{ppo[part]['mean']:z.2f}" for part in ("helpful", "honest", "harmless")]
    assert foot.startswith("6 prompts, 3 answers each; wins are against sft")
    for part in parts:
        assert len({len(line) for line in part.split("\n")}) == 1  # columns stand below each other
    bare = {"prompts": 1, "samples": 1, "baseline": "a", "reference": None}
    bare["models"] = {"a": {"length": {"mean": 2.0, "interval": (1, 3)}, "self_overlap": None}}
    assert table(bare).split("\n")[:2] == ["model  length", "a         2.0"]
    assert "1 prompts, 1 answer each;" in table(bare)


# ---------------------------------------------------------------------------------------------------------------- laws
def test_models_that_change_places_and_a_model_against_itself(whole: tuple, tmp_path: Path) -> None:
    summary, _, _ = whole
    more = {"judge": "world", "judge_model": str(tiny.finished_run() / "sft")}
    back = comparison.main(config_of(("ppo", "sft", "ppo"), tmp_path, **more))["models"]
    assert list(back) == ["1 ppo", "2 sft", "3 ppo"]
    first, sft, again = back.values()
    ppo = summary["models"]["ppo"]
    for there, here in ((ppo, sft), (ppo["judge_model"], sft["judge_model"])):
        for figure in ("win_rate", "length_controlled_win_rate"):
            assert here[figure]["mean"] == pytest.approx(1 - there[figure]["mean"], abs=1e-6)
            low, high = there[figure]["interval"]
            assert here[figure]["interval"] == pytest.approx((1 - high, 1 - low), abs=1e-6)
    for figure in ("first_preferred", "contradictions"):
        assert ppo["judge_model"][figure] == sft["judge_model"][figure]
    assert sft["kl"]["mean"] > 0.01  # to the baseline, which is now PPO
    assert {**again, "kl": 0} == {**first, "kl": 0}
    for row in (first, again, again["judge_model"]):
        for figure in ("win_rate", "length_controlled_win_rate"):
            assert row[figure] == {"mean": 0.5, "interval": (0.5, 0.5)}
    assert abs(again["kl"]["mean"]) < 1e-5


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert comparison.short_names(["runs/a/sft", "/x/runs/a/ppo/model", "gpt2"]) == ["sft", "ppo", "gpt2"]
    assert comparison.short_names(["a/sft", "b/sft/model", "c/dpo"]) == ["a/sft", "b/sft", "c/dpo"]
    assert comparison.short_names(["sft", "other/sft"]) == ["sft", "other/sft"]
    assert comparison.short_names(["a/sft/model", "a/sft", "b/dpo"]) == ["1 sft", "2 sft", "3 dpo"]
    monkeypatch.chdir(tmp_path)
    assert comparison.short_names([".", "gpt2"]) == [tmp_path.name, "gpt2"]


def test_the_reference_of_the_kl(tmp_path: Path) -> None:
    dpo = str(tiny.finished_run() / "dpo")
    rows = comparison.main(config_of(("sft", "dpo"), tmp_path, reference=dpo))["models"]
    assert abs(rows["dpo"]["kl"]["mean"]) < 1e-5 < rows["sft"]["kl"]["mean"]
    rows = comparison.main(config_of(("sft", "dpo"), tmp_path, reference="none", samples=1))["models"]
    assert "kl" not in rows["dpo"] and rows["dpo"]["self_overlap"] is None
    assert not {"judge_model", "reward", "reward_agreement"} & rows["dpo"].keys()


def longest_word(prompts: list[str], responses: list[str]) -> list[float]:
    return [max(map(len, response.split()), default=0) for response in responses]


def wrong_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0]


def test_a_function_judges_text_that_is_not_of_the_world(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    long = " ".join(["more"] * 300)  # loses its start for the models, and not for the judge
    prompts = ["Write a haiku.", f"Summarise: {long}"]
    write_records(file, [{"prompt": prompt} for prompt in prompts])
    more = {"prompts": str(file), "judge": "test_comparison:longest_word"}
    summary = comparison.main(config_of(("sft", "ppo"), tmp_path / "out", **more))
    answers = answers_in(tmp_path / "out")
    assert [a["prompt"] for a in answers[: 2 * SAMPLES : SAMPLES]] == prompts
    assert [a["total"] for a in answers] == longest_word([], [a["response"] for a in answers])
    assert "helpful" not in summary["models"]["sft"]
    with pytest.raises(UserError, match=r"--judge test_comparison:wrong_number: gave 1 scores for 6 responses"):
        comparison.main(
            config_of(("sft", "ppo"), tmp_path / "out", **(more | {"judge": "test_comparison:wrong_number"}))
        )


def test_a_reward_model_with_another_tokenizer_reads_the_texts(tmp_path: Path) -> None:
    spelled = tokenizer.load("bytes")
    gpt = GPT(GPTConfig(vocab_size=spelled.n_vocab, n_positions=400, n_layer=1, n_head=1, n_embd=8))
    model = RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(0)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(spelled, tmp_path / "model")
    more = {"judge": str(tmp_path), "reference": "none", "samples": 1}
    comparison.main(config_of(("sft", "ppo"), tmp_path / "out", **more))
    answers = answers_in(tmp_path / "out")
    assert {answer["finished"] for answer in answers} == {True, False}
    for answer in answers:
        ids = [*answer["prompt"].encode(), *answer["response"].encode(), *[spelled.eot_token] * answer["finished"]]
        expected = model(torch.tensor([ids]), torch.tensor([len(ids)])).item()
        assert answer["total"] == pytest.approx(expected, abs=1e-5)
    small = ModelFolder(tmp_path / "model", spelled, positions=3)
    text = Answers(["p:"], ["four"], generate(load("sft"), [[1]], max_new_tokens=1, eos_id=EOS), ENCODING)
    with pytest.raises(UserError, match="an answer does not fit its 3 tokens; lower --max-new-tokens"):
        RewardScorer(small, torch.device("cpu"), 100)(text)


def test_random_orders_ask_every_pair_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list] = []

    def preferred(self: object, questions: list) -> list[float]:
        asked.append(questions)
        return [1.0] * len(questions)

    monkeypatch.setattr(comparison.JudgeModel, "preferred", preferred)
    more = {"judge_model": str(tiny.finished_run() / "sft"), "orders": "random"}
    row = comparison.main(config_of(("sft", "ppo"), tmp_path, **more))["models"]["ppo"]
    answers = answers_in(tmp_path)
    mine, theirs = (of(answers, name, "response").ravel().tolist() for name in ("ppo", "sft"))
    prompts = np.repeat(PROMPTS, SAMPLES).tolist()
    pairs = [(p, {a, b}) for p, a, b in zip(prompts, mine, theirs, strict=True) if a != b]
    assert [(prompt, {one, other}) for prompt, one, other in asked[1]] == pairs and asked[0] == []
    shown = [q[1] in mine for q in asked[1]]
    assert 0 < sum(shown) < len(shown)
    assert row["judge_model"]["first_preferred"] == 1.0 and row["judge_model"]["contradictions"] is None
    assert "total" not in row and "win_rate" not in row  # no judge of single answers was asked for


# ------------------------------------------------------------------------------------------------------------ mistakes
def started() -> None:
    """What `python -m minirlhf.evaluate` does."""
    chosen = evaluate.command(sys.argv[1:])
    run_script(chosen.main, chosen.PRESETS)


TWO = "{run}/sft {run}/dpo "
ROWS = [
    ("{run}/sft", "name two models or more, as in: python -m minirlhf.evaluate runs/tiny/sft runs/tiny/ppo"),
    ("{run}/sft {file}/nothing", "nothing: no such folder"),
    ("{run}/sft {file}/bert", "model_type is 'bert' (supported: 'gpt2')"),
    ("{run}/sft {file}/other", "the model a vocabulary of 7; give the tokenizer"),
    ("{run}/sft {file}/bare", "bare: no model.safetensors; save the model again"),
    ("{run}/sft {run}/reward", "reward/model: holds GPT2ForSequenceClassification, and not a language model"),
    ("{run}/sft {file}/bytes", "bytes: has not the tokenizer of {run}/sft/model, so there is no KL between them"),
    (TWO + "--judge {run}/sft", "--judge {run}/sft/model: holds GPT2LMHeadModel, and not a reward model"),
    (TWO + "--judge {file}/nothing", "nothing: no such folder"),
    (TWO + "--judge ", "--judge: is blank; leave it out for the default"),
    (TWO + "--judge no_such.module:f", "--judge no_such.module:f: cannot import no_such.module"),
    (TWO + "--judge math:no_such", "--judge math:no_such: nothing called no_such"),
    (TWO + "--judge a:b:c", "--judge a:b:c: must be package.module:function"),
    (
        TWO + "--prompts {file}/prompt.jsonl",
        "'p:' is no prompt of the embedded world, and its judge knows no other; compare the models by another --judge",
    ),
    (TWO + "--prompts {file}/missing.jsonl", "missing.jsonl: no such file"),
    (TWO + "--prompts {file}/blank.jsonl", "blank.jsonl:2: the prompt is blank"),
    (TWO + "--judge-model {run}/reward", "--judge-model {run}/reward/model: holds GPT2ForSequenceClassification"),
    (TWO + "--reward-model {run}/dpo", "--reward-model {run}/dpo/model: holds GPT2LMHeadModel, and not a reward model"),
    (TWO + "--reference {file}/nothing", "nothing: no such folder"),
    (TWO + "--reference {run}/reward", "--reference {run}/reward/model: holds GPT2ForSequenceClassification"),
    (TWO + "--instruction Judge!", "--instruction: is for a judge that sees both answers"),
    (TWO + "--orders random", "--orders: is for a judge that sees both answers; give --judge-model"),
    (TWO + "--orders each", "invalid choice 'each' for argument '--orders'"),
    (TWO + "--max-new-tokens 96", "--max-new-tokens 96: the context of {run}/sft/model, 96 tokens, leaves no room"),
    (TWO + "--samples 0", "--samples 0: must be at least 1"),
    (TWO + "--rude-words {file}/missing.txt", "missing.txt: no such file; give a text file with a word"),
    (TWO + "--out {file}/prompt.jsonl", "prompt.jsonl is not a folder; give another --out"),
    (TWO + "--out {file}/prompt.jsonl/out", "prompt.jsonl is not a folder; give another --out"),
    (TWO + "--sampels 2", "--samples INT"),
    (TWO + "--device mps", "--device mps: not available on this machine"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_files(tmp_path_factory.mktemp("bad"))
    shutil.copytree(folder / "run" / "sft" / "model", folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    spelled = tokenizer.load("bytes")
    size = {"n_positions": 96, "n_layer": 1, "n_head": 1, "n_embd": 4}
    GPT(GPTConfig(vocab_size=spelled.n_vocab, **size)).save_pretrained(folder / "bytes")
    tokenizer.save(spelled, folder / "bytes")
    return folder


@pytest.mark.parametrize(("words", "error"), ROWS, ids=[row[0] for row in ROWS])
def test_a_mistake_is_one_clear_error_before_any_weights(
    words: str, error: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    places = {"run": files / "run", "file": files}
    before = tree(files)
    monkeypatch.setattr(folder, "safe_open", loaded)
    for kind in (GPT, RewardModel):
        monkeypatch.setattr(kind, "from_pretrained", loaded)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    given = [word.format(**places) for word in words.split(" ")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given, *([] if "--out" in given else ["--out", str(files / "out")])])
    with pytest.raises(SystemExit) as stop:
        started()
    assert_clear(stop.value.code, capsys.readouterr().err, error.format(**places))
    assert tree(files) == before


# --------------------------------------------------------------------------------------------------------- the command
def test_help_is_about_what_was_asked() -> None:
    assert evaluate.command(["A", "B", "--help"]) is comparison
    for arguments in ([], ["--help"], ["--run", "A"]):
        assert evaluate.command(arguments) is evaluation


def test_words_first_are_models_and_flags_first_are_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "reward", "dpo")
    common = ["--prompts", str(run / "prompts.jsonl"), "--max-prompts", "3", "--max-new-tokens", "4", "--device", "cpu"]
    line = ["evaluate", str(run / "sft"), str(run / "dpo"), "--out", str(tmp_path / "out"), "--samples", "1", *common]
    monkeypatch.setattr(sys, "argv", line)
    started()
    assert list(json.loads((tmp_path / "out" / "comparison.json").read_text())["models"]) == ["sft", "dpo"]
    assert not (run / "summary.json").exists()
    monkeypatch.setattr(sys, "argv", ["evaluate", "--run", str(run), "--best-of", "2", *common])
    started()
    assert list(json.loads((run / "summary.json").read_text())["models"]) == ["sft", "best-of-2", "dpo"]


@pytest.mark.skipif("MINIRLHF_REAL_DATA" not in os.environ, reason="MINIRLHF_REAL_DATA is unset")
def test_prompts_that_people_wrote(tmp_path: Path) -> None:
    prompts = Path(os.environ["MINIRLHF_REAL_DATA"]) / "prompts" / "oasst-en-prompts.jsonl"
    more = {"prompts": str(prompts), "judge": "test_comparison:longest_word", "max_prompts": 20, "samples": 2}
    summary = comparison.main(config_of(("sft", "ppo"), tmp_path, **more))
    assert summary["prompts"] == 20 and 0 <= summary["models"]["ppo"]["win_rate"]["mean"] <= 1

"""Win rates, intervals, best-of-n, KL and the table: against plain definitions, and the whole evaluation on a run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import ENCODING, EOS

from minirlhf import data
from minirlhf.encode import encode_prompt
from minirlhf.evaluate import evaluation
from minirlhf.evaluate.evaluation import PARTS, Evaluator, best_of_n_kl, bootstrap_interval, table, wins
from minirlhf.evaluate.judges import Answers, ModelFolder
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runtime import Stream, UserError
from minirlhf.tokenizer import response_text
from minirlhf.world import judge

PROMPTS = tiny.PROMPTS[:7]


def test_ties_are_half_a_win_and_a_model_against_itself_wins_half() -> None:
    assert wins(np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.5])).tolist() == [1.0, 0.0, 0.5]
    scores = np.array([0.3, -1.0, 1.0])
    assert wins(scores, scores).mean() == 0.5


def test_the_interval_of_the_mean_is_near_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=0)
    half = 1.96 * values.std() / 20
    # 2,000 resamples put each end of the interval within a few hundredths of a standard error.
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.02)
    assert bootstrap_interval(values, seed=0) == (low, high) != bootstrap_interval(values, seed=1)


def test_prompts_are_resampled_with_replacement() -> None:
    assert bootstrap_interval(np.full(9, 0.25), seed=0) == (0.25, 0.25)
    # One 1 among four: k of a resample's four with probability C(4, k) 3^(4-k) / 256, so the ends are k = 0 and 3.
    assert bootstrap_interval(np.array([1.0, 0.0, 0.0, 0.0]), seed=0) == (0.0, 0.75)


def test_best_of_n_bound_by_hand() -> None:
    assert best_of_n_kl(1) == 0.0
    np.testing.assert_allclose([best_of_n_kl(4), best_of_n_kl(16)], [0.636, 1.835], atol=5e-4)


# ------------------------------------------------------------------------------------------------------- the evaluator
def load(stage: str) -> GPT:
    return GPT.from_pretrained(tiny.finished_run() / stage / "model").eval().requires_grad_(False)


def reward_model() -> RewardModel:
    return RewardModel.from_pretrained(tiny.finished_run() / "reward" / "model").requires_grad_(False)


def config_of(run: Path, **changes) -> evaluation.Config:
    settings = {"max_new_tokens": tiny.LONGEST, "micro_batch_tokens": 100, "seed": tiny.SEED, "device": "cpu"}
    return evaluation.Config(run=run, **(settings | changes))


def length_judge(prompt: str, response: str) -> tuple[float, float, float, float]:
    """Stands in for the judge: numbers that anyone can count."""
    return len(response), len(prompt), response.count(" "), 1.0


def length_marks(answers: Answers) -> dict[str, np.ndarray]:
    every = [length_judge(*pair) for pair in zip(answers.prompts, answers.texts, strict=True)]
    return dict(zip(PARTS, np.array(every).T, strict=True))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    run = tiny.finished_run()
    sft, reward = ModelFolder.find(str(run / "sft"), GPT), ModelFolder.find(str(run / "reward"), RewardModel)
    evaluator = Evaluator(config_of(run), PROMPTS, [sft], judge="world", reward_model=reward, reference=sft)
    evaluator.judge = length_marks
    return evaluator


def drawn(evaluator: Evaluator, count: int) -> tuple[Answers, np.ndarray]:
    """Answers of the SFT model and their rewards."""
    answers = evaluator.sample(load("sft"), ENCODING, count=count)
    return answers, evaluator.reward(answers)


def sampled_alone(model: GPT, i: int, k: int) -> list[int]:
    """The answer of prompt i's stream k, at temperature 1."""
    prompt = encode_prompt(ENCODING, PROMPTS[i])
    samples = generate(
        model,
        [prompt],
        max_new_tokens=tiny.LONGEST,
        eos_id=EOS,
        seed=tiny.SEED,
        keys=[(Stream.EVALUATION, i, k)],
    )
    return samples.response_ids()[0]


def test_answers_come_from_the_evaluations_own_streams(evaluator: Evaluator) -> None:
    answers, _ = drawn(evaluator, 3)
    expected = [sampled_alone(load("sft"), i, k) for i in range(len(PROMPTS)) for k in range(3)]
    assert answers.samples.response_ids() == expected
    assert answers.prompts == [prompt for prompt in PROMPTS for _ in range(3)]


def score(prompt: str, response: list[int]) -> float:
    ids = encode_prompt(ENCODING, prompt) + response
    return reward_model()(torch.tensor([ids]), torch.tensor([len(ids)])).item()


def test_every_measure_by_its_definition(evaluator: Evaluator) -> None:
    policy = load("ppo")
    answers = evaluator.measure(evaluator.sample(policy, ENCODING))
    responses = [sampled_alone(policy, i, 0) for i in range(len(PROMPTS))]
    assert answers.texts == [response_text(ENCODING, ids) for ids in responses]
    assert answers["length"].tolist() == [len(ids) for ids in responses]  # EOS counts
    assert answers["finished"].tolist() == [ids[-1] == EOS for ids in responses]
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        ids = encode_prompt(ENCODING, prompt)
        difference = tiny.response_logprobs(policy, ids, response) - tiny.response_logprobs(load("sft"), ids, response)
        assert answers["kl"][i] == pytest.approx(difference.sum().item(), abs=1e-4)  # a sum of float32 numbers
        assert answers["reward"][i] == pytest.approx(score(prompt, response), abs=1e-5)
        assert tuple(answers[part][i] for part in PARTS) == length_judge(prompt, answers.texts[i])
    assert abs(answers["kl"]).max() > 0.1


def test_agreement_counts_the_pairs_of_a_prompt_that_the_judge_tells_apart(evaluator: Evaluator) -> None:
    answers, rewards = drawn(evaluator, 4)
    lengths = np.array([len(text) for text in answers.texts])
    pairs = [(r + i, r + j) for r in range(0, len(lengths), 4) for i in range(3) for j in range(i)]
    apart = [(i, j) for i, j in pairs if lengths[i] != lengths[j]]
    assert evaluator.agreement(answers, lengths * 0.1, 3) == {"share": 1.0, "pairs": len(apart)}
    assert evaluator.agreement(answers, -lengths, 3) == {"share": 0.0, "pairs": len(apart)}
    share = np.mean([(rewards[i] > rewards[j]) == (lengths[i] > lengths[j]) for i, j in apart])
    assert evaluator.agreement(answers, rewards, 3)["share"] == pytest.approx(share)
    assert math.isnan(evaluator.agreement(answers, rewards, 1)["share"])  # one answer makes no pair


@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_of_n_takes_the_best_by_reward_of_the_first_n(n: int, evaluator: Evaluator) -> None:
    best = evaluator.best_of(*drawn(evaluator, 5), n)
    assert "kl" not in best.figures
    for i, prompt in enumerate(PROMPTS):
        candidates = [sampled_alone(load("sft"), i, k) for k in range(n)]
        expected = max(candidates, key=lambda response, prompt=prompt: score(prompt, response))
        assert best.texts[i] == response_text(ENCODING, expected) and best.prompts[i] == prompt
        assert best["reward"][i] == pytest.approx(score(prompt, expected), abs=1e-5)


def answers_of(total: list[float]) -> Answers:
    count = len(total)
    figures = {
        "kl": np.arange(count, dtype=float) ** 2,
        "length": np.array([2] * (count - 1) + [8]),
        "finished": np.array([True] * (count - 1) + [False]),
        "reward": np.full(count, 0.5),
        "total": np.array(total),
    }
    figures |= {part: np.full(count, value) for part, value in zip(PARTS[1:], (0.1, 0.2, 0.3), strict=True)}
    return Answers([""] * count, [""] * count, None, ENCODING, figures)


def test_the_summary_by_hand(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "prompts", [""] * 4)
    row = evaluator.summarise(answers_of([1.0, 0.5, 0.0, 0.0]), answers_of([0.0, 0.5, 0.5, -1.0]))
    assert {name: row[name]["mean"] for name in PARTS} == pytest.approx(
        {"total": 0.375, "helpful": 0.1, "honest": 0.2, "harmless": 0.3}
    )
    assert row["win_rate"]["mean"] == (1 + 0.5 + 0 + 1) / 4
    assert row["kl"] == (0 + 1 + 4 + 9) / 4 and not row["kl_is_bound"]
    assert (row["length"], row["eos_rate"], row["reward"]) == (3.5, 0.75, 0.5)
    seed = evaluator.config.seed
    assert row["total"]["interval"] == bootstrap_interval(np.array([1.0, 0.5, 0.0, 0.0]), seed=seed)
    assert row["win_rate"]["interval"] == bootstrap_interval(np.array([1.0, 0.5, 0.0, 1.0]), seed=seed)
    bound = evaluator.summarise(answers_of([0.0] * 4), answers_of([0.0] * 4), kl_bound=0.7)
    assert bound["kl"] == 0.7 and bound["kl_is_bound"]


def test_the_columns_of_the_table() -> None:
    def part(mean: float, low: float, high: float) -> dict:
        return {"mean": mean, "interval": (low, high)}

    numbers = {
        "total": part(0.11, 0.01, 0.21),
        "helpful": part(0.22, 0, 0),
        "honest": part(0.33, 0, 0),
        "harmless": part(0.44, 0, 0),
        "win_rate": part(0.55, 0.5, 0.6),
        "kl": 6.6,
        "kl_is_bound": False,
        "length": 7.7,
        "eos_rate": 0.88,
        "reward": 0.99,
    }
    summary = {
        "prompts": 123,
        "reward_model_agreement": {"share": 0.876, "pairs": 54},
        "models": {"ppo": numbers, "best-of-4": {**numbers, "kl_is_bound": True}},
    }
    head, first, second, foot, agreement = table(summary).split("\n")
    names = re.split(r"\s{2,}", head)  # columns stand apart by two spaces or more
    assert names == [
        *("model", "judge", "95 % interval", "helpful", "honest", "harmless"),
        *("win rate", "95 % interval", "KL", "length", "EOS", "reward"),
    ]
    shown = ["ppo", "0.11", "0.01 to 0.21", "0.22", "0.33", "0.44", "55%", "50% to 60%", "6.60", "7.7", "88%", "0.99"]
    assert re.split(r"\s{2,}", first) == shown
    assert second.split()[0] == "best-of-4" and "<= 6.60" in second
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", head)][1:]
    for row in (first, second):
        assert len(row) == len(head) and all(row[end - 1] != " " for end in ends)  # numbers end below their heads
    assert foot.startswith("123 held-out prompts")
    assert "87.6% of 54 pairs" in agreement


# -------------------------------------------------------------------------------------------------- the whole of a run
def test_the_summary_of_a_run_is_that_of_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward", "ppo", "dpo")
    calls = tiny.spy(monkeypatch, evaluation, "generate")
    generator = torch.get_rng_state()
    summary = evaluation.main(config_of(run, prompts=run / "train.jsonl", max_prompts=7, best_of=(2, 3)))
    assert torch.equal(torch.get_rng_state(), generator)
    for call in calls:  # never a stream of training, and one and the same for every model
        assert call.arguments["seed"] == tiny.SEED
        assert all(key[0] == Stream.EVALUATION for key in call.arguments["keys"])
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert capsys.readouterr().out == table(summary) + "\n"
    assert summary["prompts"] == 7
    assert list(summary["models"]) == ["sft", "best-of-2", "best-of-3", "ppo", "dpo"]

    answers = data.load(run / "answers.jsonl", "prompts")
    assert [a["prompt"] for a in answers] == PROMPTS
    totals = {m: [judge(a["prompt"], a[m]).total for a in answers] for m in summary["models"]}
    for name, row in summary["models"].items():
        for part in PARTS:
            values = [getattr(judge(a["prompt"], a[name]), part) for a in answers]
            assert row[part]["mean"] == pytest.approx(sum(values) / 7)
        points = [(x > y) + 0.5 * (x == y) for x, y in zip(totals[name], totals["sft"], strict=True)]
        assert row["win_rate"]["mean"] == pytest.approx(sum(points) / 7)
        assert row["kl_is_bound"] == name.startswith("best-of")
    for stage in ("sft", "ppo", "dpo"):
        texts = [response_text(ENCODING, sampled_alone(load(stage), i, 0)) for i in range(7)]
        assert [a[stage] for a in answers] == texts
    assert summary["models"]["sft"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert summary["models"]["sft"]["win_rate"]["mean"] == 0.5
    assert summary["models"]["best-of-3"]["kl"] == pytest.approx(math.log(3) - 2 / 3)
    rewards = [summary["models"][name]["reward"] for name in ("sft", "best-of-2", "best-of-3")]
    assert rewards == sorted(rewards) and rewards[0] < rewards[2]


def test_stages_that_have_not_run_are_left_out(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward", "dpo")
    summary = evaluation.main(config_of(run, prompts=run / "prompts.jsonl", best_of=()))
    assert list(summary["models"]) == ["sft", "dpo"]


def test_a_run_without_its_models_or_of_several_tokenizers_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sft/model: no such folder; train with train_sft.py, or give another --run"):
        evaluation.main(config_of(tmp_path))
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "reward", "ppo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "same_ids", lambda one, other: one is other)
        with pytest.raises(UserError, match="reward/model: has not the tokenizer of .*sft/model"):
            evaluation.main(config_of(run, prompts=run / "prompts.jsonl"))
    (run / "reward").rename(run / "gone")
    with pytest.raises(UserError, match=r"reward/model: no such folder; train with train_reward.py"):
        evaluation.main(config_of(run, prompts=run / "prompts.jsonl"))

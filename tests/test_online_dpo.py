"""Online DPO: its loss is DPO's, the higher score is chosen, what says nothing is left out, and the first step is a
policy gradient of the win rate, by enumeration. Then the stage: resumed, repeated, in two processes, and misused."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import shutil
import statistics
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from strategies import few
from test_bad_commands import assert_clear, make_files, tree
from test_resume import Stop, exit_code, forked, nothing_left_behind, result, stop_at
from torch import Tensor

import train_dpo
from minirlhf import data, distributed, online_dpo, rollout
from minirlhf.batch import Example, pad
from minirlhf.comparisons import Comparison, ReferencedComparison, with_reference
from minirlhf.config import run_script
from minirlhf.encode import encode_comparison
from minirlhf.hf import folder
from minirlhf.model import GPT, GPTConfig
from minirlhf.online_dpo import label
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel
from minirlhf.rollout import Rollout
from minirlhf.runs import checkpoint
from minirlhf.runs.log import read_rows

CPU = torch.device("cpu")
TEMPERATURE = tiny.online_dpo_config(Path()).temperature


def once(tokens: int) -> SimpleNamespace:
    """A stage whose first attempt at an optimizer step fits."""
    return SimpleNamespace(attempts=lambda: [contextlib.nullcontext(tokens)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose online DPO nothing stopped. Read only."""
    run = new_run(tmp_path_factory.mktemp("online"))
    online_dpo.main(tiny.online_dpo_config(run))
    return run


def new_run(folder: Path) -> Path:
    return tiny.copy_of(tiny.finished_run(), folder / "run", "sft", "reward")


def policy_of(run: Path, stage: str = "sft") -> GPT:
    return GPT.from_pretrained(run / stage / "model")


# ------------------------------------------------------------------------------------------------------------ labelling
def rollout_of(groups: list[int], answers: list[list[int]], scores: list[float]) -> Rollout:
    """Answers with a log-ratio to the reference of 1 a token; that of answer y is -|y| under the reference."""
    batch = pad([Example([1, 2 + g], ids) for g, ids in zip(groups, answers, strict=True)])
    ref = torch.where(batch.mask, -1.0, 0.0)
    known = {"finished": batch.lengths > 0, "old_logprobs": 0 * ref, "ref_logprobs": ref, "values": 0 * ref}
    known |= {"scores": torch.tensor(scores), "sampling_gap": torch.zeros(len(groups)), "groups": torch.tensor(groups)}
    return Rollout(batch.tokens, batch.prompt_lengths, batch.lengths, **known)


def orders(found: list[ReferencedComparison]) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, better, worse) of each comparison."""
    for c in found:
        assert len(c.pairs) == 1 and c.weights == []
    return [(c.prompt_ids, *(c.examples[i].response_ids for i in c.pairs[0])) for c in found]


def test_labels_by_hand() -> None:
    """Prompts 5, 7, 8 and 9, their answers mixed: a second that wins, two identical ones, a tie, a first that wins."""
    answers = [[3], [4, 0], [6, 6, 0], [4, 0], [5, 0], [8, 0], [6, 0], [7]]
    groups = [5, 7, 5, 7, 8, 8, 9, 9]
    found, counts = label(rollout_of(groups, answers, [0.5, 9.0, 0.6, 9.0, 2.0, 2.0, -1.0, -1.5]))
    assert orders(found) == [([1, 7], [6, 6, 0], [3]), ([1, 11], [6, 0], [7])]
    assert counts == {"pairs": 2, "ties": 1, "identical": 1}
    assert [c.ref_seq_logprobs for c in found] == [[-1.0, -3.0], [-2.0, -1.0]]
    # Of two identical answers the scores do not matter; a function of the whole batch could give them two.
    assert label(rollout_of([1, 1], [[3], [3]], [0.0, 1.0])) == ([], {"pairs": 0, "ties": 0, "identical": 1})
    for groups in ([1, 1, 1], [1, 2, 2]):
        with pytest.raises(ValueError, match="sample two"):
            label(rollout_of(groups, [[3], [4], [5]], [0.0, 1.0, 2.0]))


@few
@given(st.lists(st.tuples(*[st.integers(-2, 2)] * 2, *[st.integers(3, 5)] * 2), min_size=1, max_size=6), st.data())
def test_the_higher_score_is_chosen_in_whatever_order_the_answers_stand(
    prompts: list[tuple[int, int, int, int]], draw: st.DataObject
) -> None:
    rows = [(g, [ids, 0], score) for g, (s, t, a, b) in enumerate(prompts) for ids, score in ((a, s), (b, t))]
    order = draw.draw(st.permutations(range(len(rows))))
    found, counts = label(rollout_of(*map(list, zip(*[rows[i] for i in order], strict=True))))
    expected = [
        ([1, 2 + g], *([[a, 0], [b, 0]] if s > t else [[b, 0], [a, 0]]))
        for g, (s, t, a, b) in enumerate(prompts)
        if s != t and a != b
    ]
    assert sorted(orders(found)) == sorted(expected)
    assert counts["identical"] == sum(a == b for *_, a, b in prompts) and sum(counts.values()) == len(prompts)


def test_the_pairs_of_a_run_are_two_answers_of_the_policy_in_the_order_of_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer sampled and scored alone by the models themselves, in the first iteration and after updates."""
    policies: list[GPT] = []

    def keep(arguments: dict) -> None:
        policies.append(copy.deepcopy(arguments["policy"]))

    collected = tiny.spy(monkeypatch, online_dpo, "collect", before=keep)
    labelled = tiny.spy(monkeypatch, online_dpo, "label")
    run = new_run(tmp_path)
    online_dpo.main(replace(tiny.online_dpo_config(run), iterations=2))
    reward, reference = RewardModel.from_pretrained(run / "reward" / "model"), policy_of(run)
    unfinished, keys = 0, set()
    for call, labels, policy in zip(collected, labelled, policies, strict=True):
        assert len(call.arguments["prompts"]) == 20
        score_of: dict[tuple, float] = {}
        for prompt, key in zip(call.arguments["prompts"], call.arguments["keys"], strict=True):
            own = rollout.generate(
                policy,
                [prompt],
                max_new_tokens=tiny.LONGEST,
                eos_id=tiny.EOS,
                temperature=TEMPERATURE,
                seed=tiny.SEED,
                keys=[key],
            )
            with torch.no_grad():
                score = reward(own.tokens, own.lengths).item() if own.finished[0] else -1.5
            unfinished += not own.finished[0]
            score_of[tuple(prompt), tuple(own.response_ids()[0])] = score
        keys |= set(call.arguments["keys"])
        found, counts = labels.result
        assert len(found) == counts["pairs"] > 0
        for c, (prompt, better, worse) in zip(found, orders(found), strict=True):
            assert score_of[tuple(prompt), tuple(better)] > score_of[tuple(prompt), tuple(worse)]
            for example, value in zip(c.examples, c.ref_seq_logprobs, strict=True):
                expected = tiny.response_logprobs(reference, prompt, example.response_ids, TEMPERATURE).sum().item()
                assert value == pytest.approx(expected, abs=1e-4)  # sums of float32
    assert unfinished > 0 and len(keys) == 40  # no stream twice
    assert len({key[2] for key in keys}) == 20  # every prompt once in an epoch of two rollouts
    assert not tiny.equal(tiny.weights(policies[0]), tiny.weights(policies[1]))


# ------------------------------------------------------------------------------------------------------------- the loss
def comparisons(run: Path) -> list[ReferencedComparison]:
    """Pairs from the run's own rankings, with log-probabilities of a reference that the policy has left."""
    records = data.load(tiny.finished_run() / "feedback" / "rankings.jsonl", "pairs")
    every = [encode_comparison(tiny.ENCODING, record, max_length=96) for record in records]
    pairs = [Comparison(list(c.examples), c.pairs[:1]) for c in every if c is not None]
    return with_reference(policy_of(tiny.finished_run(), "dpo"), pairs, CPU, max_tokens=1000)


def test_a_step_is_the_step_of_train_dpo_on_the_same_pairs(run: Path) -> None:
    """Bit for bit, loss, measurements and weights; at temperature 1, which is train_dpo's."""
    settings = {"beta": 0.7, "max_grad_norm": 0.5, "learning_rate": 1e-2}
    results = []
    for module, arguments in ((train_dpo, {}), (online_dpo, {"temperature": 1.0})):
        policy = policy_of(run)
        state = module.State(policy, adamw(policy, learning_rate=1e-2))
        config = module.Config(**settings, **arguments)
        results.append((module.train_step(state, comparisons(run), config, CPU, max_tokens=1000), tiny.weights(policy)))
    (theirs, expected), (ours, weights) = results
    assert ours == theirs and tiny.equal(weights, expected)


LOSSES = {
    "dpo": lambda delta, beta: math.log1p(math.exp(-beta * delta)),
    "ipo": lambda delta, beta: (delta - 1 / (2 * beta)) ** 2,
    "hinge": lambda delta, beta: max(0.0, 1 - beta * delta),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_at_the_temperature_of_sampling(name: str, run: Path) -> None:
    policy, pairs = policy_of(run), comparisons(run)
    expected, correct = [], 0
    for c, (prompt, *both) in zip(pairs, orders(pairs), strict=True):
        own = [tiny.response_logprobs(policy, prompt, ids, 0.6).sum().item() for ids in both]
        ratios = [value - c.ref_seq_logprobs[i] for value, i in zip(own, c.pairs[0], strict=True)]
        expected.append(LOSSES[name](ratios[0] - ratios[1], 0.7))
        correct += ratios[0] > ratios[1]
    config = replace(tiny.online_dpo_config(run), loss=name, beta=0.7, temperature=0.6)
    metrics = online_dpo.train_step(
        online_dpo.State(policy, adamw(policy, learning_rate=0.0)), pairs, config, CPU, max_tokens=1000
    )
    assert metrics["loss"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(correct / len(pairs))


def test_micro_batches_change_nothing(run: Path) -> None:
    found = []
    for tokens in (1, 100_000):
        policy = policy_of(run).double()
        state = online_dpo.State(policy, adamw(policy, learning_rate=1e-2))
        config = tiny.online_dpo_config(run)
        found.append((online_dpo.update(state, comparisons(run), config, CPU, once(tokens)), tiny.weights(policy)))
    (one, weights), (other, expected) = found
    assert one["optimizer_steps"] == other["optimizer_steps"] == 4  # 2 epochs of 2 minibatches
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], atol=1e-9, rtol=1e-9, msg=key)
    assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-9)


def test_every_pair_is_in_one_minibatch_of_each_epoch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = tiny.spy(monkeypatch, online_dpo, "train_step")
    policy, pairs = policy_of(run), comparisons(run)[:5]
    state = online_dpo.State(policy, adamw(policy, learning_rate=0.0))
    config = replace(tiny.online_dpo_config(run), epochs=2, minibatches=3)
    assert online_dpo.update(state, pairs, config, CPU, once(1000))["optimizer_steps"] == 6
    assert (
        online_dpo.update(state, pairs[:1], config, CPU, once(1000))["optimizer_steps"] == 2
    )  # a minibatch without pairs is none
    assert online_dpo.update(state, [], config, CPU, once(1000)) == {"optimizer_steps": 0}
    state.iteration = 1
    online_dpo.update(state, pairs, config, CPU, once(1000))
    numbers = [[pairs.index(c) for c in call.arguments["comparisons"]] for call in steps]
    assert [len(part) for part in numbers] == [2, 2, 1, 2, 2, 1, 1, 1, *[2, 2, 1] * 2]
    assert sorted(sum(numbers[:3], [])) == sorted(sum(numbers[3:6], [])) == [0, 1, 2, 3, 4]
    assert len({str(numbers[i : i + 3]) for i in (0, 3, 8, 11)}) == 4


# ------------------------------------------------------------------------------------------------ the expected gradient
V, LONGEST, EOS, PROMPT = 3, 2, 2, [0, 1]
RESPONSES = [[2], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]  # all that sampling can end with
SCORES = [0.3, -1.0, 2.0, 0.3, 0.0, 5.0, -0.2]  # two are equal: a tie between different answers


def small() -> GPT:
    model = GPT(GPTConfig(vocab_size=V, n_positions=8, n_layer=1, n_head=1, n_embd=8, eos_token_id=EOS), seed=1)
    with torch.no_grad():
        model.wte.weight.mul_(6)  # not uniform
    return model.double()


def gradient(policy: GPT) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def test_the_first_step_is_on_average_the_policy_gradient_of_the_win_rate() -> None:
    """Over all 49 pairs of answers with their probabilities: -beta times the gradient of P(win) - P(loss)."""
    policy, beta = small(), 0.7
    batch = pad([Example(PROMPT, ids) for ids in RESPONSES])
    probability = policy.logprobs(batch.tokens, batch.mask).sum(dim=1).exp()
    frozen = probability.detach()
    assert frozen.sum().item() == pytest.approx(1.0, abs=1e-12)
    sign = torch.tensor([[(a > b) - (a < b) for b in SCORES] for a in SCORES], dtype=torch.float64)
    (-beta * (probability @ sign @ frozen)).backward()
    expected = gradient(policy)

    config = online_dpo.Config(beta=beta, max_grad_norm=1e9)
    total = {name: torch.zeros_like(p) for name, p in policy.named_parameters()}
    ref = policy.logprobs(batch.tokens, batch.mask).detach()
    state = online_dpo.State(policy, adamw(policy, learning_rate=0.0))
    for i, j in itertools.product(range(len(RESPONSES)), repeat=2):
        sampled = rollout_of([0, 0], [RESPONSES[i], RESPONSES[j]], [SCORES[i], SCORES[j]])
        sampled = replace(sampled, ref_logprobs=ref[[i, j]].double())
        sampled.tokens[:, : len(PROMPT)] = torch.tensor(PROMPT)
        pairs, _ = label(sampled)
        assert len(pairs) == (SCORES[i] != SCORES[j])
        if pairs:
            online_dpo.train_step(state, pairs, config, CPU, max_tokens=1000)
            weight = frozen[i] * frozen[j]
            total = {name: value + weight * policy.get_parameter(name).grad for name, value in total.items()}
    for name, value in expected.items():
        torch.testing.assert_close(total[name], value, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert max(value.abs().max() for value in expected.values()) > 1e-2


# ------------------------------------------------------------------------------------------------------------ the stage
def test_what_is_logged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(run / "online-dpo")
    assert len(rows) == 3
    for row in rows:
        assert row["pairs"] + row["ties"] + row["identical"] == 10 and row["optimizer_steps"] == 4
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-5)
        assert 0 < row["eos_rate"] <= 1 and 1 < row["response_length"] < tiny.LONGEST
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5) and rows[2]["kl"] > 0.01
    assert [row["learning_rate"] for row in rows] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert not tiny.equal(tiny.weights(policy_of(run)), tiny.weights(policy_of(run, "online-dpo")))
    first = replace(tiny.online_dpo_config(run), stage="once", iterations=1, epochs=1, minibatches=1)
    sampled = tiny.spy(monkeypatch, online_dpo, "collect")
    online_dpo.main(first)
    (row,), scores = read_rows(run / "once"), sampled[0].result.scores.tolist()
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["score"] == pytest.approx(statistics.fmean(scores), abs=1e-5)
    assert row["score_std"] == pytest.approx(statistics.pstdev(scores), abs=1e-5) and row["score_std"] > 0.01


def test_the_learning_rate_falls_to_0_and_is_that_of_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = tiny.spy(monkeypatch, online_dpo, "train_step", before=lambda a: tiny.learning_rates(a["state"].optimizer))
    online_dpo.main(replace(tiny.online_dpo_config(new_run(tmp_path)), minibatches=1, epochs=1))
    assert [call.before for call in steps] == [pytest.approx([rate] * 2) for rate in (3e-3, 2e-3, 1e-3)]


def test_a_function_is_the_reward_and_its_score_rises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no reward model in the run. What is not finished is cut at the limit, and scores as it is."""
    (tmp_path / "brief.py").write_text("def f(prompts, responses):\n    return [-len(r) for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft")
    online_dpo.main(replace(tiny.online_dpo_config(run), reward=("brief:f",), missing_eos_score=None, iterations=10))
    scores = [row["score"] for row in read_rows(run / "online-dpo")]
    assert min(scores[-3:]) > 0.7 * max(scores[:2])  # negative: a third of the characters are gone


def test_without_a_pair_nothing_is_learned_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """To a function that is pleased with everything all pairs are ties."""
    (tmp_path / "indifferent.py").write_text("def f(prompts, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft")
    online_dpo.main(replace(tiny.online_dpo_config(run), reward=("indifferent:f",), missing_eos_score=None))
    rows = read_rows(run / "online-dpo")
    assert all(row["pairs"] == row["optimizer_steps"] == 0 and "loss" not in row for row in rows)
    assert all(row["ties"] > 0 and row["ties"] + row["identical"] == 10 and row["score"] == 1.0 for row in rows)
    assert tiny.equal(tiny.weights(policy_of(run)), tiny.weights(policy_of(run, "online-dpo")))
    assert "equal-rewards: every response of the rollout has the score 1" in capsys.readouterr().err


def test_the_score_is_the_sum_of_ensemble_and_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "five_more.py").write_text("def f(prompts, responses):\n    return [5.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    lower = tiny.finished_run() / "reward" / "model"
    shutil.copytree(lower, tmp_path / "lower")
    model = RewardModel.from_pretrained(lower)
    model.normalise(2.0, 1.0)  # two less for each answer
    model.save_pretrained(tmp_path / "lower")
    scores = {}
    for name, changes in {
        "alone": {},
        "worst": {"ensemble": ("lower",), "aggregate": "worst"},
        "penalised": {"ensemble": ("lower",), "aggregate": "mean-minus-variance", "variance_penalty": 3.0},
        "sum": {"reward_model": "alone/reward/model", "reward": ("five_more:f",)},
    }.items():
        run = tiny.copy_of(tiny.finished_run(), tmp_path / name, "sft", "reward")
        settings = {"missing_eos_score": None, "iterations": 1, **changes}
        online_dpo.main(replace(tiny.online_dpo_config(run), **settings))
        scores[name] = read_rows(run / "online-dpo")[0]["score"]
    assert scores["worst"] == pytest.approx(scores["alone"] - 2.0, abs=1e-5)
    assert scores["penalised"] == pytest.approx(
        scores["alone"] - 1.0 - 3.0, abs=1e-5
    )  # less mean, less 3 variances of 1
    assert scores["sum"] == pytest.approx(scores["alone"] + 5.0, abs=1e-5)


def test_the_seed_decides_bit_for_bit(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    again = new_run(tmp_path)
    online_dpo.main(tiny.online_dpo_config(again))
    assert result(again / "online-dpo") == result(run / "online-dpo")
    calls = tiny.spy(monkeypatch, online_dpo, "collect")
    for seed in (tiny.SEED, tiny.SEED + 1):
        online_dpo.main(replace(tiny.online_dpo_config(again), seed=seed, iterations=1))
    same, other = (call.arguments["prompts"] for call in calls)
    assert same != other and calls[0].arguments["seed"] != calls[1].arguments["seed"]


@pytest.mark.parametrize("calls", [2, 5, 12])
def test_stopped_within_an_iteration_and_resumed_ends_with_the_same_bits(calls: int, run: Path, tmp_path: Path) -> None:
    """Four optimizer steps an iteration; a second stop comes before the first checkpoint, and starts anew."""
    stopped = new_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, online_dpo, "train_step", calls, after=True)
        with pytest.raises(Stop):
            online_dpo.main(tiny.online_dpo_config(stopped))
    newest = checkpoint.latest(stopped / "online-dpo" / "checkpoints")
    assert (newest and int(newest.name)) == ((calls - 1) // 4 or None)
    online_dpo.main(replace(tiny.online_dpo_config(stopped), resume=True))
    assert result(stopped / "online-dpo") == result(run / "online-dpo")
    nothing_left_behind(stopped / "online-dpo")
    times = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    online_dpo.main(replace(tiny.online_dpo_config(stopped), resume=True))  # a finished stage is left as it is
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == times


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """In float64: the same rollouts and pairs, and weights that differ by the order of sums alone."""
    runs = [new_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        for kind, stage in ((GPT, "sft"), (RewardModel, "reward")):
            kind.from_pretrained(run / stage / "model").double().save_pretrained(run / stage / "model")
    configs = [replace(tiny.online_dpo_config(run), learning_rate=1e-3) for run in runs]
    online_dpo.main(configs[0])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}

    def work(rank: int) -> None:
        os.environ |= told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with distributed.started():
            online_dpo.main(configs[1])

    children = [forked(lambda rank=rank: work(rank), tmp_path / f"errors-{rank}") for rank in range(2)]
    codes = [exit_code(child, 60) for child in children]
    assert codes == [0, 0], "".join((tmp_path / f"errors-{rank}").read_text() for rank in range(2))
    ours, theirs = (read_rows(run / "online-dpo") for run in runs)
    for row, other in zip(ours, theirs, strict=True):
        assert list(row) == list(other)
        for key, value in row.items():
            # At the start all margins are 0 but for rounding, so which of two implicit rewards is larger is chance.
            assert key == "accuracy" or other[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    expected, found = (tiny.weights(policy_of(run, "online-dpo")) for run in runs)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, atol=1e-7, rtol=1e-7, msg=key)  # Adam divides by small gradients


# ------------------------------------------------------------------------------------------------------------- mistakes
ROWS = [
    ("--beta 0", "--beta 0.0: must be above 0"),
    ("--temperature 0", "--temperature 0.0: must be above 0"),
    ("--iterations 0", "--iterations 0: must be at least 1"),
    ("--epochs 0", "--epochs 0: must be at least 1"),
    ("--minibatches 0", "--minibatches 0: must be at least 1"),
    ("--learning-rate nan", "--learning-rate nan: must be a finite number"),
    ("--missing-eos-score inf", "--missing-eos-score inf: must be a finite number"),
    ("--loss kto", "invalid choice 'kto' for argument '--loss'"),
    ("--stage reward", "--stage reward: must be a name"),
    ("--rollout-size 21", "--rollout-size 21: larger than the 20"),
    ("--max-new-tokens 600", "--max-new-tokens 600: the model's context leaves no room for a prompt"),
    ("--prompts {file}/blank.jsonl", "blank.jsonl:2: the prompt is blank"),
    ("--policy {file}/bert", "model_type is 'bert' (supported: 'gpt2')"),
    ("--reward-model {file}/nothing", "nothing: no such folder"),
    ("--reward-model {file}/other", "the model a vocabulary of 7; give the tokenizer"),
    ("--ensemble {file}/nothing", "nothing: no such folder"),
    ("--reward gone:f", "--reward gone:f: cannot import gone"),
    ("--resume --beta 0.4", "--beta 0.4 (was 0.3); --resume needs the same"),
]


@pytest.fixture(scope="module")
def files(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rows name, and a run whose online DPO was stopped before its end."""
    folder = make_files(tmp_path_factory.mktemp("bad-online"))
    tiny.copy_of(run, folder / "run", "online-dpo")
    (folder / "run" / "online-dpo" / "stage.json").write_text('{"finished": false}')
    return folder


@pytest.mark.parametrize(("flags", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_a_mistake_is_one_clear_error_before_any_weights(
    flags: str, words: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    before = tree(files)
    monkeypatch.setattr(folder, "safe_open", loaded)
    for kind in (GPT, RewardModel):
        monkeypatch.setattr(kind, "from_pretrained", loaded)
    run = files / "run"
    config = tiny.online_dpo_config(run)
    given = " ".join(f"--{n.replace('_', '-')} {getattr(config, n)}" for n in tiny.ONLINE_DPO)
    arguments = f"{given} --prompts {run}/train.jsonl --run {run} --device cpu {flags.format(run=run, file=files)}"
    monkeypatch.setattr(sys, "argv", ["online_dpo.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        run_script(online_dpo.main, online_dpo.PRESETS, several=True)
    assert_clear(stop.value.code, capsys.readouterr().err, words)
    assert tree(files) == before

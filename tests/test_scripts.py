"""The loops of the four scripts: schedule, order of the data, held-out data, and every logged metric.

Metrics are computed again, one row at a time, from copies of the models as they were.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from tiny import ENCODING, EOS, response_logprobs, spy

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data
from minirlhf import ppo as maths
from minirlhf.batch import Example, batch_indices
from minirlhf.comparisons import Comparison
from minirlhf.encode import Record, encode_comparison, encode_prompt, split_by_prompt
from minirlhf.files import write_records
from minirlhf.generate import generate
from minirlhf.model import GPT, GPTConfig
from minirlhf.optim import adamw
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.runs.log import read_rows
from minirlhf.runtime import Stream, UserError


def watch(module, stage: str, run: Path, **changes) -> tuple[list[tiny.Call], list[dict[str, float]]]:
    """Run a stage; returns its optimizer steps, each with the model and the learning rates before it, and its rows."""

    def before(arguments: dict) -> SimpleNamespace:
        state = arguments["state"]
        model = copy.deepcopy(state.policy if hasattr(state, "policy") else state.model)
        return SimpleNamespace(model=model, rates=tiny.learning_rates(state.optimizer))

    with pytest.MonkeyPatch.context() as patch:
        steps = spy(patch, module, "train_step", before)
        tiny.run_stage(stage, run, **changes)
    return steps, read_rows(run / stage)


def assert_decays_matrices_alone(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert decays[id(p)] == (weight_decay if p.ndim == 2 else 0.0)


def close(found: dict, expected: dict) -> None:
    """Metrics logged from float32 sums against float64 loops: five digits."""
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=2e-5, abs_tol=2e-5), (name, found[name], value)


# ----------------------------------------------------------------------------------------------------------------- SFT
@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("sft"))
    steps, rows = watch(train_sft, "sft", run)
    return SimpleNamespace(run=run, steps=steps, rows=rows, config=tiny.sft_config(run))


def test_sft_warms_up_and_then_follows_a_cosine_to_a_tenth(sft: SimpleNamespace) -> None:
    assert len(sft.steps) == len(sft.rows) == 44
    for step, (call, row) in enumerate(zip(sft.steps, sft.rows, strict=True)):
        factor = (step + 1) / 3 if step < 3 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 41)) / 2
        expected = pytest.approx(3e-2 * factor)
        assert row["step"] == step and row["learning_rate"] == expected
        assert call.before.rates == [expected, expected]


def test_sft_takes_the_batches_of_its_seed(sft: SimpleNamespace) -> None:
    records = data.load(sft.run / "train.jsonl", "demonstrations")
    for step, call in enumerate(sft.steps):
        rows = batch_indices(20, 8, seed=tiny.SEED, step=step)
        expected = [
            (encode_prompt(ENCODING, records[i]["prompt"]), ENCODING.encode_ordinary(records[i]["response"]))
            for i in rows
        ]
        expected = [(prompt, [*response, EOS]) for prompt, response in expected]
        assert tiny.prompt_and_response(call.arguments["batch"]) == expected
        assert call.arguments["config"] == sft.config
        assert call.arguments["max_tokens"] == sft.config.micro_batch_tokens


def test_sft_starts_from_the_model_of_its_seed(sft: SimpleNamespace) -> None:
    config = GPTConfig(ENCODING.n_vocab, n_positions=96, n_layer=1, n_head=2, n_embd=16, eos_token_id=EOS)
    assert tiny.equal(tiny.weights(sft.steps[0].before.model), tiny.weights(GPT(config, seed=tiny.SEED)))
    assert GPT.from_pretrained(sft.run / "sft" / "model").config == config
    assert_decays_matrices_alone(sft.steps[0].arguments["state"].optimizer, 0.1)


def test_sft_may_start_from_a_folder(sft: SimpleNamespace, tmp_path: Path) -> None:
    run = tiny.copy_of(sft.run, tmp_path)
    start = sft.run / "sft" / "model"
    tiny.run_stage("sft", run, model=str(start), n_embd=32, learning_rate=0.0, epochs=0.4)
    assert tiny.equal(*(tiny.weights(GPT.from_pretrained(f)) for f in (start, run / "sft" / "model")))


def mean_loss(model: GPT, records: list[Record]) -> float:
    """Over all response tokens of the records together."""
    logprobs = [
        response_logprobs(
            model,
            encode_prompt(ENCODING, r["prompt"]),
            [*ENCODING.encode_ordinary(r["response"]), EOS],
        )
        for r in records
    ]
    return -torch.cat(logprobs).mean().item()


def test_sft_measures_held_out_records_every_so_often_and_at_the_end(sft: SimpleNamespace) -> None:
    held_out = data.load(sft.run / "validation.jsonl", "demonstrations")
    models = {i: call.before.model for i, call in enumerate(sft.steps)} | {44: sft.steps[0].arguments["state"].model}
    measured = {row["step"]: row["validation_loss"] for row in sft.rows if "validation_loss" in row}
    assert list(measured) == [19, 39, 43]
    for step, loss in measured.items():  # after the step of that row
        close({"loss": loss}, {"loss": mean_loss(models[step + 1], held_out)})
    assert tiny.equal(tiny.weights(models[44]), tiny.weights(GPT.from_pretrained(sft.run / "sft" / "model")))


# ------------------------------------------------------------------------------------------------- comparisons, shared
def rankings(run: Path) -> tuple[list[Record], list[Record]]:
    """Training and held-out records by the definition of the split: a quarter of the prompts."""
    records = data.load(run / "feedback" / "rankings.jsonl", "pairs")
    train, held_out = split_by_prompt(records, share=0.25, seed=tiny.SEED)
    assert len(held_out) == round(0.25 * len(records)) == 4
    return train, held_out


def pairs_of(records: list[Record]) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, better, worse) ids of every pair with unequal ranks."""
    pairs = []
    for r in records:
        prompt = encode_prompt(ENCODING, r["prompt"])
        for better, i in zip(r["response_ids"], r["ranks"], strict=True):
            pairs += [(prompt, better, w) for w, j in zip(r["response_ids"], r["ranks"], strict=True) if i < j]
    return pairs


def assert_batches_of_the_seed(steps: list[tiny.Call], train: list[Record]) -> None:
    comparable = [r for r in train if pairs_of([r])]
    for step, call in enumerate(steps):
        rows = batch_indices(len(comparable), 5, seed=tiny.SEED, step=step)
        found = [[e.response_ids for e in c.examples] for c in pairs_in(call)]
        assert found == [comparable[i]["response_ids"] for i in rows]


def assert_linear(steps: list[tiny.Call], rows: list[dict[str, float]], total: int) -> None:
    """Two steps of warm-up to 1e-2, then a line that would be 0 one step after the last."""
    assert len(steps) == len(rows) == total
    for step, (call, row) in enumerate(zip(steps, rows, strict=True)):
        expected = pytest.approx(1e-2 * ((step + 1) / 2 if step < 2 else (total - step) / (total - 2)))
        assert row["step"] == step and row["learning_rate"] == expected
        assert call.before.rates == [expected, expected]


def pairs_in(call: tiny.Call) -> list[Comparison]:
    """The comparisons of an optimizer step of the reward model or of DPO."""
    return call.arguments["batch" if "batch" in call.arguments else "comparisons"]


def records_of(call: tiny.Call, records: list[Record]) -> list[Record]:
    """The records whose comparisons a step trained on."""
    asked = [c.examples[0].prompt_ids for c in pairs_in(call)]
    return [r for ids in asked for r in records if encode_prompt(ENCODING, r["prompt"]) == ids]


@pytest.mark.parametrize("dropped", range(4))
def test_ranks_stay_with_their_responses_when_one_does_not_fit(dropped: int) -> None:
    responses = [" Yes" * (11 if i == dropped else i + 1) for i in range(4)]  # 12 with EOS: no room for a prompt
    record = {"prompt": "q", "responses": responses, "ranks": [2, 0, 3, 1]}
    comparison = encode_comparison(ENCODING, record, max_length=12)
    kept = [i for i in range(4) if i != dropped]
    assert [len(e.response_ids) for e in comparison.examples] == [i + 2 for i in kept]  # the EOS counts
    ranks = [(2, 0, 3, 1)[i] for i in kept]
    assert {(ranks[i], ranks[j]) for i, j in comparison.pairs} == {(a, b) for a in ranks for b in ranks if a < b}


# -------------------------------------------------------------------------------------------------------- reward model
@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("reward"), "sft", "feedback")
    steps, rows = watch(train_reward, "reward", run)
    return SimpleNamespace(run=run, steps=steps, rows=rows, config=tiny.reward_config(run))


def score(model: RewardModel, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        return model.score(model.gpt.hidden(torch.tensor([prompt + response]))[0, -1]).item()


def comparison_metrics(
    chosen: list[float], rejected: list[float], weights: list[float] | None = None
) -> dict[str, float]:
    """Bradley-Terry loss, a weighted mean over pairs, and accuracy, ties half."""
    differences = [c - r for c, r in zip(chosen, rejected, strict=True)]
    right = [float(d > 0) + 0.5 * (d == 0) for d in differences]
    weights = weights or [1.0] * len(differences)
    losses = [w * math.log1p(math.exp(-d)) for w, d in zip(weights, differences, strict=True)]
    return {"loss": sum(losses) / sum(weights), "accuracy": sum(right) / len(right)}


def tokens_that_differ(a: list[int], b: list[int]) -> int:
    """The longer one's length without the common start and the common end."""
    a, b = list(a), list(b)
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b))


def test_reward_training_follows_its_schedule_and_the_order_of_its_seed(reward: SimpleNamespace) -> None:
    train, _ = rankings(reward.run)
    comparable = sum(bool(pairs_of([r])) for r in train)
    assert_linear(reward.steps, reward.rows, total=2 * math.ceil(comparable / 5))
    assert_batches_of_the_seed(reward.steps, train)
    assert_decays_matrices_alone(reward.steps[0].arguments["state"].optimizer, 0.02)
    for call in reward.steps:
        assert call.arguments["config"] == reward.config


def test_reward_metrics_are_means_over_the_pairs_of_the_batch(reward: SimpleNamespace) -> None:
    """In the loss weighted by d^-contrast of the d tokens that differ; contrast falls linearly to 0."""
    train, _ = rankings(reward.run)
    for step, (call, row) in enumerate(zip(reward.steps, reward.rows, strict=True)):
        pairs = pairs_of(records_of(call, train))
        model = call.before.model
        chosen, rejected = ([score(model, p[0], p[side]) for p in pairs] for side in (1, 2))
        contrast = 1.5 * (1 - step / len(reward.steps))
        weights = [tokens_that_differ(better, worse) ** -contrast for _, better, worse in pairs]
        close(row, comparison_metrics(chosen, rejected, weights))


def test_reward_is_measured_on_held_out_prompts_after_the_last_step(reward: SimpleNamespace) -> None:
    _, held_out = rankings(reward.run)
    assert [row["step"] for row in reward.rows if "validation_loss" in row] == [len(reward.rows) - 1]
    std = json.loads((reward.run / "reward" / "normalisation.json").read_text())["before"]["std"]
    saved = RewardModel.from_pretrained(reward.run / "reward" / "model")
    pairs = pairs_of(held_out)
    # The saved scores are normalised; a difference of scores forgets the mean.
    chosen, rejected = ([std * score(saved, p[0], p[side]) for p in pairs] for side in (1, 2))
    expected = comparison_metrics(chosen, rejected)
    close(reward.rows[-1], {f"validation_{name}": value for name, value in expected.items()})
    by_margin = sorted(zip(chosen, rejected, strict=True), key=lambda pair: abs(pair[0] - pair[1]))
    sizes = [len(pairs) // 3 + (k < len(pairs) % 3) for k in range(3)]
    for k, name in enumerate(("small", "medium", "large")):
        third = by_margin[sum(sizes[:k]) : sum(sizes[: k + 1])]
        accuracy = comparison_metrics(*zip(*third, strict=True))["accuracy"]
        close(reward.rows[-1], {f"accuracy_margin_{name}": accuracy})


def test_accuracy_by_margin_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six pairs with differences 1, 2 | -10, 11 | -50, -60 in thirds by size: right, half right, wrong."""
    comparisons = [
        Comparison([Example([0], [100 + d]), Example([0], [100])], [(0, 1)]) for d in (-10, 2, -60, 11, 1, -50)
    ]
    monkeypatch.setattr(train_reward, "response_scores", lambda model, batch: batch.tokens.flatten()[batch.targets])
    metrics = train_reward.held_out(None, comparisons, torch.device("cpu"), max_tokens=8)
    shares = {"small": 1.0, "medium": 0.5, "large": 0.0}
    assert {name: metrics[f"accuracy_margin_{name}"].item() for name in shares} == shares
    assert metrics["validation_accuracy"] == 0.5


def test_scores_have_mean_0_and_deviation_1_over_answers_of_the_sft_model(reward: SimpleNamespace) -> None:
    sft = GPT.from_pretrained(reward.run / "sft" / "model")
    trained, saved = reward.steps[0].arguments["state"].model, RewardModel.from_pretrained(reward.run / "reward/model")
    assert tiny.equal(tiny.weights(trained), tiny.weights(saved))  # normalised in place
    samples = generate(
        sft,
        [encode_prompt(ENCODING, p) for p in tiny.PROMPTS[:8]],
        max_new_tokens=tiny.LONGEST,
        eos_id=EOS,
        seed=tiny.SEED,
        keys=[(Stream.REFERENCE_SAMPLES, i) for i in range(8)],
    )
    scores = torch.tensor([score(saved, *row) for row in tiny.prompt_and_response(samples)])
    written = json.loads((reward.run / "reward" / "normalisation.json").read_text())
    close(written["after"], {"mean": scores.mean().item(), "std": scores.std(correction=0).item()})
    close(written["after"], {"mean": 0.0, "std": 1.0})
    assert abs(written["before"]["std"] - 1) > 1e-3  # there was something to do


# ----------------------------------------------------------------------------------------------------------------- DPO
@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("dpo"), "sft", "feedback")
    steps, rows = watch(train_dpo, "dpo", run, label_smoothing=0.1)
    return SimpleNamespace(run=run, steps=steps, rows=rows)


def dpo_metrics(policy: GPT, reference: GPT, pairs: list, *, beta: float, smoothing: float) -> dict[str, float]:
    """Every metric as a mean over pairs, from summed log-probabilities; implicit reward = beta (log pi - log ref)."""
    logprobs = {
        side: [response_logprobs(policy, p[0], p[side]).sum().item() for p in pairs] for side in (1, 2)
    }  # 1 the better, 2 the worse
    rewards = {
        side: [
            beta * (lp - response_logprobs(reference, p[0], p[side]).sum().item())
            for lp, p in zip(logprobs[side], pairs, strict=True)
        ]
        for side in (1, 2)
    }
    plain = comparison_metrics(rewards[1], rewards[2])
    flipped = comparison_metrics(rewards[2], rewards[1])
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "loss": (1 - smoothing) * plain["loss"] + smoothing * flipped["loss"],
        "accuracy": plain["accuracy"],
        "reward_chosen": mean(rewards[1]),
        "reward_rejected": mean(rewards[2]),
        "margin": mean(rewards[1]) - mean(rewards[2]),
        "logprob_chosen": mean(logprobs[1]),
        "logprob_rejected": mean(logprobs[2]),
    }


def test_dpo_follows_its_schedule_and_the_order_of_its_seed(dpo: SimpleNamespace) -> None:
    train, _ = rankings(dpo.run)
    comparable = sum(bool(pairs_of([r])) for r in train)
    assert_linear(dpo.steps, dpo.rows, total=2 * math.ceil(comparable / 5))
    assert_decays_matrices_alone(dpo.steps[0].arguments["state"].optimizer, 0.0)
    assert_batches_of_the_seed(dpo.steps, train)


def test_dpo_metrics_are_means_over_the_pairs_of_the_batch(dpo: SimpleNamespace) -> None:
    train, _ = rankings(dpo.run)
    reference = GPT.from_pretrained(dpo.run / "sft" / "model")
    assert math.isclose(dpo.rows[0]["loss"], math.log(2), rel_tol=1e-6)
    assert abs(dpo.rows[0]["margin"]) < 1e-5
    for call, row in zip(dpo.steps[1:], dpo.rows[1:], strict=True):  # the first has ties up to rounding
        pairs = pairs_of(records_of(call, train))
        close(row, dpo_metrics(call.before.model, reference, pairs, beta=0.3, smoothing=0.1))


def test_dpo_is_measured_on_held_out_prompts(dpo: SimpleNamespace) -> None:
    _, held_out = rankings(dpo.run)
    models = [call.before.model for call in dpo.steps] + [GPT.from_pretrained(dpo.run / "dpo" / "model")]
    reference = GPT.from_pretrained(dpo.run / "sft" / "model")
    assert [row["step"] for row in dpo.rows if "validation_loss" in row] == [3, len(dpo.rows) - 1]
    for step in (3, len(dpo.rows) - 1):
        expected = dpo_metrics(models[step + 1], reference, pairs_of(held_out), beta=0.3, smoothing=0.0)
        close(dpo.rows[step], {f"validation_{name}": value for name, value in expected.items()})


# ----------------------------------------------------------------------------------------------------------------- PPO
@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three iterations of one step each, so that a row's metrics are those of one minibatch before any update."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("ppo"), "sft", "reward")
    with pytest.MonkeyPatch.context() as patch:
        updates = spy(
            patch,
            train_ppo,
            "train_step",
            before=lambda arguments: SimpleNamespace(
                policy=copy.deepcopy(arguments["state"].policy),
                rates=[
                    tiny.learning_rates(arguments["state"].policy_optimizer),
                    tiny.learning_rates(arguments["state"].value_optimizer),
                ],
            ),
        )
        tiny.run_stage("ppo", run, epochs=1, minibatches=1, kl_target=0.5, kl_horizon=60.0, clip=0.1)
    # One epoch of one minibatch: the minibatch is the whole rollout, in another order.
    return SimpleNamespace(run=run, updates=updates, rows=read_rows(run / "ppo"))


def test_both_learning_rates_of_ppo_fall_linearly_to_0(ppo: SimpleNamespace) -> None:
    assert len(ppo.updates) == 3
    for iteration, call in enumerate(ppo.updates):
        for rates, start in zip(call.before.rates, (1e-2, 2e-2), strict=True):
            assert rates == [pytest.approx(start * (3 - iteration) / 3)] * 2
    state = ppo.updates[0].arguments["state"]
    for optimizer in (state.policy_optimizer, state.value_optimizer):
        assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
        assert_decays_matrices_alone(optimizer, 0.0)


def test_ppo_metrics_are_computed_again_row_by_row(ppo: SimpleNamespace) -> None:
    for iteration, (call, row) in enumerate(zip(ppo.updates, ppo.rows, strict=True)):
        experience, policy = call.arguments["minibatch"], call.before.policy
        mask = experience.mask
        responses = tiny.prompt_and_response(experience)
        counts = [len(response) for _, response in responses]
        kl = ((experience.old_logprobs - experience.ref_logprobs) * mask).sum().item() / len(responses)
        entropies = []
        for prompt, response in responses:
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].double() / 0.8
            p = logits.softmax(-1)
            entropies += (-(p * p.log()).sum(-1)).tolist()
        returns, values = experience.returns[mask], experience.values[mask]
        expected = {
            "step": iteration,
            "score": experience.scores.mean().item(),
            "kl": kl,
            "objective": experience.scores.mean().item() - row["beta"] * kl,
            "response_length": sum(counts) / len(counts),
            "eos_rate": sum(response[-1] == EOS for _, response in responses) / len(responses),
            "explained_variance": (1 - (returns - values).var() / returns.var()).item(),
            "entropy": sum(entropies) / len(entropies),
            "policy_loss": -experience.advantages[mask].mean().item(),
            "value_loss": 0.5 * ((values - returns) ** 2).mean().item(),
            "ratio": 1.0,
            "approximate_kl": 0.0,
            "clip_fraction": 0.0,
            "optimizer_steps": 1,
        }
        close(row, expected)
        assert row["sampling_gap"] == 0  # in float32 what sampling recorded is used
        assert row["first_ratio_deviation"] < 1e-4


def test_rewards_and_advantages_of_the_script_follow_its_settings(ppo: SimpleNamespace) -> None:
    """GAE as a double sum, with the adaptive beta of the iteration; whitened over the whole rollout."""
    for call, row in zip(ppo.updates, ppo.rows, strict=True):
        e = call.arguments["minibatch"]
        raw, returns = [], []
        for i in range(len(e)):
            here = e.mask[i]
            v = [*e.values[i, here].tolist(), 0.0]
            r = (-row["beta"] * (e.old_logprobs[i, here] - e.ref_logprobs[i, here])).tolist()
            r[-1] += e.scores[i].item()
            delta = [r[t] + 0.99 * v[t + 1] - v[t] for t in range(len(r))]
            a = [sum((0.99 * 0.9) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))]
            raw += a
            returns += [a[t] + v[t] for t in range(len(r))]
        raw = torch.tensor(raw)
        torch.testing.assert_close(e.returns[e.mask], torch.tensor(returns), atol=1e-5, rtol=1e-5)
        whitened = (raw - raw.mean()) / raw.std(correction=0)
        torch.testing.assert_close(e.advantages[e.mask], whitened, atol=1e-5, rtol=1e-5)


def test_the_adaptive_beta_follows_the_measured_kl(ppo: SimpleNamespace) -> None:
    beta = 0.2
    for row, responses in zip(ppo.rows, (6, 4, 6), strict=True):
        assert row["beta"] == pytest.approx(beta)
        beta *= 1 + max(-0.2, min(0.2, row["kl"] / 0.5 - 1)) * responses / 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_logprobs_are_computed_again_in_bfloat16_alone(dtype: str, tmp_path: Path) -> None:
    """There a cached forward may round otherwise than a full one, though at this size the two agree."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward")
    with pytest.MonkeyPatch.context() as patch:
        rollouts = spy(patch, train_ppo, "collect")
        tiny.run_stage("ppo", run, dtype=dtype, iterations=1, epochs=1, minibatches=1)
    assert [call.arguments["rescore"] for call in rollouts] == [dtype == "bfloat16"]


def test_the_settings_of_the_advantages_reach_them(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward")
    settings = {"gamma": 0.7, "lam": 0.6, "whiten_rewards": True}
    with pytest.MonkeyPatch.context() as patch:
        calls = spy(patch, maths, "gae")
        tiny.run_stage("ppo", run, iterations=1, **settings)
    given = calls[0].arguments
    assert (given["gamma"], given["lam"]) == (0.7, 0.6)
    assert given["rewards"][given["mask"]].std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("longest", [True, False])
def test_the_ratio_deviation_is_the_largest_of_all_micro_batches(longest: bool, ppo: SimpleNamespace) -> None:
    """One row's old log-probabilities are lowered by log 1.5; rows go one by one, the longest first."""
    experience = copy.deepcopy(ppo.updates[0].arguments["minibatch"])
    order = experience.lengths.argsort(descending=True, stable=True)
    row = order[0 if longest else -1]
    experience.old_logprobs[row] -= math.log(1.5) * experience.mask[row]
    policy = copy.deepcopy(ppo.updates[0].before.policy)
    value_model = copy.deepcopy(ppo.updates[0].arguments["state"].value_model)
    state = train_ppo.State(
        policy, value_model, adamw(policy, learning_rate=0.0), adamw(value_model, learning_rate=0.0), None
    )
    metrics = train_ppo.train_step(state, experience, tiny.ppo_config(ppo.run), beta=0.2, max_tokens=1)
    assert metrics["ratio_deviation"].item() == pytest.approx(0.5, abs=1e-4)


def counted_steps(
    monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: object
) -> tuple[list[list[int]], dict[str, float]]:
    """The rows of each optimizer step of an iteration of ten prompts; the k-th step reports k for every metric."""
    run = tiny.copy_of(tiny.finished_run(), folder, "sft", "reward")
    seen: list[list[int]] = []

    def counting(state, minibatch, config, **more) -> dict:
        seen.append(minibatch.groups.tolist())
        return {name: torch.tensor(float(len(seen))) for name in ("policy_loss", "approximate_kl", "ratio_deviation")}

    monkeypatch.setattr(train_ppo, "train_step", counting)
    tiny.run_stage("ppo", run, rollout_size=10, minibatches=4, **{"iterations": 1, "epochs": 3, **changes})
    return seen, read_rows(run / "ppo")[0]


def test_every_row_is_visited_once_an_epoch_in_an_order_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen, metrics = counted_steps(monkeypatch, tmp_path / "a", iterations=2)
    assert len(seen) == 24 and {len(rows) for rows in seen} == {2, 3}
    epochs = [sum(seen[4 * k : 4 * k + 4], []) for k in range(6)]
    for order in epochs:
        assert sorted(order) == list(range(10))
    other_seed = sum(counted_steps(monkeypatch, tmp_path / "b", seed=2)[0][:4], [])
    orders = [*epochs, other_seed, list(range(10))]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert metrics["policy_loss"] == 6.5  # the mean of 1 to 12
    assert metrics["first_ratio_deviation"] == 1 and metrics["optimizer_steps"] == 12


def test_epochs_stop_once_the_policy_has_moved_too_far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, metrics = counted_steps(monkeypatch, tmp_path, stop_kl=5.0)
    assert len(seen) == metrics["optimizer_steps"] == 6  # the sixth is the first above 5
    assert metrics["policy_loss"] == 3.5


def test_scaled_rewards_keep_their_mean(tmp_path: Path) -> None:
    """Rewards of a stage with and without the scaling: the same mean, deviation 1."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward")
    with pytest.MonkeyPatch.context() as patch:
        calls = spy(patch, maths, "gae")
        for scaled in (False, True):
            tiny.run_stage("ppo", run, iterations=1, whiten_rewards=scaled)
    plain, scaled = (call.arguments["rewards"][call.arguments["mask"]] for call in calls)
    torch.testing.assert_close(scaled, (plain - plain.mean()) / plain.std(correction=0) + plain.mean())


# ----------------------------------------------------------------------------------------------------------- all four
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_micro_batches_change_no_metric_and_no_weight(stage: str, tmp_path: Path) -> None:
    """In float64, where what differs is rounding alone: one row at a time, and all rows at once."""
    first = tiny.finished_run()
    results = []
    for tokens in (1, 100_000):
        run = tiny.copy_of(first, tmp_path / str(tokens), "sft", "feedback", "reward")
        for name, kind in (("sft", GPT), ("reward", RewardModel)):
            model = kind.from_pretrained(run / name / "model")
            model.double().save_pretrained(run / name / "model")
        start = {"model": str(run / "sft" / "model"), "epochs": 1.0} if stage == "sft" else {}
        tiny.run_stage(stage, run, micro_batch_tokens=tokens, **start)
        model = (RewardModel if stage == "reward" else GPT).from_pretrained(run / stage / "model")
        results.append((read_rows(run / stage), tiny.weights(model)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if (stage, one["step"], name) == ("dpo", 0, "accuracy"):
                continue  # policy and reference are equal: which of the two implicit rewards is larger is rounding
            # Some metrics are reported in float32.
            assert math.isclose(value, other[name], rel_tol=1e-6, abs_tol=1e-6), name
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("module", [train_sft, train_reward, train_ppo, train_dpo])
def test_gradients_are_clipped_to_the_limit_that_was_given(module: ModuleType, tmp_path: Path) -> None:
    stage = module.__name__.removeprefix("train_")
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "feedback", "reward")
    shorter = {"iterations": 1} if stage == "ppo" else {"epochs": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        clips = spy(patch, module, "clip_gradients")
        tiny.run_stage(stage, run, max_grad_norm=1e-3, **shorter)
    assert clips[0].result > 1e-3  # the norm before
    for model in {id(call.arguments["model"]): call.arguments["model"] for call in clips}.values():
        squares = sum((p.grad.double() ** 2).sum().item() for p in model.parameters())
        assert math.sqrt(squares) <= 1e-3 * (1 + 1e-5)  # what the last step was made with, scaled in float32


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_half_weights_are_trained_in_float32(stage: str, tmp_path: Path) -> None:
    """A start model of float16 trains as the same numbers in float32 do; in float16 small updates would vanish."""
    ended = []
    for dtype in (torch.float16, torch.float32):
        run = tiny.copy_of(tiny.finished_run(), tmp_path / str(dtype), "sft", "feedback", "reward")
        start = GPT.from_pretrained(run / "sft" / "model").half().to(dtype)
        start.save_pretrained(run / "sft" / "model")
        changes = {"model": str(shutil.copytree(run / "sft" / "model", run / "start"))} if stage == "sft" else {}
        folder = tiny.run_stage(stage, run, **changes)
        kind = RewardModel if stage == "reward" else GPT
        ended.append(tiny.weights(kind.from_pretrained(folder)))
    assert tiny.equal(*ended) and {weight.dtype for weight in ended[0].values()} == {torch.float32}


def test_the_value_model_of_a_half_reward_model_is_float32() -> None:
    reward_model = RewardModel.from_pretrained(tiny.finished_run() / "reward" / "model").bfloat16()
    assert {p.dtype for p in ValueModel.from_reward_model(reward_model).parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_comparisons_of_a_single_prompt_are_refused(stage: str, tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "feedback")
    file = run / "feedback" / "rankings.jsonl"
    write_records(file, data.load(file, "pairs")[:1])
    with pytest.raises(UserError, match="at least two prompts"):
        tiny.run_stage(stage, run)

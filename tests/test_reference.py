"""Frozen means frozen, and what was sampled is what is scored: seen from inside the real scripts while they run.

Each fixture runs one script with small settings and keeps the calls of the functions that its loop goes through,
with copies of the models from before each call, so that every number can be computed again from the model of then.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import ENCODING, EOS, Call, spy
from torch import nn

import train_dpo
import train_ppo
import train_reward
from minirlhf import data, reward_functions, tokenizer
from minirlhf.batch import batch_indices
from minirlhf.comparisons import Comparison
from minirlhf.encode import Record, encode_prompt
from minirlhf.files import write_records
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.reward import RewardModel
from minirlhf.runs.log import read_rows
from minirlhf.runtime import Stream


def storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in itertools.chain(model.parameters(), model.buffers())}


def assert_apart(*models: nn.Module) -> None:
    for a, b in itertools.combinations(models, 2):
        assert not storages(a) & storages(b)


def assert_frozen(model: nn.Module, folder: Path) -> None:
    """Still what was loaded, bit for bit, and never part of the training."""
    original = type(model).from_pretrained(folder)
    assert tiny.equal(tiny.weights(model), tiny.weights(original))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module.training for module in model.modules())


def assert_trains_exactly(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Every parameter of the model once, and nothing else."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def in_other_pieces(response: list[int]) -> bool:
    """Whether the tokenizer would encode the response's text to other ids than these."""
    ids = response[:-1] if response[-1] == EOS else response
    return tokenizer.encode(ENCODING, tokenizer.decode(ENCODING, ids)) != ids


# ----------------------------------------------------------------------------------------------------------------- PPO
@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """train_ppo.main, with its models and, for each iteration, the rollout and copies of the models that made it."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("ppo"), "sft", "reward")
    with pytest.MonkeyPatch.context() as patch:
        copies = lambda arguments: copy.deepcopy((arguments["policy"], arguments["value_model"]))  # noqa: E731
        rollouts = spy(patch, train_ppo, "collect", before=copies)
        rewards = spy(patch, reward_functions, "reward_function")
        updates = spy(patch, train_ppo, "train_step")
        train_ppo.main(tiny.ppo_config(run))
    return SimpleNamespace(
        run=run,
        config=tiny.ppo_config(run),
        rollouts=rollouts,
        state=updates[0].arguments["state"],
        policy=rollouts[0].arguments["policy"],
        reference=rollouts[0].arguments["reference"],
        value_model=rollouts[0].arguments["value_model"],
        reward_model=rewards[0].arguments["model"],
    )


def test_ppo_changes_policy_and_value_model_and_nothing_else(ppo: SimpleNamespace) -> None:
    sft, reward = ppo.run / "sft" / "model", ppo.run / "reward" / "model"
    assert_frozen(ppo.reference, sft)
    assert_frozen(ppo.reward_model, reward)
    assert_apart(ppo.policy, ppo.reference, ppo.value_model, ppo.reward_model)
    assert_trains_exactly(ppo.state.policy_optimizer, ppo.policy)
    assert_trains_exactly(ppo.state.value_optimizer, ppo.value_model)
    before = ppo.rollouts[0].before
    assert not tiny.equal(tiny.weights(ppo.policy), tiny.weights(before[0]))
    assert not tiny.equal(tiny.weights(ppo.value_model), tiny.weights(before[1]))
    for call in ppo.rollouts:  # the same models in every iteration
        assert call.arguments["policy"] is ppo.policy and call.arguments["reference"] is ppo.reference


def test_ppo_starts_policy_from_sft_and_value_model_from_the_reward_model_with_a_head_of_0(
    ppo: SimpleNamespace,
) -> None:
    policy, value_model = ppo.rollouts[0].before
    rollout = ppo.rollouts[0].result
    assert tiny.equal(tiny.weights(policy), tiny.weights(GPT.from_pretrained(ppo.run / "sft" / "model")))
    assert tiny.equal(tiny.weights(value_model.gpt), tiny.weights(ppo.reward_model.gpt))
    assert not any(p.any() for p in value_model.value.parameters())
    assert not rollout.values.any()
    torch.testing.assert_close(rollout.old_logprobs, rollout.ref_logprobs)


def test_ppo_saves_the_policy(ppo: SimpleNamespace) -> None:
    saved = GPT.from_pretrained(ppo.run / "ppo" / "model")
    assert tiny.equal(tiny.weights(saved), tiny.weights(ppo.policy))


def test_rollouts_are_computed_again_row_by_row(ppo: SimpleNamespace) -> None:
    """Each row alone, from the sampled ids as they are, by the models as they were: no padding, no micro-batches."""
    for call in ppo.rollouts:
        rollout, (policy, value_model) = call.result, call.before
        for i, (prompt, response) in enumerate(tiny.prompt_and_response(rollout)):
            here, ids = rollout.mask[i], torch.tensor([prompt + response])
            for model, recorded in ((policy, rollout.old_logprobs), (ppo.reference, rollout.ref_logprobs)):
                expected = tiny.response_logprobs(model, prompt, response, ppo.config.temperature)
                # Recorded in float32 by a cached forward, computed here in float64 from float32 logits.
                torch.testing.assert_close(recorded[i, here].double(), expected, atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                values = value_model.value(value_model.gpt.hidden(ids))[0, len(prompt) - 1 : -1, 0]
                score = ppo.reward_model.score(ppo.reward_model.gpt.hidden(ids)[:, -1])[0, 0]
            torch.testing.assert_close(rollout.values[i, here], values, atol=1e-5, rtol=1e-5)
            assert rollout.finished[i] == (response[-1] == EOS)
            expected = score if rollout.finished[i] else torch.tensor(ppo.config.missing_eos_score)
            torch.testing.assert_close(rollout.scores[i], expected, atol=1e-5, rtol=1e-5)
    finished = torch.cat([call.result.finished for call in ppo.rollouts])
    assert finished.any() and not finished.all()  # both kinds were there


def test_every_rollout_has_its_prompts_and_its_own_random_streams(ppo: SimpleNamespace) -> None:
    keys = [key for call in ppo.rollouts for key in call.arguments["keys"]]
    assert len(set(keys)) == len(keys) == 6 + 4 + 6
    asked = []
    for iteration, call in enumerate(ppo.rollouts):
        chosen = batch_indices(10, 6, seed=tiny.SEED, step=iteration)
        assert call.arguments["keys"] == [(Stream.ROLLOUT, iteration, i) for i in chosen]
        assert call.arguments["prompts"] == [encode_prompt(ENCODING, tiny.PROMPTS[i]) for i in chosen]
        sampled = generate(
            call.before[0],
            call.arguments["prompts"],
            max_new_tokens=tiny.LONGEST,
            eos_id=EOS,
            temperature=ppo.config.temperature,
            seed=tiny.SEED,
            keys=call.arguments["keys"],
        )
        assert torch.equal(call.result.tokens, sampled.tokens)
        asked.append(set(chosen))
    assert asked[0] | asked[1] == set(range(10))  # one pass over the prompts


def test_sampled_ids_are_scored_as_they_are(tmp_path: Path) -> None:
    """An untrained policy writes words in pieces that the tokenizer would never choose; those pieces get the score."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "reward", "sft")
    config = GPT.from_pretrained(run / "sft" / "model").config
    GPT(config, seed=0).save_pretrained(run / "sft" / "model")
    with pytest.MonkeyPatch.context() as patch:
        rollouts = spy(patch, train_ppo, "collect")
        train_ppo.main(replace(tiny.ppo_config(run), iterations=1, missing_eos_score=None))
    model = RewardModel.from_pretrained(run / "reward" / "model")
    rollout, scored_otherwise = rollouts[0].result, 0
    for (prompt, response), score in zip(tiny.prompt_and_response(rollout), rollout.scores, strict=True):
        as_sampled = torch.tensor([prompt + response])
        torch.testing.assert_close(model(as_sampled, torch.tensor([as_sampled.shape[1]]))[0], score)
        if in_other_pieces(response):
            ids = tokenizer.encode(ENCODING, tokenizer.decode(ENCODING, response))
            again = torch.tensor([prompt + ids])
            scored_otherwise += abs(model(again, torch.tensor([again.shape[1]]))[0] - score) > 1e-3
    assert scored_otherwise > 0  # the difference mattered


# ----------------------------------------------------------------------------------------------------------------- DPO
def crafted_rankings(run: Path) -> list[Record]:
    """The run's rankings with the first response of each written in single bytes: ids that no tokenizer gives."""
    records = data.load(run / "feedback" / "rankings.jsonl", "pairs")
    for record in records:
        pieces = ENCODING.encode_ordinary(record["responses"][0])
        single = [ENCODING.encode_single_token(bytes([byte])) for i in pieces for byte in ENCODING.decode_bytes([i])]
        record["response_ids"][0] = single[:20]
    write_records(run / "feedback" / "rankings.jsonl", records)
    return records


def assert_trained_on_sampled_ids(trained: list[Comparison], records: list[Record]) -> None:
    """Every example of a comparison holds a record's `response_ids` exactly; some are not what the text encodes to."""
    sampled = {(r["prompt"], tuple(ids)) for r in records for ids in r["response_ids"]}
    prompts = {tuple(encode_prompt(ENCODING, r["prompt"])): r["prompt"] for r in records}
    examples = [e for c in trained for e in c.examples]
    assert {(prompts[tuple(e.prompt_ids)], tuple(e.response_ids)) for e in examples} <= sampled
    assert len(examples) > 20 and any(in_other_pieces(e.response_ids) for e in examples)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """train_dpo.main, with the calls of its reference pass and of its steps."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("dpo"), "sft", "feedback")
    records = crafted_rankings(run)
    with pytest.MonkeyPatch.context() as patch:
        references = spy(patch, train_dpo, "with_reference")
        steps = spy(patch, train_dpo, "train_step", before=lambda arguments: tiny.weights(arguments["state"].policy))
        train_dpo.main(tiny.dpo_config(run))
    state = steps[0].arguments["state"]
    return SimpleNamespace(run=run, records=records, references=references, steps=steps, state=state)


def test_dpo_changes_the_policy_and_nothing_else(dpo: SimpleNamespace) -> None:
    sft = dpo.run / "sft" / "model"
    reference = dpo.references[0].arguments["reference"]
    assert_frozen(reference, sft)
    assert_apart(dpo.state.policy, reference)
    assert_trains_exactly(dpo.state.optimizer, dpo.state.policy)
    assert tiny.equal(dpo.steps[0].before, tiny.weights(reference))  # both start from the SFT model
    saved = tiny.weights(GPT.from_pretrained(dpo.run / "dpo" / "model"))
    assert tiny.equal(saved, tiny.weights(dpo.state.policy)) and not tiny.equal(saved, tiny.weights(reference))


def test_dpo_trains_on_sampled_ids_with_the_logprobs_of_the_reference(dpo: SimpleNamespace) -> None:
    assert_trained_on_sampled_ids([c for step in dpo.steps for c in step.arguments["comparisons"]], dpo.records)
    reference = GPT.from_pretrained(dpo.run / "sft" / "model")
    for comparison in (c for call in dpo.references for c in call.result):
        for example, recorded in zip(comparison.examples, comparison.ref_seq_logprobs, strict=True):
            expected = tiny.response_logprobs(reference, example.prompt_ids, example.response_ids).sum()
            # A sum of float32 log-probabilities of some tens of nats.
            torch.testing.assert_close(recorded, expected.item(), atol=1e-4, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- reward model
@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """train_reward.main, with the calls of its steps and of its normalisation."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path_factory.mktemp("reward"), "sft", "feedback")
    records = crafted_rankings(run)
    with pytest.MonkeyPatch.context() as patch:
        steps = spy(patch, train_reward, "train_step", before=lambda arguments: tiny.weights(arguments["state"].model))
        normalisations: list[Call] = spy(
            patch, train_reward, "reference_scores", before=lambda arguments: tiny.weights(arguments["model"])
        )
        train_reward.main(tiny.reward_config(run))
    state = steps[0].arguments["state"]
    return SimpleNamespace(run=run, records=records, steps=steps, normalisations=normalisations, state=state)


def test_reward_training_changes_the_reward_model_and_nothing_else(reward: SimpleNamespace) -> None:
    policy = reward.normalisations[0].arguments["policy"]
    assert_frozen(policy, reward.run / "sft" / "model")
    assert_apart(policy, reward.state.model)
    assert_trains_exactly(reward.state.optimizer, reward.state.model)
    saved = RewardModel.from_pretrained(reward.run / "reward" / "model")
    assert tiny.equal(tiny.weights(saved), tiny.weights(reward.state.model))


def test_the_reward_model_starts_from_the_sft_trunk_with_the_head_of_its_seed(reward: SimpleNamespace) -> None:
    sft = GPT.from_pretrained(reward.run / "sft" / "model")
    expected = RewardModel.from_gpt(sft, generator=torch.Generator().manual_seed(tiny.SEED))
    assert tiny.equal(reward.steps[0].before, tiny.weights(expected))


def test_the_reward_model_trains_on_sampled_ids(reward: SimpleNamespace) -> None:
    assert_trained_on_sampled_ids([c for step in reward.steps for c in step.arguments["batch"]], reward.records)


# ---------------------------------------------------------------------------------------------------------- candidates
def test_the_answers_that_reencode_differently_are_counted(tmp_path: Path) -> None:
    """An untrained policy spells most words in pieces of its own."""
    run = tiny.copy_of(tiny.finished_run(), tmp_path)
    GPT(GPT.from_pretrained(tiny.finished_run() / "sft" / "model").config, seed=0).save_pretrained(run / "other")
    tokenizer.save(ENCODING, run / "other")
    file = tiny.run_stage("feedback", run, policy=run / "other")
    records = data.load(file, "pairs")
    (row,) = read_rows(run / "feedback")
    assert row["prompts_with_one_distinct_answer"] == 0  # all records were written
    answers = [ids for r in records for ids in r["response_ids"]]
    assert row["reencoded_differently"] == sum(map(in_other_pieces, answers)) > len(answers) / 2

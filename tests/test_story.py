"""The four scripts are their algorithms: written again here from public functions, the results are the same bits."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import tiny
import torch

import train_dpo
import train_ppo
from minirlhf import data
from minirlhf.batch import batch_indices, micro_batches, permutation
from minirlhf.comparisons import over_comparisons, pad_comparisons, seq_logprobs
from minirlhf.dpo import dpo_loss
from minirlhf.encode import encode_comparisons, encode_prompts, split_by_prompt
from minirlhf.model import GPT
from minirlhf.ops import whiten
from minirlhf.optim import adamw, clip_gradients
from minirlhf.ppo import gae, kl_penalised_rewards, policy_loss, value_loss
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import collect
from minirlhf.runtime import Stream

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- written once more
def ppo_by_hand(run: Path) -> GPT:
    """PPO as `tiny.ppo_config` has it: whitened GAE, a KL penalty in the reward, learning rates that fall to 0."""
    c = tiny.ppo_config(run)
    policy = GPT.from_pretrained(run / "sft" / "model")
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    scorer = RewardModel.from_pretrained(run / "reward" / "model").eval().requires_grad_(False)
    values_of = ValueModel.from_reward_model(scorer)
    optimizer = adamw(policy, learning_rate=0.0, eps=c.adam_eps)
    value_optimizer = adamw(values_of, learning_rate=0.0, eps=c.adam_eps)
    texts = [record["prompt"] for record in data.load(c.prompts, "prompts")]
    prompts = encode_prompts(tiny.ENCODING, texts, max_length=policy.config.n_positions - c.max_new_tokens)
    for iteration in range(c.iterations):
        for group in optimizer.param_groups:
            group["lr"] = c.learning_rate * (c.iterations - iteration) / c.iterations
        for group in value_optimizer.param_groups:
            group["lr"] = c.value_learning_rate * (c.iterations - iteration) / c.iterations
        chosen = batch_indices(len(prompts), c.rollout_size, seed=c.seed, step=iteration)
        rollout = collect(
            policy,
            reference,
            values_of,
            lambda batch: scorer(batch.tokens, batch.lengths),
            [prompts[i] for i in chosen],
            keys=[(Stream.ROLLOUT, iteration, i) for i in chosen],
            seed=c.seed,
            eos_id=tiny.EOS,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            missing_eos_score=c.missing_eos_score,
            rescore=False,
            max_tokens=c.micro_batch_tokens,
        )
        mask, old, ref = rollout.mask, rollout.old_logprobs, rollout.ref_logprobs
        rewards = kl_penalised_rewards(rollout.scores, old, ref, mask, beta=c.beta)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=c.gamma, lam=c.lam)
        advantages = whiten(advantages, mask)
        for epoch in range(c.epochs):
            order = torch.tensor(permutation(len(rollout), c.seed, Stream.MINIBATCH, iteration, epoch))
            for rows in order.tensor_split(min(c.minibatches, len(order))):
                count = mask[rows].sum()
                optimizer.zero_grad()
                value_optimizer.zero_grad()
                for part in micro_batches(rollout.lengths[rows], c.micro_batch_tokens):
                    i = rows[part]
                    w = int(rollout.lengths[i].max())  # the longest row
                    tokens, m = rollout.tokens[i, :w], mask[i, : w - 1]
                    logprobs = policy.logprobs(tokens, m, temperature=c.temperature)
                    pair = (old[i, : w - 1], advantages[i, : w - 1], m)
                    policy_loss(logprobs, *pair, clip=c.clip, denominator=count).backward()
                    targets = (rollout.values[i, : w - 1], returns[i, : w - 1], m)
                    value_loss(values_of(tokens, m), *targets, clip=c.value_clip, denominator=count).backward()
                clip_gradients(policy, c.max_grad_norm)
                clip_gradients(values_of, c.max_grad_norm)
                optimizer.step()
                value_optimizer.step()
    return policy


def dpo_by_hand(run: Path) -> GPT:
    """DPO as `tiny.dpo_config` has it: a linear warm-up and fall of the learning rate."""
    c = tiny.dpo_config(run)
    policy = GPT.from_pretrained(run / "sft" / "model")
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = adamw(policy, learning_rate=0.0)
    records = data.load(run / "feedback" / "rankings.jsonl", "pairs")
    records, _ = split_by_prompt(records, share=c.validation_share, seed=c.seed)
    train = encode_comparisons(tiny.ENCODING, records, max_length=policy.config.n_positions)
    ref = over_comparisons(lambda part: seq_logprobs(reference, part), train, c.micro_batch_tokens, CPU)
    steps = round(c.epochs * -(-len(train) // c.batch_size))
    for step in range(steps):
        warm, left = (step + 1) / c.warmup_steps, (steps - step) / (steps - c.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = c.learning_rate * (warm if step < c.warmup_steps else left)
        rows = batch_indices(len(train), c.batch_size, seed=c.seed, step=step)
        count = sum(len(train[i].pairs) for i in rows)
        optimizer.zero_grad()
        for part in micro_batches(torch.tensor([train[i].length for i in rows]), c.micro_batch_tokens):
            members = [rows[i] for i in part]
            batch = pad_comparisons([train[i] for i in members])
            logprobs, reference_logprobs = seq_logprobs(policy, batch), torch.cat([ref[i] for i in members]).float()
            four = (logprobs[batch.chosen], logprobs[batch.rejected])
            four += (reference_logprobs[batch.chosen], reference_logprobs[batch.rejected])
            dpo_loss(*four, beta=c.beta, denominator=count).backward()
        clip_gradients(policy, c.max_grad_norm)
        optimizer.step()
    return policy


@pytest.mark.parametrize("name, script, by_hand", [("ppo", train_ppo, ppo_by_hand), ("dpo", train_dpo, dpo_by_hand)])
def test_the_algorithm_written_again_ends_with_the_same_bits(name, script, by_hand, tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft", "reward", "feedback")
    config = tiny.STAGES[name][1](run)
    trained = tiny.weights(GPT.from_pretrained(script.main(config)))
    assert tiny.equal(tiny.weights(by_hand(run)), trained)
    assert not tiny.equal(tiny.weights(GPT.from_pretrained(run / "sft" / "model")), trained)


# ------------------------------------------------------------------------------------------------------------- in sight
SCRIPTS = ("train_sft", "train_reward", "train_ppo", "train_dpo")
STEP = {"zero_grad", "backward", "require_finite", "sum_gradients", "clip_gradients", "step"}
LOOP = {"Stage", "begin", "set_learning_rate", "batch_indices", "train_step", "held_out", "finish", "save"}
CALLS = {  # what the two functions call by name
    "train_sft": (LOOP, STEP | {"logprobs", "masked_mean"}),
    "train_reward": (LOOP, STEP | {"response_scores", "bradley_terry_loss", "plackett_luce_loss", "davidson_loss"}),
    "train_dpo": (LOOP | {"with_reference"}, STEP | {"pair_logprobs", "dpo_loss"}),
    "train_ppo": (
        (LOOP - {"set_learning_rate", "batch_indices", "held_out"})
        | {
            "set_learning_rates",
            "sample_rollout",
            "kl_penalised_rewards",
            "gae",
            "whiten",
            "shuffled",
            "require_finite",
        },
        STEP | {"logprobs_and_entropy", "policy_loss", "value_loss", "kl_loss", "ptx_gradient"},
    ),
}
LONGEST = {"train_ppo": 60}  # code lines of `main`; 50 for the others
ORDER = ("Config", "PRESETS", "State", "train_step", "held_out", "main")


def definitions(script: str) -> dict[str, ast.stmt]:
    """The top-level definitions of a script by name, in their order."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def called(function: ast.stmt) -> set[str]:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)}


def code_lines(function: ast.stmt, script: str) -> int:
    """Lines with code of a function: without its docstring, comments and blanks."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    first = function.body[0]
    hidden = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(function) else range(0)
    span = [n for n in range(function.lineno, function.end_lineno + 1) if n not in hidden]
    return sum(bool(lines[n - 1].strip()) and not lines[n - 1].strip().startswith("#") for n in span)


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_and_train_step_hold_the_calls_of_the_algorithm(script: str) -> None:
    parts, (loop, step) = definitions(script), CALLS[script]
    assert loop <= called(parts["main"]), loop - called(parts["main"])
    assert step <= called(parts["train_step"]), step - called(parts["train_step"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_have_the_same_names_in_the_same_order_and_are_short(script: str) -> None:
    parts = definitions(script)
    names = [name for name in parts if name in ORDER]
    assert names == [name for name in ORDER if (script, name) != ("train_ppo", "held_out")]
    assert code_lines(parts["main"], script) <= LONGEST.get(script, 50)
    assert len((ROOT / f"{script}.py").read_text().splitlines()) <= 430


def test_ppo_goes_in_the_order_of_the_paper() -> None:
    """Rollout, rewards, advantages, epochs, optimizer steps; within a step both losses, their gradients, the step."""
    parts = definitions("train_ppo")
    for function, order in (
        ("main", ("sample_rollout", "kl_penalised_rewards", "gae", "whiten", "shuffled", "train_step", "finish")),
        ("train_step", ("zero_grad", "policy_loss", "value_loss", "sum_gradients", "clip_gradients", "step")),
    ):
        calls = [node for node in ast.walk(parts[function]) if isinstance(node, ast.Call)]
        places = {}
        for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset), reverse=True):
            places[node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")] = node.lineno
        lines = [places[name] for name in order]
        assert lines == sorted(lines), dict(zip(order, lines, strict=True))

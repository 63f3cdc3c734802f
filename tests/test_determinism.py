"""The seed decides everything: equal runs write equal files, byte for byte, and another seed writes others.

And what the stages saved is what `transformers` computes with.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny import ENCODING

from minirlhf import data
from minirlhf.encode import encode_prompt
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel

INPUTS = ("sft", "feedback", "reward")  # stages that others read; each test leaves out the one it runs


def files(folder: Path) -> dict[str, bytes]:
    """The stage's results: metrics, and weights or rankings."""
    names = ("metrics.jsonl", "model/model.safetensors", "model/config.json", "rankings.jsonl", "normalisation.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_the_seed_decides_metrics_and_weights_bit_for_bit(stage: str, tmp_path: Path) -> None:
    first = tiny.finished_run()
    run = tiny.copy_of(first, tmp_path, *(name for name in INPUTS if name != stage))
    torch.manual_seed(1)  # a global generator that is not where it was then
    tiny.run_stage(stage, run)
    expected, again = files(first / stage), files(run / stage)
    assert len(expected) >= 2 and again == expected
    tiny.run_stage(stage, run, seed=tiny.SEED + 1)
    other = files(run / stage)
    assert other["metrics.jsonl"] != expected["metrics.jsonl"]
    for name in ("model/model.safetensors", "rankings.jsonl"):
        assert name not in expected or other[name] != expected[name]


def test_a_new_model_has_the_settings_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = GPTConfig(vocab_size=9, n_positions=4, n_layer=1, n_head=1, n_embd=4), transformers.GPT2Config()
    assert ours.layer_norm_epsilon == theirs.layer_norm_epsilon
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def rows() -> list[list[int]]:
    """Prompts with their sampled answers, of unequal length."""
    records = data.load(tiny.finished_run() / "feedback" / "rankings.jsonl", "pairs")
    return [encode_prompt(ENCODING, r["prompt"]) + r["response_ids"][0] for r in records]


@pytest.mark.parametrize("stage", ["sft", "ppo", "dpo"])
def test_transformers_computes_the_logits_of_a_trained_policy(stage: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny.finished_run() / stage / "model"
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = GPT.from_pretrained(folder)
    for ids in rows():
        tokens = torch.tensor([ids])
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-5)


def test_transformers_computes_the_normalised_scores_of_a_trained_reward_model() -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny.finished_run() / "reward" / "model"
    theirs, info = transformers.GPT2ForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = RewardModel.from_pretrained(folder)
    for ids in rows():  # one row at a time: without a padding token transformers reads the last column
        tokens = torch.tensor([ids])
        expected = ours(tokens, torch.tensor([len(ids)]))
        torch.testing.assert_close(theirs.eval()(tokens).logits[0], expected, atol=1e-5, rtol=1e-5)

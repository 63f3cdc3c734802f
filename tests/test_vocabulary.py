"""No model meets a tokenizer that is not its own: every stage refuses the pair before it trains or samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from minirlhf import tokenizer
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.tokenizer import TokenizerError


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and a reward model whose vocabulary was padded to a round number."""
    folder = tmp_path_factory.mktemp("padded")
    gpt = GPT(GPTConfig(vocab_size=704, n_positions=96, n_layer=1, n_head=2, n_embd=16, eos_token_id=tiny.EOS), seed=0)
    gpt.save_pretrained(folder / "policy")
    RewardModel(gpt).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save(tiny.ENCODING, folder / name)
    return folder


@pytest.mark.parametrize(
    ("stage", "setting", "model"),
    [
        ("sft", "model", "policy"),
        ("feedback", "policy", "policy"),
        ("reward", "model", "policy"),
        ("ppo", "policy", "policy"),
        ("ppo", "reward_model", "reward"),
        ("dpo", "policy", "policy"),
    ],
)
def test_a_model_with_more_tokens_than_its_tokenizer_is_refused(stage, setting, model, padded, tmp_path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft", "feedback", "reward")
    changes = {"stage": "other"} if stage in ("ppo", "dpo") else {}
    with pytest.raises(TokenizerError, match=rf"has {tiny.ENCODING.n_vocab} ids, the model a vocabulary of 704"):
        tiny.run_stage(stage, run, **{setting: padded / model}, **changes)

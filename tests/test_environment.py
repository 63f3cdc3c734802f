"""What a stage that samples asks, and what it reads: the room for an answer, the sources, who scores."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import train_ppo
from minirlhf import data, reward_functions, tokenizer
from minirlhf.batch import Example, pad
from minirlhf.files import write_records
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.runtime import UserError

CPU = torch.device("cpu")


def save_model(folder: Path, *, n_positions: int, reward: bool = False, extra_ids: int = 0) -> RewardModel | GPT:
    """A model that was never trained, with the world's tokenizer."""
    shape = GPTConfig(tiny.ENCODING.n_vocab + extra_ids, n_positions, 1, 1, 4)
    gpt = GPT(shape, seed=n_positions)
    model = RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(n_positions)) if reward else gpt
    model.save_pretrained(folder)
    tokenizer.save(tiny.ENCODING, folder)
    return model


@pytest.fixture
def config(tmp_path: Path) -> train_ppo.Config:
    """A policy that reads 40 tokens, a reward model that reads 24, and prompts of which some are longer than 16."""
    save_model(tmp_path / "sft" / "model", n_positions=40)
    save_model(tmp_path / "reward" / "model", n_positions=24, reward=True)
    write_records(tmp_path / "asked.jsonl", [{"prompt": " ".join(["sea"] * n)} for n in (3, 20, 60)])
    return train_ppo.Config(run=tmp_path, prompts=str(tmp_path / "asked.jsonl"), max_new_tokens=8)


def test_a_prompt_leaves_room_for_an_answer_in_every_model(config: train_ppo.Config, tmp_path: Path) -> None:
    asked = [tiny.ENCODING.encode(record["prompt"]) for record in data.load(config.prompts, "prompts")]
    env = reward_functions.read_environment(config, reward_functions.find_sources(config))
    assert [len(ids) for ids in env.prompts] == [min(len(ids), 24 - 8) for ids in asked]
    assert len(asked[0]) < 16 < len(asked[1]) and env.prompts[1] == asked[1][-16:]  # it loses its start
    assert env.texts == [record["prompt"] for record in data.load(config.prompts, "prompts")]  # uncut
    smaller = replace(config, policy=str(tmp_path / "small"))
    save_model(tmp_path / "small", n_positions=20)  # now the policy is the one that reads least
    assert (
        max(map(len, reward_functions.read_environment(smaller, reward_functions.find_sources(smaller)).prompts))
        == 20 - 8
    )


def test_a_reward_model_must_read_the_policys_ids(config: train_ppo.Config, tmp_path: Path) -> None:
    """As many ids in another order: every score would be of other words."""
    ranks = {tiny.ENCODING.decode_single_token_bytes(i): i for i in range(tiny.EOS)}
    one, other = sorted(b for b in ranks if len(b) == 1)[:2]
    ranks |= {one: ranks[other], other: ranks[one]}
    tokenizer.save(tokenizer.from_ranks("exchanged", ranks), tmp_path / "reward" / "model")
    with pytest.raises(UserError, match="reward/model: has other token ids than .*sft/model"):
        reward_functions.read_environment(config, reward_functions.find_sources(config))


def test_one_token_of_a_prompt_must_fit(config: train_ppo.Config) -> None:
    env = reward_functions.read_environment(replace(config, max_new_tokens=23), reward_functions.find_sources(config))
    assert [len(ids) for ids in env.prompts] == [1, 1, 1]
    with pytest.raises(UserError, match="--max-new-tokens 24: .* no room for a prompt"):
        reward_functions.read_environment(replace(config, max_new_tokens=24), reward_functions.find_sources(config))


def test_the_sources_are_all_that_the_result_depends_on(
    config: train_ppo.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brief_env.py").write_text("def f(prompts, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    own, other = tmp_path / "reward" / "model", tmp_path / "other"
    shutil.copytree(own, other)
    functions = ("brief_env:f", "minirlhf.rewards:arithmetic")
    with_all = replace(config, ensemble=(str(other),), reward=functions, reward_model=str(own))
    found = reward_functions.find_sources(with_all)
    assert list(map(Path, found.models)) == [tmp_path / "sft" / "model", own, other]
    modules = (tmp_path / "brief_env.py", Path(reward_functions.__file__))
    assert found.files == (tmp_path / "asked.jsonl", *modules)
    assert list(reward_functions.read_environment(with_all, found).shapes) == list(found.models)
    # A function alone, or with an ensemble: the run's own reward model is not asked unless it is named.
    assert reward_functions.find_sources(replace(with_all, ensemble=(), reward_model=None)).reward_models == ()
    assert list(map(Path, reward_functions.find_sources(replace(with_all, reward_model=None)).reward_models)) == [other]
    assert list(map(Path, reward_functions.find_sources(config).reward_models)) == [own]


def test_a_model_of_another_vocabulary_is_named_before_weights_are_read(
    config: train_ppo.Config, tmp_path: Path
) -> None:
    save_model(tmp_path / "wide", n_positions=24, reward=True, extra_ids=5)
    (tmp_path / "wide" / "model.safetensors").unlink()
    (tmp_path / "wide" / "model.safetensors").touch()
    wrong = replace(config, ensemble=(str(tmp_path / "wide"),))
    with pytest.raises(UserError, match="wide"):
        reward_functions.read_environment(wrong, reward_functions.find_sources(wrong))


def test_who_scores(config: train_ppo.Config, tmp_path: Path) -> None:
    """The run's reward model and another, told apart by what they give: their worst, and a function on top."""
    other = save_model(tmp_path / "other", n_positions=24, reward=True)
    other.normalise(0.5, 2.0)
    other.save_pretrained(tmp_path / "other")
    both = replace(config, ensemble=(str(tmp_path / "other"),), aggregate="worst")
    members = reward_functions.load_reward_models(reward_functions.find_sources(both), CPU)
    assert not any(
        parameter.requires_grad or member.training for member in members for parameter in member.parameters()
    )
    batch = pad([Example([1, 2, 3], [4, 5]), Example([6], [7, 8, 9])])
    with torch.no_grad():
        own, second = (member(batch.tokens, batch.lengths) for member in members)
        score = reward_functions.reward_of(both, members, {"f": lambda p, r: [10.0, 20.0]}, tiny.ENCODING)(batch)
        alone = reward_functions.reward_of(config, members[:1], {}, tiny.ENCODING)(batch)
        function = reward_functions.reward_of(config, [], {"f": lambda p, r: [10.0, 20.0]}, tiny.ENCODING)(batch)
    assert not torch.equal(own, second)
    torch.testing.assert_close(score, torch.minimum(own, second) + torch.tensor([10.0, 20.0]))
    assert torch.equal(alone, own) and function.tolist() == [10.0, 20.0]
    assert reward_functions.texts(tiny.ENCODING, batch)[0][1] == tiny.ENCODING.decode([6])

"""The reward and value heads: where they read, how they start, and what transformers makes of the saved folder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from minirlhf.model import GPT, CheckpointError, GPTConfig
from minirlhf.reward import RewardModel, ValueModel

CONFIG = GPTConfig(vocab_size=11, n_positions=16, n_layer=2, n_head=2, n_embd=16, eos_token_id=10)
UNTIED = GPTConfig(vocab_size=11, n_positions=16, n_layer=2, n_head=2, n_embd=16, tie_word_embeddings=False)
LENGTHS = torch.tensor([6, 5, 10, 8])
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 0, 0, 0, 0],  # prompt of 1, length 6
        [0, 0, 0, 1, 0, 0, 0, 0, 0],  # prompt of 4, length 5
        [0, 1, 1, 1, 1, 1, 1, 1, 1],  # prompt of 2, length 10
        [0, 0, 0, 0, 0, 0, 1, 0, 0],  # prompt of 7, length 8
    ],
    dtype=torch.bool,
)


def lively(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random and far from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def reward_model(config: GPTConfig = CONFIG) -> RewardModel:
    return RewardModel.from_gpt(lively(GPT(config)).double(), generator=torch.Generator().manual_seed(0))


def random_tokens(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 11, (rows, width), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ reward model
@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_the_score_is_the_head_on_the_last_real_token(config: GPTConfig) -> None:
    model, tokens = reward_model(config), random_tokens(4, 10)
    scores = model(tokens, LENGTHS)
    assert scores.shape == (4,) and scores.dtype == torch.float64
    for row, length in enumerate(LENGTHS.tolist()):  # each row alone, unpadded
        hidden = model.gpt.hidden(tokens[row : row + 1, :length])[0, -1]
        assert_close(scores[row], hidden @ model.score.weight[0])
    last = tokens.clone()
    last[torch.arange(4), LENGTHS - 1] = (last[torch.arange(4), LENGTHS - 1] + 1) % 11
    assert ((model(last, LENGTHS) - scores).abs() > 1e-3).all()


def test_padding_changes_neither_scores_nor_gradients() -> None:
    model, tokens = reward_model(), random_tokens(4, 10)

    def scores_and_gradients(tokens: torch.Tensor) -> tuple:
        scores = model(tokens, LENGTHS)
        return scores, torch.autograd.grad(scores.square().sum(), list(model.parameters()))

    expected = scores_and_gradients(tokens)
    other = tokens.clone()
    for row, length in enumerate(LENGTHS.tolist()):
        other[row, length:] = (other[row, length:] + 5) % 11
    assert_close(scores_and_gradients(other), expected)
    assert_close(scores_and_gradients(torch.nn.functional.pad(other, (0, 5), value=10)), expected)


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_outside_the_row_is_refused(length: int) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        reward_model()(random_tokens(1, 10), torch.tensor([length]))


def test_the_head_starts_with_deviation_one_over_root_of_channels_plus_one() -> None:
    gpt = GPT(GPTConfig(vocab_size=3, n_positions=2, n_layer=1, n_head=1, n_embd=3))
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    heads = [RewardModel.from_gpt(gpt, generator=generator).score.weight[0] for _ in range(300)]
    assert torch.equal(before, torch.get_rng_state())
    again = RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(0)).score.weight[0]
    assert torch.equal(heads[0], again) and not torch.equal(heads[0], heads[1])  # from the generator alone
    weights = torch.stack(heads).detach()
    # 1 / sqrt(3 + 1) = 0.5 (and 1 / sqrt(3) = 0.58); over 900 numbers the standard error is 2.4 %
    assert abs(weights.std().item() / 0.5 - 1) < 0.1
    assert abs(weights.mean().item()) < 0.07


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_the_trunk_is_a_deep_copy_with_nothing_superfluous(config: GPTConfig) -> None:
    gpt = lively(GPT(config)).requires_grad_(False)  # a frozen SFT model gives a reward model that trains
    model = RewardModel.from_gpt(gpt, generator=torch.Generator().manual_seed(0))
    assert not {p.data_ptr() for p in gpt.parameters()} & {p.data_ptr() for p in model.parameters()}
    ours = dict(model.gpt.named_parameters())
    assert ours.keys() == dict(gpt.named_parameters()).keys() - {"lm_head.weight"}
    assert all(torch.equal(value, gpt.state_dict()[name]) for name, value in ours.items())
    model(random_tokens(4, 10), LENGTHS).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert "bias" not in dict(model.score.named_parameters()) and not list(model.buffers())


def test_normalising_gives_mean_0_and_deviation_1_and_keeps_the_ranking() -> None:
    model, tokens = reward_model(), random_tokens(64, 10)
    lengths = torch.full((64,), 10)
    old = model(tokens, lengths).detach()
    model.normalise(old.mean().item(), old.std().item())
    new = model(tokens, lengths).detach()
    assert_close(new, (old - old.mean()) / old.std())
    assert torch.equal(new.argsort(), old.argsort())
    model.normalise(2.0, 0.5)  # a second time composes with the first
    assert_close(model(tokens, lengths).detach(), (new - 2) / 0.5)


def test_normalising_keeps_the_parameters_an_optimizer_holds() -> None:
    model = reward_model()
    held = {name: parameter for name, parameter in model.named_parameters()}
    model.normalise(1.0, 2.0)
    assert all(parameter is held[name] and parameter.requires_grad for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_impossible_normalisations_are_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="must vary"):
        reward_model().normalise(mean, std)


# ------------------------------------------------------------------------------------------------------ transformers
@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_transformers_loads_what_we_save(config: GPTConfig, tmp_path: Path) -> None:
    model = RewardModel.from_gpt(lively(GPT(config)), generator=torch.Generator().manual_seed(0))
    model.normalise(0.7, 0.3)
    model.save_pretrained(tmp_path)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, GPT2ForSequenceClassification) and theirs.config.num_labels == 1
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = random_tokens(4, 10)
    tokens[torch.arange(4), LENGTHS - 1] = 10  # rows that end with EOS, and one that has it inside, too
    tokens[2, 3] = 10
    with torch.no_grad():
        scores = model(tokens, LENGTHS)
        for row, length in enumerate(LENGTHS.tolist()):
            logits = theirs(tokens[row : row + 1, :length]).logits
            assert_close(logits[0], scores[row : row + 1], atol=1e-5, rtol=1e-5)  # float32 sums in another order


def test_scores_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf_config = GPT2Config(vocab_size=11, n_positions=16, n_layer=2, n_head=2, n_embd=16, num_labels=1)
    theirs = lively(GPT2ForSequenceClassification(hf_config).eval().double())
    theirs.save_pretrained(tmp_path)
    ours, tokens = RewardModel.from_pretrained(tmp_path), random_tokens(4, 10)
    with torch.no_grad():
        rows = [theirs(tokens[row : row + 1, :length]).logits[0, 0] for row, length in enumerate(LENGTHS.tolist())]
        assert_close(ours(tokens, LENGTHS), torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saving_and_loading_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = reward_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and theirs.dtype == dtype and torch.equal(ours, theirs) and theirs.requires_grad


def test_the_wrong_kind_of_folder_is_refused(tmp_path: Path) -> None:
    GPT(CONFIG).save_pretrained(tmp_path / "gpt")
    reward_model().save_pretrained(tmp_path / "reward")
    with pytest.raises(CheckpointError, match="missing score.weight; give a folder that holds a RewardModel"):
        RewardModel.from_pretrained(tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="unexpected score.weight; give a folder that holds a GPT"):
        GPT.from_pretrained(tmp_path / "reward")


def test_two_labels_are_refused(tmp_path: Path) -> None:
    hf_config = GPT2Config(vocab_size=11, n_positions=16, n_layer=1, n_head=2, n_embd=16, num_labels=2)
    GPT2ForSequenceClassification(hf_config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score.weight is F32 \(2, 16\)"):
        RewardModel.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------- value model
def test_values_start_at_0_on_a_deep_copy_of_the_reward_trunk() -> None:
    rewards = reward_model().requires_grad_(False)
    before = torch.get_rng_state()
    model, tokens = ValueModel.from_reward_model(rewards), random_tokens(4, 10)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model(tokens, MASK), torch.zeros(4, 9, dtype=torch.float64))
    assert not {p.data_ptr() for p in rewards.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, rewards.gpt.state_dict()[name]) for name, p in model.gpt.named_parameters())
    kept = copy.deepcopy(rewards.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, kept[name]) for name, value in rewards.state_dict().items())


def test_the_value_at_t_knows_the_token_at_t_and_not_the_action_after_it() -> None:
    model, tokens = lively(ValueModel.from_reward_model(reward_model())), random_tokens(2, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    values = model(tokens, mask)
    for t in range(7):
        assert_close(values[:, t], model.value(model.gpt.hidden(tokens[:, : t + 1])[:, -1])[:, 0])
        other = tokens.clone()
        other[:, t + 1] = (tokens[:, t + 1] + 1) % 11
        changed = (model(other, mask) - values).abs() > 1e-6
        assert not changed[:, : t + 1].any() and changed[:, t + 1 :].all()


def test_values_are_0_off_the_mask_and_padding_changes_nothing() -> None:
    model, tokens = lively(ValueModel.from_reward_model(reward_model())), random_tokens(4, 10)

    def values_and_gradients(tokens: torch.Tensor, mask: torch.Tensor) -> tuple:
        values = model(tokens, mask)
        return values, torch.autograd.grad(values.square().sum(), list(model.parameters()))

    values, gradients = values_and_gradients(tokens, MASK)
    assert values.shape == (4, 9)
    assert (values[~MASK] == 0).all() and (values[MASK] != 0).all()
    other = tokens.clone()
    for row, length in enumerate(LENGTHS.tolist()):
        other[row, length:] = (other[row, length:] + 5) % 11
    assert_close(values_and_gradients(other, MASK), (values, gradients))
    wide, wide_gradients = values_and_gradients(
        torch.nn.functional.pad(other, (0, 3)), torch.nn.functional.pad(MASK, (0, 3))
    )
    assert_close((wide[:, :9], wide_gradients), (values, gradients))


def test_scores_and_values_are_float32_under_autocast() -> None:
    rewards = reward_model().float()
    values = lively(ValueModel.from_reward_model(rewards))
    tokens = random_tokens(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rewards(tokens, LENGTHS).dtype == values(tokens, MASK).dtype == torch.float32

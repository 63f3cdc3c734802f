"""GPT-2 against transformers, against itself with a cache, and against the laws of right padding."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from minirlhf import model as model_module
from minirlhf import ops
from minirlhf.model import GPT, GPTConfig, KVCache

CONFIG = GPTConfig(vocab_size=11, n_positions=16, n_layer=2, n_head=2, n_embd=16, eos_token_id=10)
UNTIED = GPTConfig(vocab_size=11, n_positions=16, n_layer=2, n_head=2, n_embd=16, tie_word_embeddings=False)


def lively(gpt: GPT, seed: int = 0) -> GPT:
    """Every parameter random and far from its initial value, so that no term of the forward is negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return gpt


def random_tokens(rows: int, width: int, *, vocab_size: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, width), generator=torch.Generator().manual_seed(seed))


def response_mask(prompt_lengths: list[int], lengths: list[int], width: int) -> torch.Tensor:
    """Independent of Batch.mask: by loops, over (row, index)."""
    mask = torch.zeros(len(lengths), width - 1, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        for position in range(start, end):
            mask[row, position - 1] = True
    return mask


# ------------------------------------------------------------------------------------------------------ transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [
        {"n_layer": 2, "n_head": 2, "n_embd": 16},
        {"n_layer": 3, "n_head": 1, "n_embd": 8, "tie_word_embeddings": False},
        # 3 C = V and C = n_positions: more square and equal shapes that a wrong orientation would slip through
        {"n_layer": 1, "n_head": 4, "n_embd": 12, "n_positions": 12, "vocab_size": 36, "layer_norm_epsilon": 1e-2},
    ],
)
def test_logits_of_transformers(shape: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf_config = GPT2Config(**{"vocab_size": 11, "n_positions": 16, "initializer_range": 0.3, **shape})
    theirs = GPT2LMHeadModel(hf_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and LayerNorms start at 0 and 1, which hides mistakes
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.to(dtype).save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    tokens = random_tokens(3, 12, vocab_size=hf_config.vocab_size)
    with torch.no_grad():
        logits = ours(tokens)
        assert logits.dtype == dtype
        # float32 sums in another order; the float64 case has the default tolerance
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
        assert_close(logits, theirs(tokens).logits, **tolerance)


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_transformers_loads_what_we_save(config: GPTConfig, tmp_path: Path) -> None:
    ours = lively(GPT(config)).double()
    ours.save_pretrained(tmp_path)
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.dtype == torch.float64
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"  # of the file, for older versions
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == config.eos_token_id
    assert theirs.config.resid_pdrop == theirs.config.embd_pdrop == theirs.config.attn_pdrop == 0
    tokens = random_tokens(3, 16)
    with torch.no_grad():
        assert_close(ours(tokens), theirs.train()(tokens).logits)  # train mode: no dropout on their side either


def test_trained_weights_give_their_expected_logits(real_data: Path) -> None:
    folder = real_data / "weights" / "gpt-nano-sort"
    cases = json.loads((folder / "expected.json").read_text())["cases"]
    with torch.no_grad():
        logits = GPT.from_pretrained(folder)(torch.tensor([case["input_ids"] for case in cases]))
    # stored with 5 decimals, computed in float32
    assert_close(logits, torch.tensor([case["logits"] for case in cases]), atol=1.5e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ forward and cache
@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_token_changes_nothing_before_it(changed: int) -> None:
    gpt = lively(GPT(CONFIG))
    tokens = random_tokens(2, 8)
    other = tokens.clone()
    other[:, changed] = (tokens[:, changed] + 1) % 11
    same, different = gpt(tokens), gpt(other)
    assert torch.equal(same[:, :changed], different[:, :changed])
    assert ((same[:, changed:] - different[:, changed:]).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_cached_decoding_is_the_full_forward() -> None:
    gpt = lively(GPT(CONFIG)).double()
    tokens = random_tokens(4, 12)
    lengths = torch.tensor([1, 5, 3, 5])
    prompts = tokens[:, :5].clone()
    for row, length in enumerate(lengths.tolist()):
        prompts[row, length:] = 9 - row  # padding, which decoding has to write over
    full = gpt.hidden(tokens)
    cache = KVCache((2, 2, 4, 2, 11, 8), dtype=torch.float64)
    cache.admit(torch.arange(4), lengths)
    prefill = gpt.hidden(prompts, cache)
    rows = torch.arange(4)
    assert_close(prefill[rows, lengths - 1], full[rows, lengths - 1])
    for step in range(6):
        if step == 2:  # rows leave and change places
            rows = torch.tensor([3, 0, 2])
            cache.select(rows)
        if step == 4:
            rows = rows[[1]]
            cache.select(torch.tensor([1]))
        place = lengths[rows] + step
        cache.widen()
        hidden = gpt.hidden(tokens[rows, place][:, None], cache)[:, 0]
        assert_close(hidden, full[rows, place])
        assert torch.equal(cache.lengths, place + 1)


def test_a_cache_has_its_own_lengths_and_takes_one_token_after_the_prompt() -> None:
    gpt, lengths = GPT(CONFIG), torch.tensor([2, 3])
    cache = KVCache((2, 2, 2, 2, 8, 8), dtype=torch.float32)
    cache.admit(torch.arange(2), lengths)
    assert cache.buffer.shape == (2, 2, 2, 2, 8, 8)  # (n_layer, 2, B, H, T, D)
    gpt.hidden(random_tokens(2, 3), cache)
    cache.widen()
    gpt.hidden(random_tokens(2, 1), cache)
    assert lengths.tolist() == [2, 3] and cache.lengths.tolist() == [3, 4]
    with pytest.raises(ValueError, match="one token per row"):
        gpt.hidden(random_tokens(2, 2), cache)


def test_training_mode_changes_nothing() -> None:
    gpt, tokens = lively(GPT(CONFIG)), random_tokens(2, 8)
    assert torch.equal(gpt.train()(tokens), gpt.eval()(tokens))
    assert not any(isinstance(module, torch.nn.Dropout) for module in gpt.modules())


def test_rows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="n_positions = 16"):
        GPT(CONFIG)(random_tokens(1, 17))


# --------------------------------------------------------------------------------------------------- log-probabilities
PROMPT_LENGTHS, LENGTHS = [1, 4, 2, 7], [6, 5, 10, 8]
MASK = response_mask(PROMPT_LENGTHS, LENGTHS, 10)


@pytest.mark.parametrize(("config", "temperature"), [(CONFIG, 1.0), (CONFIG, 0.7), (UNTIED, 1.0)])
def test_logprobs_are_those_of_the_readable_definition(config: GPTConfig, temperature: float) -> None:
    gpt, tokens = lively(GPT(config)).double(), random_tokens(4, 10)
    logprobs = gpt.logprobs(tokens, MASK, temperature=temperature)
    expected = ops.token_logprobs(gpt(tokens) / temperature, tokens)
    assert_close(logprobs[MASK], expected[MASK])
    assert logprobs.shape == (4, 9) and logprobs.dtype == torch.float64
    assert (logprobs[~MASK] == 0).all()
    weights = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(4, 9)
    ours = torch.autograd.grad((logprobs * weights).sum(), list(gpt.parameters()))
    theirs = torch.autograd.grad((expected * weights)[MASK].sum(), list(gpt.parameters()))
    assert_close(ours, theirs)


def test_logprobs_by_loops_over_each_row_alone() -> None:
    gpt, tokens = lively(GPT(CONFIG)).double(), random_tokens(4, 10)
    logprobs = gpt.logprobs(tokens, MASK, temperature=0.5)
    for row, (start, end) in enumerate(zip(PROMPT_LENGTHS, LENGTHS, strict=True)):
        for position in range(start, end):  # the token at `position` given all before it, and nothing else
            p = torch.softmax(gpt(tokens[row : row + 1, :position])[0, -1] / 0.5, dim=-1)
            assert_close(logprobs[row, position - 1], p[tokens[row, position]].log())


def test_entropy_is_that_of_the_distribution_and_carries_no_gradient() -> None:
    gpt, tokens = lively(GPT(CONFIG)).double(), random_tokens(4, 10)
    logprobs, entropy = gpt.logprobs_and_entropy(tokens, MASK, temperature=0.7)
    assert torch.equal(logprobs, gpt.logprobs(tokens, MASK, temperature=0.7))
    p = torch.softmax(gpt(tokens)[:, :-1] / 0.7, dim=-1)
    assert_close(entropy[MASK], -(p * p.log()).sum(-1)[MASK].detach())
    assert (entropy[~MASK] == 0).all() and not entropy.requires_grad and logprobs.requires_grad


def test_entropy_of_impossible_tokens_is_finite() -> None:
    gpt = GPT(UNTIED)
    with torch.no_grad():
        gpt.lm_head.weight[:, 0] = torch.linspace(-1e4, 1e4, 11)  # all but one probability underflow to 0
    _, entropy = gpt.logprobs_and_entropy(random_tokens(1, 4), torch.ones(1, 3, dtype=torch.bool))
    assert_close(entropy, torch.zeros(1, 3))


@pytest.mark.parametrize("max_logits", [11, 55, 11 * 16])  # one row a chunk, five, all but one in the first
def test_chunks_change_neither_values_nor_gradients(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, tokens = lively(GPT(CONFIG)).double(), random_tokens(4, 10)
    assert MASK.sum() == 15 and 55 // 11 * 3 == 15
    mask = MASK.clone()
    mask[0, 7:] = True  # 17 positions: the last chunk is a partial one
    whole = gpt.logprobs_and_entropy(tokens, mask, temperature=0.7)
    grads = torch.autograd.grad(whole[0].square().sum(), list(gpt.parameters()))
    widest = []
    head = model_module.log_softmax
    monkeypatch.setattr(model_module, "MAX_LOGITS", max_logits)
    monkeypatch.setattr(model_module, "log_softmax", lambda h, *rest: widest.append(len(h)) or head(h, *rest))
    chunked = gpt.logprobs_and_entropy(tokens, mask, temperature=0.7)
    assert max(widest) * 11 <= max_logits and sum(widest) == 17
    assert_close(chunked, whole)
    assert_close(gpt.logprobs(tokens, mask, temperature=0.7), whole[0])
    assert_close(torch.autograd.grad(chunked[0].square().sum(), list(gpt.parameters())), grads)


class LargestLogits(TorchDispatchMode):
    """Records the largest tensor over the vocabulary that any operation returns."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 0 and result.shape[-1] == 97:
            self.rows = max(self.rows, result.numel() // 97)
        return result


def test_the_head_runs_on_masked_positions_alone() -> None:
    gpt = GPT(GPTConfig(vocab_size=97, n_positions=16, n_layer=1, n_head=1, n_embd=4))
    tokens = random_tokens(4, 10, vocab_size=97)
    with LargestLogits() as largest:
        gpt.logprobs(tokens, MASK).sum().backward()
    assert largest.rows == MASK.sum()  # 15 and not 4 * 10


def test_padding_and_the_other_rows_change_nothing() -> None:
    gpt, tokens = lively(GPT(CONFIG)).double(), random_tokens(4, 10)

    def values_and_gradients(tokens: torch.Tensor, mask: torch.Tensor) -> tuple:
        logprobs, entropy = gpt.logprobs_and_entropy(tokens, mask)
        return logprobs, entropy, torch.autograd.grad(logprobs.square().sum(), list(gpt.parameters()))

    logprobs, entropy, gradient = values_and_gradients(tokens, MASK)
    other = tokens.clone()
    for row, length in enumerate(LENGTHS):
        other[row, length:] = (other[row, length:] + 5) % 11
    assert_close(values_and_gradients(other, MASK), (logprobs, entropy, gradient))
    wider = torch.nn.functional.pad(other, (0, 4), value=3)
    mask = torch.nn.functional.pad(MASK, (0, 4))
    logprobs_wide, entropy_wide, gradient_wide = values_and_gradients(wider, mask)
    assert_close((logprobs_wide[:, :9], entropy_wide[:, :9], gradient_wide), (logprobs, entropy, gradient))
    order = torch.tensor([2, 0, 3, 1])
    logprobs_permuted, entropy_permuted, gradient_permuted = values_and_gradients(tokens[order], MASK[order])
    assert_close((logprobs_permuted, entropy_permuted, gradient_permuted), (logprobs[order], entropy[order], gradient))


def test_an_empty_mask_gives_zeros_and_zero_gradients() -> None:
    gpt, tokens = GPT(CONFIG), random_tokens(2, 5)
    logprobs = gpt.logprobs(tokens, torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(logprobs, torch.zeros(2, 4))
    logprobs.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in gpt.parameters() if p.grad is not None)


def test_a_mask_of_another_kind_is_refused() -> None:
    gpt, tokens = GPT(CONFIG), random_tokens(4, 10)
    for wrong in (MASK.float(), MASK[:, 1:], torch.ones(4, 10, dtype=torch.bool)):
        with pytest.raises(ValueError, match="one column narrower"):
            gpt.logprobs(tokens, wrong)


def test_half_types_are_scored_in_float32() -> None:
    gpt, tokens = lively(GPT(CONFIG)), random_tokens(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gpt(tokens)
        logprobs = gpt.logprobs(tokens, MASK, temperature=0.7)
    assert logits.dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    # Exact up to float32, given the half logits: the division by T, too, comes after the upcast. The two heads see
    # other shapes and round a few logits to a neighbouring bfloat16 (8 bits: up to 2**-6 for logits of 2 to 4).
    expected = ops.token_logprobs(logits.float() / 0.7, tokens)
    assert ((logprobs - expected)[MASK].abs() < 1e-5).float().mean() > 0.5
    half = copy.deepcopy(gpt).to(torch.bfloat16).logprobs(tokens, MASK)
    assert half.dtype == torch.float32


# ---------------------------------------------------------------------------------------------- parameters and copies
def test_initial_weights() -> None:
    gpt = GPT(GPTConfig(vocab_size=500, n_positions=300, n_layer=8, n_head=2, n_embd=64, tie_word_embeddings=False))
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            # the standard error of a deviation over n numbers is std / sqrt(2 n): n >= 4096 here, so 5 % is 4.5 errors
            assert abs(parameter.std().item() / std - 1) < 0.05, name
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = GPT(CONFIG, seed=3)
    torch.rand(7)
    second, other = GPT(CONFIG, seed=3), GPT(CONFIG, seed=4)
    torch.set_rng_state(before)
    GPT(UNTIED)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.wte.weight, other.wte.weight)


def test_the_head_stays_tied() -> None:
    gpt = GPT(CONFIG)
    assert "lm_head.weight" not in dict(gpt.named_parameters())
    fresh = GPT(CONFIG, seed=1)
    fresh.load_state_dict(gpt.state_dict())
    for copied in (gpt, copy.deepcopy(gpt), fresh, copy.deepcopy(gpt).double()):
        assert copied.head_weight.data_ptr() == copied.wte.weight.data_ptr()
        tokens = torch.tensor([[1, 2, 3]])
        before = copied(tokens).detach()
        with torch.no_grad():
            copied.wte.weight[7] += 1  # not an input here: only the logit of token 7 may move
        changed = (copied(tokens) != before).any(dim=1)[0]
        assert changed.nonzero().flatten().tolist() == [7]


def test_an_untied_head_is_separate() -> None:
    gpt = GPT(UNTIED)
    assert gpt.head_weight.data_ptr() != gpt.wte.weight.data_ptr()
    assert not torch.equal(gpt.head_weight, gpt.wte.weight)


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_deep_copies_share_nothing(config: GPTConfig) -> None:
    gpt = GPT(config)
    reference = copy.deepcopy(gpt).eval().requires_grad_(False)
    assert not {p.data_ptr() for p in gpt.parameters()} & {p.data_ptr() for p in reference.parameters()}
    kept = {name: value.clone() for name, value in reference.state_dict().items()}
    optimizer = torch.optim.SGD(gpt.parameters(), lr=1.0)
    gpt.logprobs(random_tokens(4, 10), MASK).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, kept[name]) for name, value in reference.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gpt.parameters())  # and every one of ours trains


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_layer": 0}, "n_layer is 0"), ({"n_head": 3}, "16 is not a multiple of n_head 3"), ({"vocab_size": -1}, "-1")],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    shape = {"vocab_size": 11, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**shape, **change})

"""The sampler: what it draws, what it records, and what its result must not depend on."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirlhf import generate as decoding
from minirlhf import kv_cache, ops
from minirlhf.generate import Decoder, Samples, generate, sample
from minirlhf.kv_cache import KVCache
from minirlhf.model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=7, n_positions=24, n_layer=2, n_head=2, n_embd=16)
EOS = 6


def lively(config: GPTConfig = CONFIG, *, scale: float = 0.2, seed: int = 0) -> GPT:
    """A model whose next-token distributions are far from uniform and differ from place to place."""
    gpt, generator = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return gpt


def some_prompts(count: int, *, longest: int = 6, vocab_size: int = 7) -> list[list[int]]:
    stream = random.Random(0)
    return [[stream.randrange(vocab_size) for _ in range(stream.randint(1, longest))] for _ in range(count)]


def responses(samples: Samples) -> list[list[int]]:
    starts, ends = samples.prompt_lengths.tolist(), samples.lengths.tolist()
    return [row[start:end] for row, start, end in zip(samples.tokens.tolist(), starts, ends, strict=True)]


def scripted(script: list[int], vocab_size: int = 7) -> GPT:
    """A model that follows position p by script[p], whatever the tokens are: the blocks add nothing."""
    places = len(script)
    gpt = GPT(GPTConfig(vocab_size, places, n_layer=1, n_head=1, n_embd=places, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.zero_()
        gpt.ln_f.weight.fill_(1.0)
        gpt.wpe.weight.copy_(torch.eye(places))
        gpt.lm_head.weight[torch.tensor(script), torch.arange(places)] = 50.0
    return gpt


# --------------------------------------------------------------------------------------------------- layout of a batch
def test_the_result_is_a_right_padded_training_batch() -> None:
    prompts = some_prompts(24)
    samples = generate(lively(), prompts, max_new_tokens=10, eos_id=EOS)
    assert samples.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    width = int(samples.lengths.max())
    assert samples.tokens.shape == (24, width) and samples.logprobs.shape == (24, width - 1)
    for row, (prompt, response) in enumerate(zip(prompts, responses(samples), strict=True)):
        assert samples.tokens[row, : len(prompt)].tolist() == prompt
        assert (samples.tokens[row, len(prompt) + len(response) :] == 0).all()
        assert 1 <= len(response) <= 10 and EOS not in response[:-1]
        assert bool(samples.finished[row]) == (response[-1] == EOS)
        assert samples.finished[row] or len(response) == 10
        scored = torch.zeros(width - 1, dtype=torch.bool)
        scored[len(prompt) - 1 : len(prompt) + len(response) - 1] = True  # one index before each response token
        assert (samples.logprobs[row][~scored] == 0).all() and (samples.logprobs[row][scored] < 0).all()
        assert torch.equal(samples.mask[row], scored)
    assert 0 < samples.finished.sum() < 24  # both cases occur


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eos_first_in_the_middle_and_never(temperature: float) -> None:
    model = scripted([1, EOS, 2, 3, 4, EOS, 1, 2, 3, 4, 5, 1])
    # Prompt lengths 2, 3 and 7: what follows is script[1:], script[2:] and script[6:], up to 4 tokens.
    prompts = [[5, 5], [EOS, 5, EOS], [0] * 7]
    samples = generate(model, prompts, max_new_tokens=4, eos_id=EOS, temperature=temperature)
    assert responses(samples) == [[EOS], [2, 3, 4, EOS], [1, 2, 3, 4]]
    assert samples.lengths.tolist() == [3, 7, 11]  # the EOS counts; that of the prompt ends nothing
    assert samples.finished.tolist() == [True, True, False]  # an EOS as the last allowed token is an end, too
    assert samples.mask.sum(dim=1).tolist() == [1, 4, 4]
    never = generate(model, prompts, max_new_tokens=4, eos_id=None, temperature=temperature)
    assert responses(never) == [[EOS, 2, 3, 4], [2, 3, 4, EOS], [1, 2, 3, 4]]
    assert not never.finished.any()


def test_the_width_is_that_of_the_longest_row() -> None:
    model = scripted([EOS] * 11 + [1])
    samples = generate(model, [[1], [1, 2, 3]], max_new_tokens=9, eos_id=EOS)
    assert samples.tokens.tolist() == [[1, EOS, 0, 0], [1, 2, 3, EOS]]


def test_eos_may_be_token_0() -> None:
    model = scripted([1, 2, 0, 3, 4, 5], vocab_size=6)
    samples = generate(model, [[1], [1, 1, 1, 1]], max_new_tokens=3, eos_id=0)
    assert responses(samples) == [[1, 2, 0], [3, 4, 5]] and samples.finished.tolist() == [True, False]


def test_all_positions_of_the_model_can_be_used() -> None:
    model = scripted([1, 2, 3, 4])
    assert responses(generate(model, [[5, 5, 5, 5]], max_new_tokens=1, eos_id=None)) == [[4]]
    assert responses(generate(model, [[5, 5]], max_new_tokens=3, eos_id=None)) == [[2, 3, 4]]
    with pytest.raises(ValueError, match="exceeds the model's n_positions 4"):
        generate(model, [[5, 5]], max_new_tokens=4, eos_id=None)


def test_trained_weights_sort(real_data: Path) -> None:
    model = GPT.from_pretrained(real_data / "weights" / "gpt-nano-sort")
    stream = random.Random(0)
    prompts = [[stream.randrange(3) for _ in range(6)] for _ in range(500)]
    samples = generate(model, prompts, max_new_tokens=6, eos_id=None, temperature=0)
    correct = sum(response == sorted(prompt) for prompt, response in zip(prompts, responses(samples), strict=True))
    assert correct == 500
    cases = json.loads((real_data / "weights" / "gpt-nano-sort" / "expected.json").read_text())["cases"]
    samples = generate(model, [case["input_ids"][:6] for case in cases], max_new_tokens=6, eos_id=None, temperature=0)
    assert responses(samples) == [case["sorted"] for case in cases]


# ----------------------------------------------------------------------------------------------- recorded log-probs
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_recorded_logprobs_are_those_of_the_training_forward(temperature: float) -> None:
    model = lively()
    samples = generate(model, some_prompts(40), max_new_tokens=12, eos_id=EOS, temperature=temperature)
    with torch.no_grad():
        training = model.logprobs(samples.tokens, samples.mask, temperature=temperature)
        readable = ops.token_logprobs(model(samples.tokens) / temperature, samples.tokens)
    assert samples.logprobs.dtype == torch.float32
    assert_close(samples.logprobs, training)
    assert_close(samples.logprobs[samples.mask], readable[samples.mask])


def test_the_argmax_is_greedy_and_scored_at_temperature_1() -> None:
    model, prompts = lively(), some_prompts(12)
    samples = generate(model, prompts, max_new_tokens=8, eos_id=EOS, temperature=0)
    for row, response in enumerate(responses(samples)):
        ids = list(prompts[row])
        for token in response:
            assert token == model(torch.tensor([ids]))[0, -1].argmax()
            ids.append(token)
    assert_close(samples.logprobs, model.logprobs(samples.tokens, samples.mask).detach())
    other = generate(model, prompts, max_new_tokens=8, eos_id=EOS, temperature=0, seed=9)
    assert torch.equal(samples.tokens, other.tokens)


def test_float64_models_record_float64() -> None:
    model = lively().double()
    samples = generate(model, some_prompts(12), max_new_tokens=8, eos_id=EOS, temperature=0.7)
    assert samples.logprobs.dtype == torch.float64
    assert_close(samples.logprobs, model.logprobs(samples.tokens, samples.mask, temperature=0.7).detach())


def test_under_autocast_the_cache_is_half_and_the_record_float32() -> None:
    model = lively()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples = generate(model, some_prompts(12), max_new_tokens=8, eos_id=EOS)
    assert samples.logprobs.dtype == torch.float32
    exact = model.logprobs(samples.tokens, samples.mask).detach()
    # bfloat16 keeps 8 bits: logits of size 4 are known to about 0.02, and errors add up over two layers
    assert_close(samples.logprobs, exact, atol=0.1, rtol=0.05)


# ------------------------------------------------------------------------------------------------------ distribution
# 99.9 % points of the chi-square distribution with 20 degrees of freedom
CHI_SQUARE_20 = 45.315


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_frequencies_match_the_probabilities(temperature: float) -> None:
    config = GPTConfig(vocab_size=5, n_positions=8, n_layer=1, n_head=2, n_embd=8)
    model, prompt, count = lively(config, scale=0.25), [0, 3], 20_000
    # All responses of up to two tokens, EOS = 4: [4], and [a, b] with a != 4. 1 + 4 * 5 = 21 outcomes.
    outcomes = [(4,), *itertools.product(range(4), range(5))]
    expected = {}
    for outcome in outcomes:
        p = 1.0
        for place, token in enumerate(outcome):
            logits = model(torch.tensor([[*prompt, *outcome[:place]]]))[0, -1].double()
            p *= torch.softmax(logits / temperature, dim=-1)[token].item()
        expected[outcome] = p * count
    assert abs(sum(expected.values()) / count - 1) < 1e-9 and min(expected.values()) > 5
    samples = generate(model, [prompt] * count, max_new_tokens=2, eos_id=4, temperature=temperature, seed=1)
    found = Counter(tuple(response) for response in responses(samples))
    assert found.keys() <= expected.keys()
    assert sum((found[outcome] - e) ** 2 / e for outcome, e in expected.items()) < CHI_SQUARE_20


def test_a_token_of_probability_0_is_never_drawn() -> None:
    below_1 = float(np.nextafter(np.float32(1), np.float32(0)))
    impossible = float("-inf")
    logits = torch.tensor([[impossible, 1.0, impossible, 2.0, impossible]]).expand(3, 5)
    tokens, logprobs = sample(logits, torch.tensor([0.0, below_1, 0.5]), temperature=1.0)
    assert tokens.tolist() == [1, 3, 3]  # p(1) = 1 / (1 + e) = 0.269
    assert_close(logprobs, torch.tensor([0.268941, 0.731059, 0.731059]).log())
    # With a wide vocabulary the float32 sum of the probabilities differs from 1: the last token must stay out.
    wide = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    wide[:, 49_000:] = impossible
    tokens, logprobs = sample(wide, torch.full((64,), below_1), temperature=1.0)
    assert (tokens < 49_000).all() and torch.isfinite(logprobs).all()


def test_sampling_is_inverse_cdf_at_the_temperature() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.999])
    tokens, logprobs = sample(p.log().expand(8, 4), uniforms, temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_close(logprobs, p[0, tokens].log())
    # At T = 0.5 the probabilities are squared and renormalised: 1, 4, 9, 16 of 30.
    tokens, logprobs = sample(p.log().expand(4, 4), torch.tensor([0.03, 0.16, 0.46, 0.47]), temperature=0.5)
    assert tokens.tolist() == [0, 1, 2, 3]
    assert_close(logprobs, torch.tensor([1.0, 4.0, 9.0, 16.0]).div(30).log())


def test_half_logits_are_upcast_before_the_temperature() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprobs = sample(logits, torch.rand(4, generator=torch.Generator().manual_seed(0)), temperature=0.7)
    exact = torch.log_softmax(logits.double() / 0.7, dim=-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    assert_close(logprobs.double(), exact, rtol=1.3e-6, atol=1e-5)  # the defaults of float32


# ---------------------------------------------------------------------------------------------------- independence
def test_a_row_depends_on_no_neighbour_no_order_and_no_number_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = lively(), some_prompts(24)
    selections = []
    select = KVCache.select
    monkeypatch.setattr(KVCache, "select", lambda cache, rows: selections.append(len(rows)) or select(cache, rows))

    def run(rows: list[int], slots: int | None = None) -> Samples:
        return generate(
            model,
            [prompts[row] for row in rows],
            max_new_tokens=12,
            eos_id=EOS,
            temperature=0.7,
            seed=5,
            keys=[(2, row) for row in rows],
            slots=slots,
        )

    together = run(list(range(24)))
    assert len(selections) >= 3, "the case must drop finished rows on its way"
    shuffled = random.Random(1).sample(range(24), 24)
    for rows, slots in [(shuffled, None), (list(range(24)), 1), (shuffled, 7), (list(range(24)), 100), ([5], None)]:
        other = run(rows, slots)
        expected = [responses(together)[row] for row in rows]
        assert responses(other) == expected
        assert other.finished.tolist() == together.finished[rows].tolist()
        for place, row in enumerate(rows):
            width = int(other.lengths[place]) - 1
            assert_close(other.logprobs[place, :width], together.logprobs[row, :width])
    monkeypatch.setattr(decoding, "COMPACT_BELOW", {"cpu": -1.0})
    selections.clear()
    assert responses(run(list(range(24)))) == responses(together) and not selections


@pytest.mark.parametrize("eos_id", [EOS, None])
def test_rows_of_very_unequal_lengths_are_the_same_in_any_number_of_slots(eos_id: int | None) -> None:
    """In float64, where nothing else could hide a key of the row that had the slot before."""
    model = lively(GPTConfig(vocab_size=7, n_positions=64, n_layer=2, n_head=2, n_embd=16), scale=0.3).double()
    prompts = [[1 + row % 5] * length for row, length in enumerate([1, 30, 2, 17, 1, 9, 30, 3, 1, 24, 5])]
    settings = {"max_new_tokens": 30, "eos_id": eos_id, "temperature": 1.3, "seed": 2}
    whole = generate(model, prompts, **settings)
    counts = whole.mask.sum(dim=1)
    assert eos_id is None or (counts.min() <= 2 and counts.max() == 30), "a case of very unequal responses"
    for slots in (1, 2, 3, 10):
        parts = generate(model, prompts, slots=slots, **settings)
        assert torch.equal(parts.tokens, whole.tokens) and torch.equal(parts.finished, whole.finished)
        assert_close(parts.logprobs, whole.logprobs, rtol=1e-12, atol=1e-12)
    assert_close(whole.logprobs, model.logprobs(whole.tokens, whole.mask, temperature=1.3).detach())


def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the tokens of every forward from here on."""
    sizes, hidden = [], GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, tokens, cache: sizes.append(tokens.shape) or hidden(self, tokens, cache)
    )
    return sizes


def test_slots_bound_the_rows_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = calls(monkeypatch)
    generate(lively(), some_prompts(10), max_new_tokens=3, eos_id=None, slots=4)
    assert [rows for rows, _ in sizes] == [4] * 3 + [4] * 3 + [2] + [2] * 2  # the last slots are given up
    prefill = [width for _, width in sizes if width > 1]
    assert prefill == sorted(prefill, reverse=True) and prefill[0] > prefill[-1]  # like lengths together


def test_a_waiting_prompt_takes_the_slot_of_a_row_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted([1, 2, 3, 4, 5, EOS, 1, 2, EOS, 3, 4, 5])
    sizes = calls(monkeypatch)
    samples = generate(model, [[1], [0] * 7, [2], [0] * 8], max_new_tokens=5, eos_id=EOS, slots=2)
    assert responses(samples) == [[1, 2, 3, 4, 5], [1, 2, EOS], [1, 2, 3, 4, 5], [2, EOS]]
    # Longest first: that of 8 ends after a step and that of 7 after two, and each leaves its slot to a prompt of 1.
    assert [tuple(size) for size in sizes] == [(2, 8), (2, 1), (1, 1), (2, 1), (1, 1), *[(2, 1)] * 3, (1, 1)]


@pytest.mark.parametrize("positions", [1, 7, 12])
def test_prompts_are_read_in_parts(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, settings = some_prompts(24), {"max_new_tokens": 6, "eos_id": EOS}
    whole = generate(lively(), prompts, **settings)
    monkeypatch.setattr(decoding, "PREFILL_POSITIONS", {"cpu": positions})
    sizes = calls(monkeypatch)
    parts = generate(lively(), prompts, **settings)
    assert torch.equal(parts.tokens, whole.tokens)
    assert_close(parts.logprobs, whole.logprobs)
    assert all(rows == 1 or rows * width <= positions for rows, width in sizes if width > 1)


def test_streams_are_keyed() -> None:
    model, prompts = lively(), [[1, 2]] * 4

    def run(seed: int, keys: list[tuple[int, ...]] | None, limit: int = 16) -> list[list[int]]:
        return responses(generate(model, prompts, max_new_tokens=limit, eos_id=None, seed=seed, keys=keys))

    rows = run(0, None)
    assert len({tuple(row) for row in rows}) == 4  # equal prompts, own streams
    assert run(0, [(0,), (1,), (2,), (3,)]) == rows == run(0, None)
    assert run(1, None) != rows
    keyed = run(0, [(1,), (1, 0), (0, 1), (1,)])
    assert keyed[0] == keyed[3] == rows[1] and len({tuple(row) for row in keyed}) == 3
    assert run(0, None, limit=5) == [row[:5] for row in rows]  # a shorter limit cuts the same response
    with pytest.raises(ValueError, match="3 keys for 4 prompts"):
        run(0, [(0,)] * 3)


def test_the_stream_of_a_row_is_philox_of_its_key() -> None:
    model = lively()
    samples = generate(model, [[1, 2]], max_new_tokens=6, eos_id=None, seed=3, keys=[(4, 5)], temperature=0.7)
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence(3, spawn_key=(4, 5))))
    ids = [1, 2]
    for u in stream.random(6, dtype=np.float32):
        p = torch.softmax(model(torch.tensor([ids]))[0, -1].double() / 0.7, dim=-1).tolist()
        ids.append(next(token for token in range(7) if sum(p[: token + 1]) > u))
    assert samples.tokens[0].tolist() == ids


@pytest.mark.parametrize("training", [True, False])
def test_nothing_global_changes(training: bool) -> None:
    model = lively().train(training)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    prompts = [[1, 2], [3]]
    samples = generate(model, prompts, max_new_tokens=5, eos_id=EOS)
    assert torch.equal(torch_state, torch.get_rng_state()) and python_state == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state(), strict=True))
    assert all(module.training == training for module in model.modules()) and torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert prompts == [[1, 2], [3]]
    # Ordinary tensors, fit for a training step: inference tensors would refuse to be saved for backward.
    assert not samples.logprobs.requires_grad
    weight = torch.ones_like(samples.logprobs, requires_grad=True)
    (weight * samples.logprobs).sum().backward()


def test_slots_that_are_given_up_leave_the_buffer_where_it_is() -> None:
    cache = KVCache((1, 2, 5, 1, 3, 2), dtype=torch.float32)
    cache.buffer.copy_(torch.arange(5.0)[:, None, None, None])
    cache.lengths.copy_(torch.tensor([1, 2, 1, 3, 2]))
    memory = cache.buffer.data_ptr()
    cache.select(torch.tensor([0, 4, 2]))
    assert cache.buffer.data_ptr() == memory
    assert cache.buffer[0, 0, :, 0, 0, 0].tolist() == [0, 4, 2]
    assert cache.lengths.tolist() == [1, 2, 1] and cache.width == 2


# -------------------------------------------------------------------------------------------------- a captured step
class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: keeps the operations of a step, and runs them again on the same memory.

    Recording leaves every tensor as it was. Python does not run again, and results go where they went the first time.
    """

    HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select")

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.kept: dict[int, tuple] = {}
        with self:
            step()
        for storage, copy in self.kept.values():
            storage.copy_(copy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.split("::")[1] not in self.HOST, f"{func}: the host waits for the device"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                storage = value.untyped_storage()
                self.kept.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def __call__(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("slots", [None, 5])
@pytest.mark.parametrize("eos_id", [EOS, None])
def test_a_replayed_step_samples_the_same(eos_id: int | None, slots: int | None, monkeypatch: Any) -> None:
    """Looked at every few steps, columns in blocks, a captured step: what a GPU does, all but the graph itself."""
    model, prompts = lively().double(), some_prompts(24)
    settings = {"max_new_tokens": 16, "eos_id": eos_id, "temperature": 0.7, "slots": slots}
    whole = generate(model, prompts, **settings)
    recordings, steps = [], []
    monkeypatch.setattr(decoding, "capture", lambda step: recordings.append(Recording(step)) or recordings[-1])
    monkeypatch.setattr(decoding, "REPLAYED", ("cpu",))
    monkeypatch.setattr(decoding, "CHECK_EVERY", {"cpu": 4})
    monkeypatch.setattr(kv_cache, "BLOCK", {"cpu": 8})
    _step = Decoder._step
    monkeypatch.setattr(Decoder, "_step", lambda self: steps.append(0) or _step(self))
    replayed = generate(model, prompts, **settings)
    assert recordings and len(steps) < 30, "most steps are replayed, and run no Python"
    assert torch.equal(replayed.tokens, whole.tokens)
    assert_close(replayed.logprobs, whole.logprobs, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the captured step itself is not tested")
def test_on_a_gpu_the_captured_step_samples_what_a_cpu_does() -> None:
    model, prompts = lively().double(), some_prompts(24)
    settings = {"max_new_tokens": 16, "eos_id": EOS, "temperature": 0.7, "slots": 5}
    whole = generate(model, prompts, **settings)
    captured = generate(model.cuda(), prompts, **settings)
    assert torch.equal(captured.tokens.cpu(), whole.tokens)
    assert_close(captured.logprobs.cpu(), whole.logprobs)


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [1, 7]]}, "prompt 1 has ids outside the vocabulary of 7"),
        ({"prompts": [[-1]]}, "prompt 0 has ids outside"),
        ({"prompts": [[1] * 20]}, "prompt 0 has 20 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"slots": 0}, "slots 0"),
        ({"eos_id": 7}, "eos_id 7 is outside the vocabulary of 7"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_words(change: dict, message: str) -> None:
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 6, "eos_id": EOS, **change}
    with pytest.raises(ValueError, match=message):
        generate(lively(), **arguments)


def test_a_model_of_nan_is_refused() -> None:
    model = lively()
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, [[1, 2]], max_new_tokens=3, eos_id=EOS)

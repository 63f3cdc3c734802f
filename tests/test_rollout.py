"""The rollout: which score a response gets, which log-probabilities are kept, and work in micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minirlhf import rollout as rollout_module
from minirlhf.batch import Example, over_micro_batches, pad
from minirlhf.generate import generate
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import Rollout, collect

EOS = 2


def models() -> tuple[GPT, GPT, ValueModel]:
    policy = GPT(GPTConfig(vocab_size=3, n_positions=8, n_layer=1, n_head=1, n_embd=8, eos_token_id=EOS), seed=0)
    reference = GPT(policy.config, seed=1)
    with torch.no_grad():
        for parameter in (*policy.parameters(), *reference.parameters()):
            parameter.mul_(3)  # at the initial size all distributions are near uniform
    value_model = ValueModel.from_reward_model(RewardModel.from_gpt(policy, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        value_model.value.weight.add_(0.5)
    return policy, reference, value_model


def roll(*, missing_eos_score: float | None = -1.0, rescore: bool = False, max_tokens: int = 20) -> Rollout:
    return collect(
        *models(),
        lambda batch: batch.lengths.float(),
        [[0, 1], [1], [0, 0, 1]] * 13,
        keys=[(i,) for i in range(39)],
        seed=0,
        eos_id=EOS,
        max_new_tokens=3,
        temperature=0.7,
        missing_eos_score=missing_eos_score,
        rescore=rescore,
        max_tokens=max_tokens,
    )


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_unfinished_responses_get_the_fixed_score_and_finished_ones_their_own(max_tokens: int) -> None:
    rollout = roll(max_tokens=max_tokens)
    ends_with_eos = torch.tensor([ids[-1] == EOS for ids in rollout.response_ids()])
    assert 0 < ends_with_eos.sum() < 39  # both kinds are there
    assert torch.equal(rollout.finished, ends_with_eos)
    assert torch.equal(rollout.scores, torch.where(ends_with_eos, rollout.lengths.float(), -1.0))
    policy, reference, value_model = models()
    with torch.no_grad():
        for model, recorded in ((policy, rollout.old_logprobs), (reference, rollout.ref_logprobs)):
            torch.testing.assert_close(recorded, model.logprobs(rollout.tokens, rollout.mask, temperature=0.7))
        torch.testing.assert_close(rollout.values, value_model(rollout.tokens, rollout.mask))


def test_the_fixed_score_may_be_0() -> None:
    rollout = roll(missing_eos_score=0.0)
    assert not rollout.scores[~rollout.finished].any() and rollout.scores[rollout.finished].all()


def test_without_a_fixed_score_every_response_keeps_its_own() -> None:
    rollout = roll(missing_eos_score=None)
    assert torch.equal(rollout.scores, rollout.lengths.float())


def test_a_rollout_carries_no_gradient() -> None:
    rollout = roll(rescore=True)
    assert not any(value.requires_grad for value in vars(rollout).values())


def test_rescoring_replaces_what_sampling_recorded_and_measures_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler whose record is off, as a cached forward in bfloat16 would be: by 1/4 a token in the even rows."""

    def off(*args, **kwargs):
        samples = generate(*args, **kwargs)
        even = torch.arange(len(samples)) % 2 == 0
        return replace(samples, logprobs=samples.logprobs - 0.25 * (samples.mask & even[:, None]))

    exact = roll()
    monkeypatch.setattr(rollout_module, "generate", off)
    recorded, rescored = roll(rescore=False), roll(rescore=True)
    even = torch.arange(39) % 2 == 0
    torch.testing.assert_close(exact.old_logprobs - recorded.old_logprobs, 0.25 * (exact.mask & even[:, None]))
    assert not recorded.sampling_gap.any() and not exact.sampling_gap.any()
    torch.testing.assert_close(rescored.old_logprobs, exact.old_logprobs)
    torch.testing.assert_close(rescored.sampling_gap, 0.25 * even.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 7, 12, 1000])
def test_micro_batches_put_every_row_back_in_its_place(max_tokens: int) -> None:
    batch = pad([Example([i], list(range(10, 10 + length))) for i, length in enumerate((2, 5, 1, 4, 3))])
    first = over_micro_batches(lambda part: part.tokens[:, 0].double(), batch, max_tokens)
    assert first.tolist() == [0, 1, 2, 3, 4] and first.dtype == torch.float64
    per_token = over_micro_batches(lambda part: part.tokens[:, 1:].float(), batch, max_tokens)
    assert torch.equal(per_token, batch.tokens[:, 1:].float())  # 0 beyond a row

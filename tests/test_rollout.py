"""The rollout: which score a response gets, and which log-probabilities are kept."""

from __future__ import annotations

import torch

from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel, ValueModel
from minirlhf.rollout import collect

EOS = 2


def test_unfinished_responses_get_the_fixed_score_and_finished_ones_their_own() -> None:
    policy = GPT(GPTConfig(vocab_size=3, n_positions=8, n_layer=1, n_head=1, n_embd=8, eos_token_id=EOS), seed=0)
    reference = GPT(policy.config, seed=1)
    value_model = ValueModel.from_reward_model(RewardModel.from_gpt(policy, generator=torch.Generator().manual_seed(0)))
    rollout = collect(
        policy,
        reference,
        value_model,
        lambda batch: batch.lengths.float(),
        [[0, 1]] * 40,
        keys=[(i,) for i in range(40)],
        seed=0,
        eos_id=EOS,
        max_new_tokens=3,
        temperature=0.7,
        missing_eos_score=-1.0,
        rescore=False,
        max_tokens=20,
    )
    ends_with_eos = torch.tensor([ids[-1] == EOS for ids in rollout.response_ids()])
    assert 0 < ends_with_eos.sum() < 40  # both kinds are there
    assert torch.equal(rollout.scores, torch.where(ends_with_eos, rollout.lengths.float(), -1.0))
    for model, recorded in ((policy, rollout.old_logprobs), (reference, rollout.ref_logprobs)):
        with torch.no_grad():
            expected = model.logprobs(rollout.tokens, rollout.mask, temperature=0.7)
        torch.testing.assert_close(recorded, expected)

"""Responses that share their prompt: every number and gradient is that of the responses in rows of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minirlhf.batch import Batch, Example, pad
from minirlhf.comparisons import Comparison, PairBatch, over_comparisons, pad_comparisons, pair_numbers, seq_logprobs
from minirlhf.model import GPT, GPTConfig
from minirlhf.reward import RewardModel, response_scores

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=11, n_positions=10, n_layer=2, n_head=2, n_embd=8)
ids = st.lists(st.integers(0, 10), min_size=1, max_size=5)
comparisons = st.lists(
    st.tuples(ids, st.lists(ids, min_size=1, max_size=4)).map(
        lambda c: Comparison([Example(c[0], r) for r in c[1]], [])
    ),
    min_size=1,
    max_size=4,
)


def new_gpt() -> GPT:
    """With weights so large that attention and positions matter."""
    gpt = GPT(CONFIG).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return gpt


def apart(group: list[Comparison]) -> Batch:
    return pad([e for c in group for e in c.examples])


def gradients(model: torch.nn.Module, values: Tensor) -> list[Tensor]:
    """Of a sum in which every response has a weight of its own."""
    weights = torch.arange(1, len(values) + 1, dtype=values.dtype)
    return list(torch.autograd.grad((weights * values).sum(), list(model.parameters()), materialize_grads=True))


@given(comparisons)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_logprobs_and_their_gradients_are_those_of_rows_apart(group: list[Comparison]) -> None:
    gpt, rows = new_gpt(), apart(group)
    shared = seq_logprobs(gpt, pad_comparisons(group))
    expected = gpt.logprobs(rows.tokens, rows.mask).sum(dim=1)
    torch.testing.assert_close(shared, expected, atol=1e-12, rtol=1e-12)
    for got, want in zip(gradients(gpt, shared), gradients(gpt, expected), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@given(comparisons)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_scores_and_their_gradients_are_those_of_rows_apart(group: list[Comparison]) -> None:
    model, rows = RewardModel.from_gpt(new_gpt(), generator=torch.Generator().manual_seed(0)).double(), apart(group)
    shared = response_scores(model, pad_comparisons(group))
    expected = model(rows.tokens, rows.lengths)
    torch.testing.assert_close(shared, expected, atol=1e-12, rtol=1e-12)
    for got, want in zip(gradients(model, shared), gradients(model, expected), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@given(comparisons)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_the_places_name_the_tokens(group: list[Comparison]) -> None:
    batch, flat = pad_comparisons(group), pad_comparisons(group).tokens.flatten()
    examples = [e for c in group for e in c.examples]
    for number, example in enumerate(examples):
        mine = batch.owners == number
        assert flat[batch.targets[mine]].tolist() == example.response_ids
        assert flat[batch.sources[mine]].tolist() == [*example.prompt_ids[-1:], *example.response_ids[:-1]]
        assert batch.ends[number] == batch.targets[mine][-1]
        start = len(example.prompt_ids)
        positions = batch.positions.flatten()[batch.targets[mine]].tolist()
        assert positions == list(range(start, start + len(example.response_ids)))
    assert batch.tokens.shape[1] == max(c.length for c in group)


def test_a_query_reads_the_prompt_and_its_own_response_up_to_itself() -> None:
    batch = pad_comparisons([Comparison([Example([1, 2], [3, 4]), Example([1, 2], [5])], [(0, 1)])])
    wide = pad_comparisons([Comparison([Example([1], [2])], []), Comparison([Example([1] * 4, [2])], [])])
    assert batch.visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the second response does not read the first
    ]
    assert wide.visible.any(dim=-1).all()  # padding reads something, or softmax would be nan
    assert not wide.visible[0, 0, :2, 2:].any()  # and nothing reads padding


def test_a_row_may_be_longer_than_the_context_as_long_as_each_response_fits() -> None:
    group = [Comparison([Example([1] * 5, [2] * 5), Example([1] * 5, [3] * 5)], [(0, 1)])]
    assert group[0].length == 15 > CONFIG.n_positions
    assert seq_logprobs(new_gpt(), pad_comparisons(group)).isfinite().all()


def test_answers_to_different_prompts_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        Comparison([Example([1], [2]), Example([3], [4])], [(0, 1)])


@given(comparisons, st.integers(1, 60))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_numbers_of_all_comparisons_come_back_in_order(group: list[Comparison], budget: int) -> None:
    def sizes(batch: PairBatch) -> Tensor:  # a number that tells the responses apart
        return torch.zeros(len(batch.ends)).index_add(
            0, batch.owners, batch.tokens.flatten()[batch.targets].float() + 1
        )

    values = over_comparisons(sizes, group, budget, CPU)
    assert [v.tolist() for v in values] == [
        [sum(e.response_ids) + len(e.response_ids) for e in c.examples] for c in group
    ]


def test_pairs_are_numbered_through() -> None:
    first = Comparison([Example([1], [2]), Example([1], [3])], [(1, 0)])
    second = Comparison([Example([4], [5]), Example([4], [6]), Example([4], [7])], [(0, 2), (1, 2)])
    assert pair_numbers([first, second]).tolist() == [[1, 0], [2, 4], [3, 4]]
    assert pair_numbers([Comparison([Example([1], [2])], [])]).shape == (0, 2)

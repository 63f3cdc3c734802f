"""Batches, micro-batches, the one encoder, and records."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import data, tokenizer
from minirlhf.batch import Example, batch_indices, micro_batches, pad, steps_per_epoch
from minirlhf.comparisons import Comparison, differing_tokens, pad_comparisons, pair_micro_batches
from minirlhf.encode import (
    encode_comparison,
    encode_comparisons,
    encode_demonstration,
    encode_demonstrations,
    encode_example,
    encode_prompts,
    pairs_from_ranks,
    split_by_prompt,
)
from minirlhf.files import write_records

ENCODING = tokenizer.load("world")
BYTES = tokenizer.load("bytes")
EOS = ENCODING.eot_token

examples = st.builds(
    Example, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), min_size=1, max_size=6)
)


def test_mask_covers_the_response_and_its_eos_and_nothing_else() -> None:
    # Row 0: prompt 3, response 2 (the second is EOS). tokens[:, 3] and [:, 4] are scored at t = 2 and 3.
    batch = pad([Example([5, 6, 7], [8, EOS]), Example([5], [6, 7, 8, 9, EOS])])
    assert batch.mask.tolist() == [[False, False, True, True, False], [True, True, True, True, True]]
    assert batch.lengths.tolist() == [5, 6] and batch.prompt_lengths.tolist() == [3, 1]


@given(st.lists(examples, min_size=1, max_size=8))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_mask_counts_response_tokens_and_pad_loses_nothing(rows: list[Example]) -> None:
    batch = pad(rows)
    assert batch.mask.sum(1).tolist() == [len(e.response_ids) for e in rows]
    assert batch.response_ids() == [e.response_ids for e in rows]
    for row, example in zip(batch.tokens.tolist(), rows, strict=True):
        ids = example.prompt_ids + example.response_ids
        assert row[: len(ids)] == ids


def test_an_eos_inside_the_prompt_does_not_change_the_mask() -> None:
    assert pad([Example([EOS, 3, EOS], [4, EOS])]).mask.tolist() == [[False, False, True, True]]


def test_rows_trims_every_field_to_the_longest_row() -> None:
    batch = pad([Example([1], [2]), Example([1, 2], [3, 4, 5]), Example([1, 2], [3])])
    part = batch.rows(torch.tensor([2, 0]))
    assert part.tokens.tolist() == [[1, 2, 3], [1, 2, 0]]
    assert part.mask.tolist() == [[False, True], [True, False]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 120))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_micro_batches_hold_every_item_once_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = micro_batches(torch.tensor(lengths), budget)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part.tolist()) <= budget


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.integers(1, 500))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_micro_batches_compute_the_fewest_positions(lengths: list[int], budget: int) -> None:
    """Beside every other way to cut the sorted rows; a pass counts as 48 positions."""

    def cost(parts: list[list[int]]) -> float:
        fits = all(len(part) == 1 or len(part) * max(part) <= budget for part in parts)
        return sum(len(part) * max(part) + 48 for part in parts) if fits else math.inf

    ordered = sorted(lengths, reverse=True)
    every = [[0, *cuts, len(ordered)] for n in range(9) for cuts in itertools.combinations(range(1, len(ordered)), n)]
    best = min(cost([ordered[a:b] for a, b in itertools.pairwise(cuts)]) for cuts in every)
    assert cost([[lengths[i] for i in part] for part in micro_batches(torch.tensor(lengths), budget)]) == best


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (10, 5), (7, 7), (5, 8)])
def test_every_item_is_visited_once_an_epoch_in_an_order_of_its_own(count: int, batch_size: int) -> None:
    steps = steps_per_epoch(count, batch_size)
    orders = []
    for epoch in range(3):
        visited = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            visited += batch_indices(count, batch_size, seed=1, step=step)
        assert sorted(visited) == list(range(count))
        orders.append(visited)
    assert orders[0] != orders[1]
    assert batch_indices(count, batch_size, seed=2, step=0) != orders[0][:batch_size]


def test_prompt_and_response_are_encoded_apart_and_joined_with_eos() -> None:
    example = encode_example(ENCODING, "\n\nHuman: a\n\nAssistant:", " The lion.", max_length=96)
    assert example.prompt_ids == ENCODING.encode_ordinary("\n\nHuman: a\n\nAssistant:")
    assert example.response_ids == [*ENCODING.encode_ordinary(" The lion."), EOS]
    # A text that would merge across the boundary: "li" + "on" stay two pieces.
    apart = encode_example(ENCODING, " li", "on", max_length=96)
    assert apart.prompt_ids + apart.response_ids != [*ENCODING.encode_ordinary(" lion"), EOS]


def test_user_text_never_yields_eos() -> None:
    example = encode_example(ENCODING, "say <|endoftext|>", "<|endoftext|>", max_length=96)
    assert (example.prompt_ids + example.response_ids).count(EOS) == 1
    assert example.response_ids[-1] == EOS


def test_an_empty_prompt_is_the_single_token_eos() -> None:
    assert encode_example(ENCODING, "", " hi", max_length=9).prompt_ids == [EOS]


def test_truncation_cuts_the_prompt_from_the_left_and_keeps_response_and_eos() -> None:
    full = encode_example(ENCODING, "one two three four five", " six", max_length=96)
    room = len(full.response_ids) + 2
    cut = encode_example(ENCODING, "one two three four five", " six", max_length=room)
    assert cut == Example(full.prompt_ids[-2:], full.response_ids)
    assert encode_example(ENCODING, "one", " six", max_length=len(full.response_ids)) is None


def test_rows_of_a_comparison_lose_the_same_part_of_their_prompt() -> None:
    # Five prompt tokens; with EOS 2 and 5 response tokens, so that of 8 tokens 3 are left for the prompt of both.
    record = {"prompt": "abcde", "chosen": "f", "rejected": "ghij"}
    comparison = encode_comparison(BYTES, record, max_length=8)
    assert [bytes(e.prompt_ids) for e in comparison.examples] == [b"cde", b"cde"]
    assert [e.response_ids[-1] for e in comparison.examples] == [BYTES.eot_token] * 2
    assert [e.cut for e in comparison.examples] == [2, 2]


def test_what_does_not_fit_is_counted_and_said(capsys: pytest.CaptureFixture) -> None:
    records = [
        {"prompt": "abcdef", "response": "gh"},
        {"prompt": "a", "response": "b" * 9},
        {"prompt": "a", "response": "b"},
    ]
    examples = encode_demonstrations(BYTES, records, max_length=8)
    assert [(bytes(e.prompt_ids), e.cut) for e in examples] == [(b"bcdef", 1), (b"a", 0)]
    pairs = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "x"} for r in records]
    assert len(encode_comparisons(BYTES, pairs, max_length=8)) == 2
    assert encode_prompts(BYTES, ["abcdef", "", "ab"], max_length=3) == [[*b"def"], [BYTES.eot_token], [*b"ab"]]
    assert capsys.readouterr().out.splitlines() == [
        "demonstrations: 1 of 3 left out, nothing to learn from in 8 tokens",
        "demonstrations: 1 of 3 lost the start of their prompt to fit 8 tokens",
        "comparisons: 1 of 3 left out, nothing to learn from in 8 tokens",
        "comparisons: 1 of 3 lost the start of their prompt to fit 8 tokens",
        "prompts: 1 of 3 lost the start of their prompt to fit 3 tokens",
    ]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), st.integers(2, 12))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_every_token_of_a_long_text_is_predicted_once_after_the_one_before_it(text: str, max_length: int) -> None:
    rows = encode_demonstration(BYTES, {"prompt": "", "response": text}, max_length=max_length)
    ids = [BYTES.eot_token, *text.encode(), BYTES.eot_token]
    batch = pad(rows)
    assert batch.tokens.shape[1] <= max_length
    predicted = [
        (int(a), int(b))
        for t, m in zip(batch.tokens, batch.mask, strict=True)
        for a, b in zip(t[:-1][m], t[1:][m], strict=True)
    ]
    assert predicted == list(zip(ids, ids[1:], strict=False))


def test_sampled_ids_are_kept_as_they_were_sampled() -> None:
    # A response that was cut off has no EOS, and its pieces need not be the tokenizer's.
    pieces = [ENCODING.encode_ordinary(c)[0] for c in "lion"]
    example = encode_example(ENCODING, "x", pieces, max_length=96)
    assert example.response_ids == pieces


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ([1, 2, 3, 0], [1, 5, 3, 0], 1),
        ([1, 2, 3, 0], [1, 5, 6, 3, 0], 2),  # the longer middle counts
        ([1, 2, 0], [1, 2, 1, 2, 0], 2),  # start and end must not use the same tokens twice
        ([4, 0], [4, 0], 0),
        ([1, 2], [3, 4, 5], 3),
    ],
)
def test_differing_tokens_lie_between_common_start_and_common_end(first, second, count) -> None:
    assert differing_tokens(first, second) == differing_tokens(second, first) == count


def test_ranks_to_pairs_leaves_ties_out() -> None:
    assert pairs_from_ranks([1, 0, 1, 2]) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]


def test_a_pair_record_is_a_ranking_of_two() -> None:
    pair = encode_comparison(ENCODING, {"prompt": "q", "chosen": " a", "rejected": " b"}, max_length=96)
    ranking = encode_comparison(ENCODING, {"prompt": "q", "responses": [" b", " a"], "ranks": [1, 0]}, max_length=96)
    assert pair.pairs == [(0, 1)] and ranking.pairs == [(1, 0)]
    assert pair.examples[0] == ranking.examples[1]


def test_equal_sides_and_responses_that_do_not_fit_make_no_pair() -> None:
    same = {"prompt": "q", "chosen": " a", "rejected": " a"}
    assert encode_comparison(ENCODING, same, max_length=96) is None
    record = {"prompt": "q", "responses": [" a", " lion" * 50, " b"], "ranks": [2, 0, 1]}
    comparison = encode_comparison(ENCODING, record, max_length=20)
    assert len(comparison.examples) == 2 and comparison.pairs == [(1, 0)]


def test_comparisons_become_one_batch_with_pairs_as_row_numbers() -> None:
    first = Comparison([Example([1], [2]), Example([1], [3])], [(1, 0)])
    second = Comparison([Example([4], [5]), Example([4], [6]), Example([4], [7])], [(0, 2), (1, 2)])
    padded = pad_comparisons([first, second])
    assert padded.tokens.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert padded.chosen.tolist() == [1, 2, 3] and padded.rejected.tolist() == [0, 4, 4]


@given(st.lists(st.lists(examples, min_size=2, max_size=4), min_size=1, max_size=6), st.integers(1, 100))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_no_micro_batch_divides_a_comparison(groups: list[list[Example]], budget: int) -> None:
    prompts = [group[0].prompt_ids for group in groups]
    groups = [[Example(p, e.response_ids) for e in group] for p, group in zip(prompts, groups, strict=True)]
    comparisons = [Comparison(group, [(0, 1)]) for group in groups]
    seen = []
    for part, padded in pair_micro_batches(comparisons, budget):
        assert len(padded.ends) == sum(len(c.examples) for c in part)
        for comparison, chosen in zip(part, padded.chosen.tolist(), strict=True):
            ids = padded.tokens.flatten()[padded.targets[padded.owners == chosen]]
            assert ids.tolist() == comparison.examples[0].response_ids
        seen += [id(c) for c in part]
    assert sorted(seen) == sorted(id(c) for c in comparisons)


def test_split_keeps_a_prompt_on_one_side() -> None:
    records = [{"prompt": f"p{i % 20}", "n": i} for i in range(100)]
    train, held_out = split_by_prompt(records, share=0.25, seed=0)
    assert len(train) + len(held_out) == 100
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert len({r["prompt"] for r in held_out}) == 5
    assert split_by_prompt(records, share=0.25, seed=1)[1] != held_out


def test_records_survive_a_round_trip(tmp_path) -> None:
    records = [{"prompt": "é\n\u2028 ", "responses": [" a", " b"], "ranks": [0, 1], "scores": [0.5, None]}]
    write_records(tmp_path / "r.jsonl", records)
    assert data.load(tmp_path / "r.jsonl", "pairs") == records


def test_texts_without_a_prompt_are_split_one_by_one() -> None:
    records = [{"prompt": "", "response": f"text {i}"} for i in range(20)]
    train, held_out = split_by_prompt(records, share=0.25, seed=0)
    assert len(held_out) == 5 and sorted(r["response"] for r in train + held_out) == sorted(
        r["response"] for r in records
    )
    pairs = [{"prompt": "", "chosen": f"a{i}", "rejected": "b"} for i in range(20)]
    assert len(split_by_prompt(pairs, share=0.25, seed=0)[1]) == 5


def test_of_one_text_the_end_is_held_out() -> None:
    text = "".join(f"line {i}\n" for i in range(20))
    train, held_out = split_by_prompt([{"prompt": "", "response": text}], share=0.1, seed=0)
    assert train[0]["response"] + held_out[0]["response"] == text and held_out[0]["response"] == "line 19\n"

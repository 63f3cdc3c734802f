"""From labels to training records: what is joined, what ties become, and that training sees exactly that."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from tiny import ENCODING

import train_reward
from minirlhf import data
from minirlhf.bradley_terry import bradley_terry_loss
from minirlhf.encode import Record, encode_comparison, encode_comparisons, pairs_from_ranks, split_by_prompt
from minirlhf.feedback import pairs
from minirlhf.feedback.labels import Label, ranks_of
from minirlhf.feedback.pairs import join_pairs, training_records
from minirlhf.runtime import UserError


def label(prompt: str, responses: str, ranks: tuple[int, ...], labeller: str = "anna", **more) -> Label:
    verdict = "ranked" if len(set(ranks)) > 1 else "tie"
    sources = tuple(f"from {text}" for text in responses)
    ids = tuple([ord(text)] for text in responses)
    texts = tuple(f" {text}" for text in responses)
    return Label(
        prompt, texts, ranks, more.pop("verdict", verdict), labeller, sources=sources, response_ids=ids, **more
    )


def trained_pairs(records: list[Record]) -> Counter:
    """(prompt, better, worse) of all pairs that the encoder makes of the records; it is what training learns from."""
    found: Counter = Counter()
    for record in records:
        comparison = encode_comparison(ENCODING, record, max_length=90)
        texts = [chr(example.response_ids[0]) for example in comparison.examples]
        found.update((record["prompt"], texts[i], texts[j]) for i, j in comparison.pairs)
    return found


def test_repeats_and_skips_do_not_count_and_labellers_count_each() -> None:
    labels = [
        label("p", "ab", (0, 1)),
        label("p", "ab", (1, 0), repeat=True),
        label("p", "ab", (1, 0), "ben"),
        label("q", "ab", (0, 0), verdict="skip"),
        label("q", "ab", (1, 0), "ben"),
        label("r", "ab", (0, 0), verdict="bad"),
    ]
    records = training_records(labels, form="rankings", ties="drop")
    assert trained_pairs(records) == {("p", "a", "b"): 1, ("p", "b", "a"): 1, ("q", "b", "a"): 1}
    assert records[0] == {
        "prompt": "p",
        "responses": [" a", " b"],
        "ranks": [0, 1],
        "labeller": "anna",
        "sources": ["from a", "from b"],
        "response_ids": [[97], [98]],
    }


def test_all_pairs_of_a_prompt_become_one_ranking() -> None:
    labels = [label("p", "ab", (1, 0)), label("p", "ca", (1, 0)), label("q", "ab", (0, 1)), label("p", "bc", (0, 1))]
    first, second = training_records(labels, form="rankings", ties="drop")
    assert first["responses"] == [" a", " b", " c"] and first["ranks"] == [1, 0, 2] and second["prompt"] == "q"
    assert first["sources"] == ["from a", "from b", "from c"] and first["response_ids"] == [[97], [98], [99]]
    assert trained_pairs([first]) == {("p", "b", "a"): 1, ("p", "b", "c"): 1, ("p", "a", "c"): 1}


@pytest.mark.parametrize(
    "labels, records",
    [
        ([("ab", (0, 1)), ("bc", (0, 1))], 2),  # a and c were never compared
        ([("ab", (0, 1)), ("bc", (0, 1)), ("ca", (0, 1))], 3),  # round in a circle
        ([("ab", (0, 0)), ("bc", (0, 0)), ("ac", (0, 1))], 3),  # ties that do not carry over
        ([("ab", (0, 0)), ("bc", (0, 1)), ("ac", (0, 1))], 1),
        ([("ab", (0, 0)), ("bc", (0, 0)), ("ac", (0, 0))], 1),
        ([("ab", (0, 1)), ("cd", (0, 1))], 2),
    ],
)
def test_pairs_join_only_into_exactly_what_was_said(labels: list, records: int) -> None:
    made = [label("p", texts, ranks) for texts, ranks in labels]
    joined = join_pairs(made)
    assert len(joined) == records
    said = {frozenset(zip(x.responses, x.ranks, strict=True)) for x in made}
    for record in joined:
        for (a, i), (b, j) in itertools.combinations(zip(record["responses"], record["ranks"], strict=True), 2):
            order = (i > j) - (i < j)
            assert frozenset([(a, max(order, 0)), (b, max(-order, 0))]) in said


def test_every_ranking_of_four_is_found_again_from_its_pairs() -> None:
    for ranks in itertools.product(range(4), repeat=4):
        if sorted(set(ranks)) != list(range(len(set(ranks)))):
            continue
        two = [
            label("p", "abcd"[i] + "abcd"[j], (int(ranks[i] > ranks[j]), int(ranks[j] > ranks[i])))
            for i, j in itertools.combinations(range(4), 2)
        ]
        (record,) = join_pairs(two)
        assert record["ranks"] == list(ranks)


def test_best_against_the_rest() -> None:
    labels = [label("p", "abcd", (2, 0, 1, 1)), label("q", "abc", (0, 0, 1)), label("r", "ab", (0, 0))]
    records = training_records(labels, form="best", ties="drop")
    assert trained_pairs(records) == {
        **{("p", "b", text): 1 for text in "acd"},
        **{("q", text, "c"): 1 for text in "ab"},
    }
    tied = training_records(labels, form="best", ties="half")
    assert trained_pairs(tied) == {
        **{("p", "b", text): 2 for text in "acd"},
        **{("q", text, "c"): 2 for text in "ab"},
        **{("q", *two): 1 for two in ("ab", "ba")},
        **{("r", *two): 1 for two in ("ab", "ba")},
    }


def test_ties_that_are_kept_reach_the_reward_models_own_setting() -> None:
    labels = [label("p", "ab", (0, 0)), label("q", "ab", (0, 1)), label("r", "ab", (0, 0), verdict="skip")]
    records = training_records(labels, form="rankings", ties="keep")
    assert [record["ranks"] for record in records] == [[0, 0], [0, 1]]
    (tie,) = encode_comparisons(ENCODING, records[:1], max_length=90, ties=True)
    assert tie.pairs == [(0, 1), (1, 0)] and tie.weights == [0.5, 0.5]


def test_half_weighted_ties_are_half_a_win_each_way_in_the_loss() -> None:
    """The mean loss over the records is the mean over labels with 1/2 (-log sigmoid(d) - log sigmoid(-d)) for a tie."""
    labels = [label("p", "ab", (0, 1)), label("q", "ab", (0, 0)), label("r", "abc", (0, 1, 1))]
    scores = {"a": 0.7, "b": -0.4, "c": 1.9}
    found = trained_pairs(training_records(labels, form="rankings", ties="half"))
    expanded = list(found.elements())
    loss = bradley_terry_loss(
        torch.tensor([scores[a] for _, a, _ in expanded]), torch.tensor([scores[b] for _, _, b in expanded])
    )

    def nll(better: str, worse: str) -> float:
        return math.log1p(math.exp(scores[worse] - scores[better]))

    def tie(one: str, two: str) -> float:
        return (nll(one, two) + nll(two, one)) / 2

    by_hand = [nll("a", "b"), tie("a", "b"), nll("a", "b"), nll("a", "c"), tie("b", "c")]
    assert loss.item() == pytest.approx(sum(by_hand) / 5)


def write(path: Path, labels: list[Label]) -> None:
    path.write_text("".join(json.dumps(x.record()) + "\n" for x in labels))


def test_the_command_splits_by_prompt(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    every = [label(f"p{i % 10}", texts, (0, 1)) for i in range(10) for texts in ("ab", "cd", "ae")]
    write(tmp_path / "l.jsonl", every)
    output = pairs.main(
        pairs.Config(labels=(tmp_path / "l.jsonl",), output=tmp_path / "out.jsonl", held_out_share=0.3, seed=2)
    )
    train, held_out = data.load(output, "pairs"), data.load(tmp_path / "held-out.jsonl", "pairs")
    prompts = [{record["prompt"] for record in part} for part in (train, held_out)]
    assert len(prompts[0]) == 7 and len(prompts[1]) == 3 and not prompts[0] & prompts[1]
    assert len(train) == 21 and len(held_out) == 9
    assert f"{output}: 21 records, 21 pairs, from 30 labels" in capsys.readouterr().out


@pytest.mark.parametrize("ties, form", [("drop", "rankings"), ("half", "rankings"), ("half", "best")])
def test_training_reads_what_is_written(ties: str, form: str, tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path, "sft")
    texts = (" Yes.", " No.", " The lion eats meat.")
    ranks = [(0, 1, 2), (1, 0, 0), (0, 0, 1), (2, 1, 0)]
    labels = [Label(p, texts, ranks[i % 4], "ranked", "anna") for i, p in enumerate(tiny.PROMPTS[:8])]
    labels += [Label(p, texts[:2], ranks_of("tie", (0, 1)), "tie", "anna", (0, 1)) for p in tiny.PROMPTS[8:10]]
    write(run / "l.jsonl", labels)
    output = pairs.main(pairs.Config(run=run, labels=(run / "l.jsonl",), ties=ties, form=form))
    config = tiny.reward_config(run)
    config.comparisons, config.epochs = str(output), 1.0
    with pytest.MonkeyPatch.context() as patch:
        calls = tiny.spy(patch, train_reward, "train_step")
        train_reward.main(config)
    seen = sum(len(c.pairs) for call in calls for c in call.arguments["batch"])
    records = data.load(output, "pairs")
    train, _ = split_by_prompt(records, share=config.validation_share, seed=config.seed)
    assert seen == sum(len(pairs_from_ranks(record["ranks"])) for record in train)


def test_nothing_to_learn_from_and_settings_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    write(path, [label("p", "ab", (0, 0))])
    with pytest.raises(UserError, match="1 labels, but none of them prefers"):
        pairs.main(pairs.Config(run=tmp_path, labels=(path,)))
    with pytest.raises(UserError, match="--held-out-share 1"):
        pairs.main(pairs.Config(run=tmp_path, labels=(path,), held_out_share=1.0))
    with pytest.raises(UserError, match="holds the labels"):
        pairs.main(pairs.Config(run=tmp_path, labels=(path,), output=path))
    assert path.exists()

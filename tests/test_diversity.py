"""Diversity and rude words: by hand, against slow definitions, and laws that any text must obey."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf import data
from minirlhf.evaluate.texts import RUDE_WORDS, distinct_n, ngrams, rude_words, self_overlap
from minirlhf.runtime import UserError
from minirlhf.world.judge import RUDENESS

texts = st.lists(
    st.lists(st.sampled_from(["the", "bear", "eats", "Honey."]), max_size=7).map(" ".join), min_size=2, max_size=4
)


# ----------------------------------------------------------------------------------------------------------- diversity
def test_distinct_n_by_hand() -> None:
    answers = [" The bear eats.", "the  bear\nsleeps."]
    assert ngrams(answers[1], 2) == [("the", "bear"), ("bear", "sleeps.")]
    assert distinct_n(answers, 1) == 4 / 6  # the, bear, eats., sleeps. of six words
    assert distinct_n(answers, 2) == 3 / 4
    assert distinct_n(answers, 4) == distinct_n([], 1) == 0.0
    assert distinct_n(["a b c", "d e"], 2) == 1.0
    assert distinct_n(["a b"] * 10, 2) == 0.1


def test_self_overlap_by_hand() -> None:
    # Of "a a b": one of two a's and no b in "a c", no pair and no triple: (1/3 + 0 + 0) / 3.
    # Of "a c": its a, no pair: (1/2 + 0) / 2.
    assert self_overlap(["a a b", "a c"]) == pytest.approx((1 / 9 + 1 / 4) / 2)
    assert self_overlap(["x y", "x y", "x y"]) == 1.0
    assert self_overlap(["x y", "z"]) == 0.0
    assert self_overlap(["", " "]) == 1.0 and self_overlap(["", "x"]) == 0.0
    with pytest.raises(ValueError, match="1 answers"):
        self_overlap(["x"])


def slow_self_overlap(answers: list[str]) -> float:
    """n-gram by n-gram: each occurrence beyond the most that one other answer has is not covered."""
    scores = []
    for i, answer in enumerate(answers):
        others = [text.lower().split() for j, text in enumerate(answers) if j != i]
        words, precisions = answer.lower().split(), []
        for n in range(1, min(4, len(words)) + 1):
            grams, covered = [words[s : s + n] for s in range(len(words) - n + 1)], 0
            for place, gram in enumerate(grams):
                most = max(sum(other[s : s + n] == gram for s in range(len(other) - n + 1)) for other in others)
                covered += grams[:place].count(gram) < most
            precisions.append(covered / len(grams))
        empty = not words and any(not other for other in others)
        scores.append(sum(precisions) / len(precisions) if precisions else float(empty))
    return sum(scores) / len(scores)


@given(texts)
def test_self_overlap_is_its_slow_definition(answers: list[str]) -> None:
    found = self_overlap(answers)
    assert found == pytest.approx(slow_self_overlap(answers), abs=1e-12) and 0 <= found <= 1
    assert self_overlap(answers[::-1]) == pytest.approx(found)
    assert self_overlap([text.upper() for text in answers]) == found


# ---------------------------------------------------------------------------------------------------------- rude words
def test_whole_words_phrases_and_endings(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("fool\nidiot*\nshut up\ngod's sake\nc++\n")
    words = rude_words(tmp_path / "words.txt")
    assert words.findall("You FOOL! Idiotic idiots, shut\n up, for god's sake.") == [
        "FOOL",
        "Idiotic",
        "idiots",
        "shut\n up",
        "god's sake",
    ]
    assert words.findall("foolish tomfool shutup shut the up gods sake") == []
    assert words.findall("use c++!") == ["c++"]  # letters alone do not make a word's end


def test_a_file_of_words(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# a comment\n\n  Twit \nnobody cares\n", encoding="utf-8")
    assert rude_words(file).findall("twit, comment, nobody   cares") == ["twit", "nobody   cares"]
    for content, message in (("# only\n\n", "words.txt: no words"), ("good\n *\n", "stands for every word")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            rude_words(file)
    with pytest.raises(UserError, match="no such file"):
        rude_words(tmp_path / "missing.txt")


def test_the_shipped_list_knows_the_worlds_rudeness() -> None:
    words = rude_words(RUDE_WORDS)
    assert all(words.findall(sentence) for sentence in RUDENESS)
    assert not words.findall(" The bear eats honey. I am sorry, but I cannot help with that. What a class assignment!")


@pytest.mark.skipif("MINIRLHF_REAL_DATA" not in os.environ, reason="MINIRLHF_REAL_DATA is unset")
def test_rude_words_stand_on_the_side_that_people_rejected() -> None:
    pairs = data.load(Path(os.environ["MINIRLHF_REAL_DATA"]) / "preference" / "polite-instructions.json", "pairs")
    words = rude_words(RUDE_WORDS)
    chosen, rejected = (np.mean([bool(words.findall(pair[side])) for pair in pairs]) for side in ("chosen", "rejected"))
    assert chosen < 0.005 and rejected > 0.03  # 2 and 32 of 885: what it finds is rude, and it finds little

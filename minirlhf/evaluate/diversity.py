"""How varied are the answers? A policy that says the same to everything may still please a judge.

A word is what stands between blanks, in small letters, its punctuation included. Both measures depend on how many
answers there are and how long they are: compare models on the same prompts with the same number of answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = (1, 2, 3, 4)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words of a text, in order."""
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of the n-grams of all texts that are distinct: |set of n-grams| / number of n-grams; 0 where there is none.

    Li et al. 2016 (arXiv 1510.03055), section 5.2.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def self_overlap(answers: Sequence[str]) -> float:
    """How much K answers to one prompt repeat each other, from 0, no word in common, to 1, all alike.

    p_n(a) = sum_g min(count of g in a, most often in one other answer) / number of n-grams of a
    self-overlap = mean over answers a of the mean of p_n(a) over n = 1 to 4, as far as a has n-grams

    The clipped precisions of BLEU (Papineni et al. 2002) with the other answers as references, as in Self-BLEU (Zhu et
    al. 2018, arXiv 1802.01886); their arithmetic mean and no penalty for brevity, since most answers here are short
    and a geometric mean would be 0. An answer without words overlaps wholly with another such answer, and else not.
    Raises ValueError for fewer than two answers.
    """
    if len(answers) < 2:
        raise ValueError(f"{len(answers)} answers; self-overlap compares at least two")
    counts = [[Counter(ngrams(text, n)) for n in ORDERS] for text in answers]
    return float(np.mean([_overlap(own, counts[:i] + counts[i + 1 :]) for i, own in enumerate(counts)]))


def _overlap(own: Sequence[Counter], others: Sequence[Sequence[Counter]]) -> float:
    """Mean clipped precision of one answer, given the n-gram counts of it and of the others, by order."""
    if not own[0]:
        return float(any(not other[0] for other in others))
    precisions = [
        sum(min(count, max(other[n][gram] for other in others)) for gram, count in grams.items()) / grams.total()
        for n, grams in enumerate(own)
        if grams
    ]
    return float(np.mean(precisions))

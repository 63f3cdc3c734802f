"""What can be counted in texts without a judge: how varied they are, and how many hold a rude word.

A policy that says the same to everything may still please a judge. A word is what stands between blanks, in small
letters, its punctuation included. Both measures of variety depend on how many answers there are and how long they are:
compare models on the same prompts with the same number of answers.

The list of rude words is crude: it knows neither irony nor politeness, and counts a quotation like an insult. Slurs
against groups are left out of the shipped list: most have other meanings, and those need context.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minirlhf.runtime import project_file, require

ORDERS = (1, 2, 3, 4)
RUDE_WORDS = project_file("rude-words.txt")


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


def rude_words(path: Path) -> re.Pattern[str]:
    """A pattern that finds the words of a list in a text, whole words in any case, as they stand there.

    path  a text file with a word or phrase a line; a `*` at the end of one stands for any ending. Blank lines and lines
          that begin with `#` do not count
    Raises UserError where there is no such file, no word, or an entry without letters.
    """
    require(path.is_file(), f"{path}: no such file; give a text file with a word or phrase a line")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    entries = [line for line in lines if line and not line.startswith("#")]
    require(bool(entries), f"{path}: no words; write one a line")
    patterns = []
    for entry in entries:
        words = [re.escape(word) for word in entry.removesuffix("*").split()]
        require(bool(words), f"{path}: the entry {entry!r} stands for every word; write letters before the *")
        patterns.append(r"\s+".join(words) + (r"\w*" if entry.endswith("*") else ""))
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE)

"""The trust that labels deserve: habits of position, agreement with oneself, agreement with others.

A comparison of K responses is looked at as its K(K-1)/2 pairs; on each a label says first, second or neither (a tie,
or both bad). Skips say nothing and are not counted.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from minirlhf.feedback.labels import Label

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def share(count: int, of: int) -> dict[str, Any]:
    """`count` out of `of` with the 95 % interval of the probability behind it: Wilson's, which stays within 0 and 1 and
    holds for few labels too. The share of none is nan, its interval 0 to 1.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),  z = 1.96

    Wilson 1927. Trap: p -+ z sqrt(p(1-p)/n) would give 20 of 20 the interval from 1 to 1.
    """
    if not of:
        return {"share": math.nan, "interval": [0.0, 1.0], "of": 0}
    p, scale = count / of, 1 + Z**2 / of
    middle, half = p + Z**2 / (2 * of), Z * math.sqrt(p * (1 - p) / of + Z**2 / (4 * of**2))
    interval = [max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)]
    return {"share": p, "interval": interval, "of": of}


def share_text(row: dict[str, Any]) -> str:
    """A share in words."""
    low, high = row["interval"]
    return f"{row['share']:.1%} ({low:.1%} to {high:.1%}) of {row['of']}"


def first_labels(labels: Sequence[Label]) -> list[Label]:
    """Each labeller's first label of each item, skips left out."""
    first = {(label.labeller, label.item): label for label in reversed(labels) if label.verdict != "skip"}
    counted = {id(label) for label in first.values()}
    return [label for label in labels if id(label) in counted]


def choices(label: Label) -> list[int]:
    """For each pair of responses, in the order of their texts: -1 the first is better, 1 the second, 0 neither."""
    ranked = sorted(zip(label.responses, label.ranks, strict=True))
    return [(a > b) - (a < b) for (_, a), (_, b) in itertools.combinations(ranked, 2)]


def position_bias(labels: Sequence[Label]) -> dict[int, dict[str, Any]]:
    """Share of comparisons in which the best of K was shown first, by K; 1/K without a habit.

    Counted are first labels with one best response.
    """
    counts: dict[int, Counter[bool]] = defaultdict(Counter)
    for label in first_labels(labels):
        if label.shown is not None and label.ranks.count(0) == 1:
            counts[len(label.ranks)][label.ranks[label.shown[0]] == 0] += 1
    return {k: share(count[True], count.total()) for k, count in sorted(counts.items())}


def self_agreement(labels: Sequence[Label]) -> dict[str, dict[str, Any]]:
    """Share of pairs on which a labeller's later labels of an item say what the first one said."""
    first = {(label.labeller, label.item): label for label in first_labels(labels)}
    same: dict[str, Counter[bool]] = defaultdict(Counter)
    for label in labels:
        original = first.get((label.labeller, label.item))
        if label.verdict != "skip" and original is not None and label is not original:
            same[label.labeller].update(a == b for a, b in zip(choices(original), choices(label), strict=True))
    return {name: share(count[True], count.total()) for name, count in sorted(same.items())}


def order_bias(labels: Sequence[Label]) -> dict[str, dict[str, Any]]:
    """Effect of the order of reading on the verdicts of each judge that was asked every pair in both orders.

    first           mean probability that the one read first is better; 1/2 without a liking for a place
    contradictions  share of pairs on which the two orders say different things
    """
    asked: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for label in labels:
        if label.orders is not None:
            asked[label.labeller].append(label.orders)
    biases = {}
    for name, orders in sorted(asked.items()):
        against = share(sum((one - 0.5) * (other - 0.5) > 0 for one, other in orders), len(orders))
        biases[name] = {"first": sum(map(sum, orders)) / (2 * len(orders)), "contradictions": against}
    return biases


def order_sentence(labeller: str, bias: dict[str, Any]) -> str:
    """An `order_bias` in words."""
    first = f"{labeller} gives the one it reads first a probability of {bias['first']:.3f} on average"
    return f"{first}; its two orders contradict each other in {share_text(bias['contradictions'])} pairs"


def cohens_kappa(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Agreement of two labellers beyond chance: 1 is perfect, 0 what two with these habits would have by chance.

    kappa = (p_o - p_e) / (1 - p_e),  p_o share of equal choices,  p_e = sum_c p_1(c) p_2(c)

    Cohen 1960. None for no choices, or where p_e is 1: then both always make the same choice.
    """
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True))
    one, two = Counter(first), Counter(second)
    expected = sum(one[c] * two[c] for c in one)  # times n^2
    return (observed * n - expected) / (n * n - expected) if n * n != expected else None


def between_labellers(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Agreement of every two labellers on the pairs that both judged, first labels alone."""
    by_labeller: dict[str, dict[str, Label]] = defaultdict(dict)
    for label in first_labels(labels):
        by_labeller[label.labeller][label.item] = label
    rows = []
    for both in itertools.combinations(sorted(by_labeller), 2):
        shared = sorted(by_labeller[both[0]].keys() & by_labeller[both[1]].keys())
        if shared:
            mine, theirs = ([c for item in shared for c in choices(by_labeller[who][item])] for who in both)
            same = share(sum(a == b for a, b in zip(mine, theirs, strict=True)), len(mine))
            rows.append({"labellers": list(both), **same, "kappa": cohens_kappa(mine, theirs)})
    return rows

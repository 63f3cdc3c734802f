"""Rated snippets: their openings, and a linear scorer fitted to the ratings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import project  # noqa: F401  first: it finds the package
import regex
import tiktoken
import torch

from minirlhf import tokenizer


class LinearScorer:
    """Ratings from words: ridge regression of the centred ratings on which words and pairs of words a text holds.

    w = X' (X X' + ridge I)^-1 (y - mean y),  X (texts, words and pairs seen at least twice) of 0 and 1
    """

    def __init__(self, texts: Sequence[str], ratings: Sequence[float], *, ridge: float = 20.0) -> None:
        counts = Counter(feature for text in texts for feature in self.features(text))
        self.index = {feature: i for i, feature in enumerate(f for f, count in counts.items() if count > 1)}
        x, y = self.matrix(texts), torch.tensor(ratings, dtype=torch.float32)
        kernel = x @ x.T + ridge * torch.eye(len(x))
        self.weights = x.T @ torch.linalg.solve(kernel, y - y.mean())

    @staticmethod
    def features(text: str) -> set[str]:
        words = regex.findall(r"[\p{L}\p{N}']+|[^\s\p{L}\p{N}]", text.lower())
        return {*words, *map(" ".join, pairwise(words))}

    def matrix(self, texts: Sequence[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), len(self.index))
        for row, text in zip(rows, texts, strict=True):
            row[[self.index[feature] for feature in self.features(text) if feature in self.index]] = 1.0
        return rows

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts,) ratings above the mean, in its units of -4 to 4."""
        return (self.matrix(texts) @ self.weights).numpy()


def cut(encoding: tiktoken.Encoding, text: str, length: int) -> tuple[str, str] | None:
    """The first `length` tokens of a text and the rest; None where the text is shorter.

    A cut within a character, or where the opening alone would be encoded otherwise, moves one token on.
    """
    ids = tokenizer.encode(encoding, text)
    for end in range(length, len(ids)):
        opening = tokenizer.decode(encoding, ids[:end])
        if tokenizer.encode(encoding, opening) == ids[:end] and text.startswith(opening):
            return opening, text[len(opening) :]
    return None


def openings(encoding: tiktoken.Encoding, texts: Sequence[str], *, cuts: int, seed: int) -> list[dict]:
    """Distinct prompts: the first 2 to 8 tokens of each text, `cuts` lengths a text at random."""
    draw = np.random.default_rng(seed)
    found = [cut(encoding, text, int(k)) for text in texts for k in draw.choice(np.arange(2, 9), cuts, replace=False)]
    return [{"prompt": prompt} for prompt in dict.fromkeys(pair[0] for pair in found if pair)]

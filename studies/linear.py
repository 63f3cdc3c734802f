"""The baseline of the reward models: a Bradley-Terry model that is linear in words and bigrams of the response.

    P(chosen beats rejected) = sigmoid(w . (f(chosen) - f(rejected))),  w = argmin sum_n -log P_n + penalty/2 |w|^2

f counts words, punctuation marks and pairs of neighbours, every one as it is spelt (no hashing, no rarest left out).
Letter case, how a count becomes a feature, and the penalty are chosen by cross-validation inside the training folds.
Left out: an intercept, which would give the order of a pair a meaning that it does not have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import regex
import torch
from torch import Tensor
from torch.nn import functional as F

WORD = regex.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
TRANSFORMS: dict[str, Callable[[int], float]] = {
    "counts": float,
    "binary": lambda count: float(count > 0),
    "log": math.log1p,
    "tf-idf": math.log1p,  # times log(responses / responses with the term)
}
PENALTIES = (
    1000.0,
    300.0,
    100.0,
    30.0,
    10.0,
    3.0,
    1.0,
    0.3,
    0.1,
)  # descending: each fit starts where the one before ended
INNER_FOLDS = 3

Pair = tuple[str, str]


@dataclass(frozen=True)
class Setting:
    """What the inner cross-validation chooses."""

    transform: str
    lower: bool
    penalty: float


def terms(text: str, *, lower: bool) -> Counter[str]:
    """How often each word, mark and bigram occurs; the two ends of the text are neighbours too."""
    words = WORD.findall(text.lower() if lower else text)
    return Counter([*words, *(" ".join(pair) for pair in pairwise(["<s>", *words, "</s>"]))])


def differences(pairs: Sequence[Pair], transform: str, *, lower: bool) -> Tensor:
    """Sparse (N, F) matrix of f(chosen) - f(rejected)."""
    change = TRANSFORMS[transform]
    sides = [(terms(chosen, lower=lower), terms(rejected, lower=lower)) for chosen, rejected in pairs]
    documents = Counter(term for pair in sides for side in pair for term in side)
    column = {term: i for i, term in enumerate(documents)}
    factor = {term: math.log(2 * len(pairs) / n) if transform == "tf-idf" else 1.0 for term, n in documents.items()}
    entries = [
        (row, column[term], factor[term] * (change(chosen[term]) - change(rejected[term])))
        for row, (chosen, rejected) in enumerate(sides)
        for term in chosen.keys() | rejected.keys()
    ]
    rows, columns, values = (torch.tensor(part) for part in zip(*entries, strict=True))
    shape = (len(pairs), len(column))
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=True).coalesce()


def coordinates(features: Tensor) -> Tensor:
    """(N, N) dense matrix Z with Z Z^T = X X^T for sparse (N, F) features X.

    A fit with an L2 penalty depends on its features through their inner products alone, so that margins fitted on Z
    are those fitted on X, at a fiftieth of the width. Terms that only held-out pairs have get weight 0 either way.
    """
    blocks = torch.arange(len(features)).split(256)
    gram = torch.cat([torch.sparse.mm(features, features.index_select(0, i).to_dense().T) for i in blocks], dim=1)
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp(min=0).sqrt()).float()


def fit(z: Tensor, penalty: float, start: Tensor | None = None) -> Tensor:
    """(C,) weights that minimise the penalised Bradley-Terry loss of the pairs z (N, C), by L-BFGS."""
    weight = torch.zeros(z.shape[1]) if start is None else start.clone()
    weight.requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -F.logsigmoid(z @ weight).sum() + penalty / 2 * weight.dot(weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def choose(features: dict[tuple[str, bool], Tensor], train: Tensor, folds: Tensor) -> Setting:
    """The setting with the least held-out log-loss over INNER_FOLDS parts of the training pairs.

    train  (M,) numbers of the training pairs;  folds  (N,) inner fold of every pair, all of a prompt in one
    """
    losses: Counter[Setting] = Counter()
    for (transform, lower), fold in product(features, range(INNER_FOLDS)):
        z, inner, held_out = features[transform, lower], train[folds[train] != fold], train[folds[train] == fold]
        weight = None
        for penalty in PENALTIES:
            weight = fit(z[inner], penalty, weight)
            losses[Setting(transform, lower, penalty)] -= F.logsigmoid(z[held_out] @ weight).sum().item()
    return min(losses, key=losses.__getitem__)


def cross_validate(pairs: Sequence[Pair], folds: Tensor, inner_folds: Tensor) -> tuple[Tensor, list[Setting]]:
    """Margins (N,) of all pairs, each from the model fitted without its fold, and the setting of every fold."""
    features = {(t, lower): coordinates(differences(pairs, t, lower=lower)) for t in TRANSFORMS for lower in (1, 0)}
    margins, settings = torch.zeros(len(pairs)), []
    for fold in range(int(folds.max()) + 1):
        train = (folds != fold).nonzero()[:, 0]
        setting = choose(features, train, inner_folds)
        z = features[setting.transform, setting.lower]
        margins[folds == fold] = z[folds == fold] @ fit(z[train], setting.penalty)
        settings.append(setting)
    return margins, settings

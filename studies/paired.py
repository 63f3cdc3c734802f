"""Accuracies of scorers on the same pairs, and the differences between them, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import project  # noqa: F401  first: it finds the package
import torch
from torch import Tensor

from minirlhf.bradley_terry import bradley_terry_loss

BOOTSTRAP = 5000  # samples
COLUMNS = {
    "reward_model": "reward model",
    "linear": "linear",
    "longer": "longer wins",
    "less_linear": "less linear",
    "less_longer": "less longer wins",
    "one_member": "one member",
}


def right(margins: Tensor) -> np.ndarray:
    """1 where the chosen response has the higher score, one half where the two are equal."""
    return ((margins > 0) + 0.5 * (margins == 0)).double().numpy()


def estimate(values: np.ndarray, groups: Sequence[str], *, seed: int) -> dict[str, object]:
    """Mean over the pairs with its 95 % interval, by bootstrap over groups: pairs of a group are not independent."""
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, counts = np.bincount(numbers, weights=values), np.bincount(numbers)
    draws = np.random.default_rng(seed).integers(len(counts), size=(BOOTSTRAP, len(counts)))
    low, high = np.quantile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [0.025, 0.975])
    return {"mean": round(float(values.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def measure(members: Tensor, others: Mapping[str, Tensor], groups: Sequence[str], *, seed: int) -> dict[str, object]:
    """Accuracy of the reward model, a mean over members, and what it has more than the others on the same pairs.

    members  (members, N) margins: score of the chosen less score of the rejected response
    others   names and margins (N,) of what it is compared with;  groups  (N,) what the pairs are drawn by
    """
    margins = members.mean(dim=0)
    mine = right(margins)
    row: dict[str, object] = {
        "pairs": len(groups),
        "groups": len(set(groups)),
        "reward_model": estimate(mine, groups, seed=seed),
        "one_member": estimate(np.mean([right(m) for m in members], axis=0), groups, seed=seed),
        "log_loss": round(bradley_terry_loss(margins, torch.zeros_like(margins)).item(), 4),
    }
    for name, other in others.items():
        theirs = right(other)
        row[name] = estimate(theirs, groups, seed=seed)
        row[f"less_{name}"] = estimate(mine - theirs, groups, seed=seed)
    return row


def table(results: Mapping[str, Mapping]) -> str:
    """One row a kind of pairs; differences carry their sign."""

    def cell(name: str, value: Mapping) -> str:
        sign = "+" if name.startswith("less") else ""
        low, high = value["interval"]
        return f"{value['mean']:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    rows = [
        f"| {kind} | {row['pairs']} | " + " | ".join(cell(name, row[name]) for name in COLUMNS) + " |"
        for kind, row in results.items()
    ]
    return "\n".join([f"| kind | pairs | {' | '.join(COLUMNS.values())} |", "| --- " * 8 + "|", *rows])


def page(facts: Mapping[str, object], results: Mapping[str, Mapping]) -> str:
    """The result as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("command", "settings"))
    trained = "\n".join(
        f"- {kind}: {', '.join(f'{name} {value}' for name, value in values.items())}"
        for kind, values in facts["settings"].items()
    )
    return (
        f"# Reward models by cross-validation\n\n`{facts['command']}`; {settings}.\n\nTrained with\n\n{trained}\n\n"
        f"{table(results)}\n\nAccuracy on held-out pairs with its 95 % interval (bootstrap over first turns); `less` "
        f"is the paired difference on the same pairs, `one member` the mean accuracy of the models that are averaged.\n"
    )

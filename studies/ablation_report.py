"""What an ablation study writes: its tables, all curves as CSV, and the figure.

Intervals hold 95 % of a bootstrap in which seeds and prompts are both drawn anew, with replacement (Owen 2007, the
pigeonhole bootstrap); the seeds answer the same prompts. A difference to the recipe is taken seed by seed and prompt by
prompt. Trap: of three seeds a bootstrap knows no more than the three and promises too narrow an interval, so the
differences of the single seeds stand beside it.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import project  # noqa: F401  first: it finds the package

from minirlhf.evaluate.statistics import ENDS, RESAMPLES, resampled

WHOLE = "nothing"  # what the recipe as it is goes without
CURVES = ("score", "kl", "approximate_kl", "clip_fraction", "value_clip_fraction", "explained_variance", "entropy")
CURVES += ("policy_grad_norm", "value_grad_norm", "first_ratio_deviation", "response_length", "eos_rate")
SEEN = CURVES[2:]  # in the second table; the first has score and KL on held-out prompts
HELD_OUT = ("judge", "win_rate", "kl", "reward", "length")
TITLES = {"score": "score, training", "kl": "KL, training (nats)", "judge": "judge, held out"}
Figures = Mapping[str, Any]
Done = Mapping[str, Mapping[int, Figures]]  # of what is switched off, by seed


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of values (S, P), one a seed and prompt; the seeds answer the same prompts."""
    seeds, prompts = resampled(values.shape[0], seed=1), resampled(values.shape[1], seed=0)
    means = [values[np.ix_(seeds[i], prompts[i])].mean() for i in range(RESAMPLES)]
    low, high = np.percentile(means, ENDS)
    return float(low), float(high)


def at_end(figures: Mapping[int, Figures], name: str, seeds: list[int]) -> np.ndarray:
    """(S, P) what was measured at the end, a seed and prompt."""
    return np.array([figures[seed]["end"][name] for seed in seeds])


def table(done: Done) -> str:
    """At the end, on held-out prompts: a row for what is switched off."""
    lines = [
        "| without | judge | 95 % | difference | 95 % | each seed | win rate | 95 % | KL | reward | length |",
        "| --- " * 11 + "|",
    ]
    for name, figures in done.items():
        seeds = sorted(figures)
        judge, win, *others = (at_end(figures, what, seeds) for what in HELD_OUT)
        cells = [name, f"{judge.mean():.3f}", between(judge), "", "", ""]
        paired = [seed for seed in seeds if seed in done.get(WHOLE, {})]
        if name != WHOLE and paired:
            gap = at_end(figures, "judge", paired) - at_end(done[WHOLE], "judge", paired)
            cells[3:] = [f"{gap.mean():+.3f}", between(gap, "+"), ", ".join(f"{d:+.2f}" for d in gap.mean(axis=1))]
        cells += [f"{win.mean():.0%}", " to ".join(f"{end:.0%}" for end in interval(win))]
        lines.append("| " + " | ".join([*cells, *(f"{x.mean():.2f}" for x in others)]) + " |")
    return "\n".join(lines)


def between(values: np.ndarray, sign: str = "") -> str:
    """The interval in words."""
    return " to ".join(f"{end:{sign}.2f}" for end in interval(values))


def of_curve(figures: Figures, name: str) -> float:
    """One number for a curve: its mean over the iterations; of the first ratio's deviation the largest."""
    values = figures["curves"][name]
    return float(max(values) if name == "first_ratio_deviation" else np.mean(values))


def curve_table(done: Done) -> str:
    """Means of the training curves over iterations and seeds."""
    lines = [
        "| without | " + " | ".join(name.replace("_", " ") for name in SEEN) + " |",
        "| --- " * (len(SEEN) + 1) + "|",
    ]
    for name, figures in done.items():
        means = (np.mean([of_curve(found, what) for found in figures.values()]) for what in SEEN)
        lines.append(f"| {name} | " + " | ".join(f"{mean:.2g}" for mean in means) + " |")
    return "\n".join(lines)


def changed(done: Done, name: str, *, share: float = 0.25) -> list[str]:
    """The curves that moved by more than `share` of the recipe's in every seed, up in all or down in all."""
    found = []
    whole, figures = done.get(WHOLE, {}), done[name]
    for what in (*CURVES[:2], *SEEN):
        pairs = [(of_curve(figures[seed], what), of_curve(whole[seed], what)) for seed in figures if seed in whole]
        relative = [(new - old) / max(abs(old), 1e-12) for new, old in pairs]
        if relative and what != "first_ratio_deviation" and (min(relative) > share or max(relative) < -share):
            new, old = np.mean(pairs, axis=0)
            found.append(f"{what} {old:.2g} to {new:.2g}")
    return found


def report(done: Done, head: str) -> str:
    """Both tables and what the curves say, as Markdown."""
    starts = [found["held_out"] for figures in done.values() for found in figures.values()]
    first = [{int(i): means for i, means in start.items()}[0] for start in starts]
    sft = ", ".join(f"{what} {np.mean([means[what] for means in first]):.2f}" for what in ("judge", "reward", "length"))
    seen = (f"- {name}: {'; '.join(changed(done, name)) or 'nothing'}" for name in done if name != WHOLE)
    parts = ("# What each detail of PPO does", head, f"The SFT model that all start from: {sft}.")
    parts += ("## Held-out prompts, at the end", table(done))
    parts += ("## Means of the training curves", curve_table(done))
    parts += ("## Curves that moved by a quarter or more, the same way in every seed", "\n".join(seen))
    return "\n\n".join(parts) + "\n"


def write_csv(done: Done, path: Path) -> None:
    """A row a detail, seed and iteration; the held-out means stand where they were measured."""
    fields = ["without", "seed", "iteration", *CURVES, *(f"held_out_{name}" for name in HELD_OUT)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for name, figures in done.items():
            for seed, found in figures.items():
                for i in range(len(found["curves"]["kl"])):
                    row = {what: f"{found['curves'][what][i]:.5g}" for what in CURVES}
                    known = {int(k): v for k, v in found["held_out"].items()}.get(i + 1, {})
                    row |= {f"held_out_{what}": f"{value:.5g}" for what, value in known.items()}
                    writer.writerow({"without": name, "seed": seed, "iteration": i + 1, **row})


def plot(done: Done, path: Path) -> None:
    """A column for what is switched off, in red, beside the whole recipe, in grey; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in done if name != WHOLE] or [WHOLE]
    figure, axes = plt.subplots(
        3, len(names), figsize=(1 + 1.9 * len(names), 6), squeeze=False, sharex=True, sharey="row"
    )
    for column, name in enumerate(names):
        for axis, (what, title) in zip(axes[:, column], TITLES.items(), strict=True):
            for colour, figures in (("0.6", done.get(WHOLE, {})), ("C3", done[name])):
                for found in figures.values():
                    held = {int(k): v[what] for k, v in found["held_out"].items()} if what == "judge" else {}
                    points = held or dict(enumerate(found["curves"].get(what, ()), start=1))
                    axis.plot(*zip(*points.items(), strict=True), color=colour, linewidth=1)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(title)
        axes[0, column].set_title(name, fontsize=9)
        axes[2, column].set_xlabel("iteration", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)

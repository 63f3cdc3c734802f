"""What the over-optimisation study writes: CSV rows, the figure, and the table of the fitted coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peaks import Curve, Fit, Form, estimate, mean_over_runs, predict, with_interval

Done = Mapping[str, Sequence[Mapping[str, Any]]]  # of each case the figures of its seeds, in their order

PARTS = ("helpful", "honest", "harmless")  # of the judge
FIELDS = ("case", "seed", "method", "step", "kl", "proxy", "gold", *PARTS, "length", "answer")
FURTHEST = {"best-of-n": 10.0, "rl": 3.0}  # where the fits end: beyond 9 nats few runs are left, at the judge's floor
PANELS = (("pairs", "labels"), ("", "1,600 labels, one thing changed"))


def rows_of(done: Done) -> Iterator[dict[str, Any]]:
    """Means over the prompts: a row a case, seed, method and point; `step` is n, or PPO's iteration."""
    for case, seeds in done.items():
        for seed, figures in enumerate(seeds):
            for method, found in (("best-of-n", figures["best-of-n"]), ("PPO", figures["rl"])):
                for i, step in enumerate(found.get("n", found.get("iteration"))):
                    numbers = {name: round(float(np.mean(found[name][i])), 4) for name in ("kl", "proxy", "gold")}
                    texts = {name: found[name][i] for name in (*PARTS, "length", "answer") if name in found}
                    yield {"case": case, "seed": seed, "method": method, "step": step, **numbers, **texts}


def curve(figures: Mapping[str, Any], form: Form, what: str = "gold") -> Curve:
    """The judge's curve of one seed, or the proxy's."""
    return Curve(np.array(figures[form]["kl"]), np.array(figures[form][what]))


def fits(done: Done) -> dict[tuple[str, Form], Fit]:
    """The judge's curve of every case and method."""
    return {
        (case, form): estimate([curve(figures, form) for figures in seeds], form, furthest=FURTHEST[form])
        for case, seeds in done.items()
        for form in ("best-of-n", "rl")
    }


def mean_curve(seeds: Sequence[Mapping[str, Any]], form: Form, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds of the scores above the SFT model's, as far as all of them reach."""
    return mean_over_runs([curve(figures, form, what).means() for figures in seeds])


def plot(done: Done, path: Path) -> None:
    """Above the SFT model's, by sqrt KL: the judge of every seed (points), its fit (full), the mean proxy (dashed)."""
    from matplotlib import pyplot

    known = fits(done)
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharey="row", sharex="row")
    for row, form in enumerate(("best-of-n", "rl")):
        for column, (panel, (kind, title)) in enumerate(zip(axes[row], PANELS, strict=True)):
            names = [name for name in done if (kind in name if kind else "pairs" not in name or name == "1,600 pairs")]
            for number, name in enumerate(names):
                colour = f"C{number}"
                each = [curve(figures, form).means() for figures in done[name]]
                for d, gold in each:
                    panel.plot(d, gold, ".", color=colour, markersize=3)
                panel.plot(*mean_curve(done[name], form, "proxy"), "--", color=colour, linewidth=0.8)
                near = np.linspace(0, min(FURTHEST[form], max(d.max() for d, _ in each)), 100)
                fit = known[name, form]
                panel.plot(near, predict(near, fit.alpha[0], fit.beta[0], form), color=colour, label=name)
            panel.set_title(f"{'best-of-n' if form == 'best-of-n' else 'PPO'}: {title}")
            panel.axhline(0, color="grey", linewidth=0.6)
            panel.set_xlabel("sqrt KL to the SFT model (nats)")
            panel.legend(fontsize=8)
            if column == 0:
                panel.set_ylabel("above the SFT model; proxy dashed")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(done: Done) -> str:
    """A row a case and method: agreement, coefficients, where the judge is highest, and what is left at the end."""
    lines = [
        "| reward model | seeds | agrees with the judge | method | alpha | beta | R^2 | maximum at d, by the fit "
        "| measured | judge there | judge at the end | proxy at the end |",
        "| --- " * 12 + "|",
    ]
    for (case, form), fit in fits(done).items():
        seeds = done[case]
        agrees = [figures["agreement"] for figures in seeds]
        ends = [f"{mean_curve(seeds, form, what)[1][-1]:+.2f}" for what in ("gold", "proxy")]
        numbers = [with_interval(x) for x in (fit.alpha, fit.beta)]
        places = [with_interval(fit.peak, distance), with_interval(fit.measured, distance)]
        lines.append(
            f"| {case} | {len(seeds)} | {min(agrees):.0%} to {max(agrees):.0%} "
            f"| {'best-of-n' if form == 'best-of-n' else 'PPO'} | {' | '.join(numbers)} | {fit.explained:.2f} "
            f"| {' | '.join(places)} | {with_interval(fit.height)} | {' | '.join(ends)} |"
        )
    return "\n".join(lines)


def distance(d: float) -> str:
    """A place on the axis; what lies far beyond every measured one is said to."""
    return f"{d:.2f}" if d < 20 else "beyond 20"

"""The curves of every stage, each with its healthy range shaded."""

from __future__ import annotations

from collections.abc import Sequence

from minirlhf.report.chart import Line, figure
from minirlhf.report.healthy import HEALTHY, Band
from minirlhf.report.markup import Html, details, element, joined, number, section, table
from minirlhf.report.run import KINDS, Run, StageRun

TITLES = {"sft": "SFT", "feedback": "Feedback", "reward": "Reward model", "ppo": "PPO", "dpo": "DPO"}

# The metrics that are open to begin with, and what they are called; the others are folded away below them.
PANELS: dict[str, dict[str, str]] = {
    "sft": {
        "loss": "Loss (nats a token)",
        "validation_loss": "Held-out loss (nats a token)",
        "grad_norm": "Norm of the gradient",
    },
    "feedback": {},
    "reward": {
        "loss": "Loss",
        "accuracy": "Accuracy on the batch",
        "validation_accuracy": "Held-out accuracy",
    },
    "ppo": {
        "score": "Reward model's score",
        "kl": "KL to SFT (nats a response)",
        "response_length": "Length of a response (tokens)",
        "explained_variance": "Explained variance of the value model",
        "entropy": "Entropy (nats a token)",
        "clip_fraction": "Share of tokens clipped",
        "approximate_kl": "KL of the update (nats a token)",
        "eos_rate": "Share of responses that end",
        "first_ratio_deviation": "First ratio's distance from 1",
    },
    "dpo": {
        "loss": "Loss",
        "validation_loss": "Held-out loss",
        "validation_accuracy": "Held-out accuracy",
        "margin": "Margin of the implicit rewards",
        "reward_chosen": "Implicit reward of the better answers",
        "reward_rejected": "Implicit reward of the worse answers",
        "logprob_chosen": "Log-probability of the better answers",
    },
}
LOG = {("sft", "loss"), ("sft", "validation_loss"), ("sft", "grad_norm"), ("reward", "grad_norm"), ("dpo", "grad_norm")}


def at_the_end(values: Sequence[float]) -> float:
    """Mean of the last tenth."""
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def status(values: Sequence[float], band: Band) -> Html:
    """Whether a metric ended in its healthy range, as a sign and a word."""
    inside = at_the_end(values) in band.beside(values[0])
    return element("span", "✓ in range" if inside else "✗ outside", class_=f"mark {'good' if inside else 'bad'}")


def note(kind: str, metric: str, lines: Sequence[tuple[str, Sequence[float]]]) -> Html:
    """The end of each line, and its healthy range."""
    band = HEALTHY.get((kind, metric))
    parts = []
    for name, values in lines:
        told = [f"{name}: " if len(lines) > 1 else "", f"end {number(at_the_end(values))} "]
        parts.append(element("span", *told, status(values, band) if band else "", class_="end-of"))
    if band:
        parts.append(element("span", f"healthy: {band}", class_="quiet"))
    return joined(parts, " ")


def panel(kind: str, metric: str, title: str, stages: Sequence[tuple[str, StageRun]]) -> Html:
    """One metric of all the runs of a kind of stage."""
    lines, ends, bands = [], [], []
    for colour, (label, stage) in enumerate(stages):
        points = stage.points(metric)
        if points:
            values = [value for _, value in points]
            lines.append(Line(label, points, colour=colour))
            ends.append((label, values))
            if (kind, metric) in HEALTHY:
                bands.append(HEALTHY[kind, metric].beside(values[0]))
    # Ranges in units of each run's first value differ: what all of them allow is shaded.
    band = Band(max(b.low for b in bands), min(b.high for b in bands)) if bands else None
    x_label = "iteration" if kind == "ppo" else "step"
    said = note(kind, metric, ends)
    return figure(title, lines, x_label=x_label, band=band, log=(kind, metric) in LOG, note=said)


def labelled(runs: Sequence[Run], kind: str) -> list[tuple[str, StageRun]]:
    """The stages of a kind, each with the shortest name that tells it from the others."""
    found = [(run, stage) for run in runs for stage in run.of_kind(kind)]
    one_each = all(len(run.of_kind(kind)) < 2 for run in runs)
    if len(runs) == 1:
        return [(stage.name, stage) for _, stage in found]
    return [(run.label if one_each else f"{run.label}/{stage.name}", stage) for run, stage in found]


def of_one_row(stages: Sequence[tuple[str, StageRun]]) -> Html:
    """A stage of one step as a table: its numbers by run, beside their healthy ranges."""
    kind = stages[0][1].kind
    names = list(dict.fromkeys(name for _, stage in stages for name in stage.metrics()))
    rows = []
    for name in names:
        band = HEALTHY.get((kind, name))
        values = [[value for _, value in stage.points(name)] for _, stage in stages]
        cells = [joined([Html(number(v[-1])), status(v, band) if band else Html("")], " ") if v else "" for v in values]
        rows.append((name.replace("_", " "), *cells, band or ""))
    return table(("", *(label for label, _ in stages), "healthy"), rows)


def curves_of(kind: str, stages: Sequence[tuple[str, StageRun]]) -> Html:
    """All metrics of a kind of stage, the main ones open."""
    if kind == "feedback":
        return of_one_row(stages)
    there = list(dict.fromkeys(name for _, stage in stages for name in stage.metrics() if stage.points(name)))
    main = [panel(kind, name, title, stages) for name, title in PANELS[kind].items() if name in there]
    rest = [panel(kind, name, name.replace("_", " "), stages) for name in there if name not in PANELS[kind]]
    if not there:
        return element("p", "No step is finished yet.", class_="quiet")
    more = (
        details(f"{len(rest)} more metric{'s' if len(rest) > 1 else ''}", element("div", *rest, class_="charts"))
        if rest
        else ""
    )
    return joined([element("div", *main, class_="charts"), Html(more)])


def curves(runs: Sequence[Run]) -> Html:
    """The section: one part for each kind of stage that has begun."""
    parts = []
    for kind in KINDS:
        stages = labelled(runs, kind)
        if stages:
            parts += [element("h3", TITLES[kind], id=f"curves-{kind}"), curves_of(kind, stages)]
    about = element(
        "p",
        "Shaded: the healthy range. What a number means and what to suspect outside of its range is in "
        "docs/glossary.md. Long curves are means of neighbouring steps; the end is the mean of the last tenth.",
        class_="quiet",
    )
    return section("curves", "Curves of every stage", about, *parts)

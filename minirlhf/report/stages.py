"""The sections about the stages: the curves of each with its healthy ranges, and what was run.

A section is a list of blocks for `page.html`. A block is a dictionary: {"p"} a paragraph, {"h3"} a heading, {"list"} of
a head and words each, {"head", "rows"} a table whose first column names its rows, {"figures"}, {"prompt", "answers"},
or {"summary", "blocks"} to unfold. What `Markup` formats is escaped there; every other string is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from minirlhf.report.chart import Line, figure, number
from minirlhf.report.run import KINDS, Run, StageRun, labelled
from minirlhf.runs.health import HEALTHY, Metric

Block = dict[str, Any]
DIGITS = 12  # of a hash that are shown


def quiet(words: str) -> Block:
    """A paragraph about the section, in a lighter colour."""
    return {"p": words, "kind": "quiet"}


def mark(kind: str, words: str) -> Markup:
    """A sign and a word on a coloured ground: good, middling, bad, or quiet."""
    return Markup('<span class="mark {}">{}</span>').format(kind, words)


# ---------------------------------------------------------------------------------------------------------- the curves
def at_the_end(values: Sequence[float]) -> float:
    """Mean of the last tenth."""
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def status(values: Sequence[float], metric: Metric) -> Markup:
    """Whether a metric ended in its healthy range, as a sign and a word."""
    if not metric.has_range:
        return Markup("")
    inside = at_the_end(values) in metric.beside(values[0])
    return mark("good", "✓ in range") if inside else mark("bad", "✗ outside")


def note(metric: Metric, lines: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """The end of each line, the healthy range, and what to do where one is outside of it."""
    item, parts = Markup("<span>{}</span>"), []
    for name, values in lines:
        end = f"{name}: " * (len(lines) > 1) + f"end {number(at_the_end(values))} "
        parts.append(item.format(Markup("{}{}").format(end, status(values, metric))))
    outside = any(at_the_end(values) not in metric.beside(values[0]) for _, values in lines)
    parts += [item.format(f"healthy: {metric}")] if metric.has_range else []
    parts += [item.format(f"{metric.advice}.")] if outside and metric.advice else []
    return Markup(" ").join(parts)


def panel(kind: str, name: str, stages: Sequence[tuple[str, StageRun]]) -> Block:
    """One metric of all the runs of a kind of stage."""
    metric = HEALTHY.get((kind, name), Metric())
    lines = [Line(label, stage.points(name), colour) for colour, (label, stage) in enumerate(stages)]
    lines = [line for line in lines if line.points]
    ends = [(line.label, [value for _, value in line.points]) for line in lines]
    bands = [metric.beside(values[0]) for _, values in ends]
    # Ranges in units of each run's first value differ: what all of them allow is shaded.
    band = Metric(max(b.low for b in bands), min(b.high for b in bands)) if metric.has_range else None
    x_label = "iteration" if kind in ("ppo", "online-dpo") else "step"
    title, about = metric.title or name.replace("_", " "), note(metric, ends)
    return figure(title, lines, x_label=x_label, band=band, log=metric.log, note=about)


def of_one_row(kind: str, names: Sequence[str], stages: Sequence[tuple[str, StageRun]]) -> Block:
    """A stage of one step as a table: its numbers by run, beside their healthy ranges."""
    rows = []
    for name in names:
        metric = HEALTHY.get((kind, name), Metric())
        values = [[value for _, value in stage.points(name)] for _, stage in stages]
        cells = [Markup("{} {}").format(number(v[-1]), status(v, metric)) if v else "" for v in values]
        rows.append((name.replace("_", " "), *cells, metric if metric.has_range else ""))
    return {"head": ("", *(label for label, _ in stages), "healthy"), "rows": rows}


def curves_of(kind: str, stages: Sequence[tuple[str, StageRun]]) -> list[Block]:
    """All metrics of a kind of stage: those with a title open, where any has one."""
    names = list(dict.fromkeys(name for _, stage in stages for name in stage.metrics() if stage.points(name)))
    if not names:
        return [quiet("No step is finished yet.")]
    if kind in ("feedback", "rejection"):
        return [of_one_row(kind, names, stages)]
    titled = [name for (stage, name), metric in HEALTHY.items() if stage == kind and metric.title and name in names]
    rest = [panel(kind, name, stages) for name in names if name not in titled]
    if not titled:
        return [{"figures": rest}]
    more = f"{len(rest)} more metric{'s' if len(rest) > 1 else ''}"
    folded = [{"summary": more, "blocks": [{"figures": rest}]}] if rest else []
    return [{"figures": [panel(kind, name, stages) for name in titled]}, *folded]


def curves(runs: Sequence[Run]) -> list[Block]:
    """One part for each kind of stage that has begun."""
    about = (
        "Shaded: the healthy range. What a number means and what to suspect outside of its range is in "
        "docs/metrics.md. Long curves are means of neighbouring steps; the end is the mean of the last tenth."
    )
    blocks = [quiet(about)]
    for kind, (title, _) in KINDS.items():
        stages = [(label, stage) for label, _, stage in labelled(runs, kind)]
        blocks += [{"h3": title, "id": f"curves-{kind}"}, *curves_of(kind, stages)] if stages else []
    return blocks


# -------------------------------------------------------------------------------------------------------- what was run
def setting(value: object) -> str:
    """A setting as text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def sources(stage: StageRun) -> Markup:
    """What the stage read, by the end of its path, each with the start of its SHA-256."""
    item, parts = Markup('<span class="source">{} <code>{}</code></span>'), []
    for path, digest in {**stage.setup.get("inputs", {}), **stage.setup.get("models", {})}.items():
        place = Path(path)
        name = f"{place.parent.name}/model" if place.name == "model" else place.name
        parts.append(item.format(name[-80:], str(digest)[:DIGITS]))
    return Markup(" ").join(parts)


def circumstances(run: Run) -> str:
    """Versions and machine, once where all stages had the same, and the time of all stages."""
    parts = ([stage.setup.get("versions", {}), stage.setup.get("machine", {})] for stage in run.stages if stage.setup)
    texts = ["; ".join(", ".join(f"{name} {v}" for name, v in part.items()) for part in pair) for pair in parts]
    total = sum(run.seconds.values())
    return f"{' / '.join(dict.fromkeys(texts))}." + (f" All stages: {total:.0f} s." if total else "")


def differences(runs: Sequence[Run]) -> Block:
    """The settings in which the runs differ, one beside the other."""
    values: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for stage in run.stages:
            for name, value in stage.setup.get("config", {}).items():
                if name not in ("run", "resume"):
                    values.setdefault(f"{stage.name}: {name}", [""] * len(runs))[i] = setting(value)
    rows = [(name, *row) for name, row in values.items() if len(set(row)) > 1]
    return (
        {"head": ("setting", *(r.label for r in runs)), "rows": rows} if rows else quiet("All settings are the same.")
    )


def facts(runs: Sequence[Run]) -> list[Block]:
    """Settings, seeds, versions, times and hashes of what was read; several runs begin with what differs."""
    blocks = [{"h3": "Settings that differ"}, differences(runs)] if len(runs) > 1 else []
    head = ("stage", "state", "steps", "time", "seed", "read (SHA-256 of its content or weights)")
    for run in runs:
        rows = []
        for stage in run.stages:
            state = "finished" if stage.finished else "not finished"
            seconds, seed = run.seconds.get(stage.name, stage.seconds), stage.setup.get("config", {}).get("seed", "")
            rows.append((stage.name, state, len(stage.rows), f"{seconds:.0f} s", setting(seed), sources(stage)))
        blocks += [{"h3": run.label}, {"head": head, "rows": rows}, quiet(circumstances(run))]
        for stage in run.stages:
            settings = [(name, setting(value)) for name, value in stage.setup.get("config", {}).items()]
            whole = {"head": ("setting", "value"), "rows": settings}
            blocks += [{"summary": f"Settings of {stage.name}", "blocks": [whole]}] if settings else []
    return blocks

"""The sections of the page: what each shows of the runs.

A section is a list of blocks for `page.html`. A block is a dictionary: {"p"} a paragraph, {"h3"} a heading, {"head",
"rows"} a table whose first column names its rows, {"figures"} charts, {"prompt", "answers"}, or {"summary", "blocks"}
to unfold. What `Markup` formats is escaped there; every other string is text. A section without blocks has nothing to
show yet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from minirlhf.report.chart import ANY, MINUS, Block, Line, Point, chart, number
from minirlhf.report.run import KINDS, Row, Run, StageRun, labelled
from minirlhf.report.verdict import checks, over_optimised, signed, summary_of, with_interval
from minirlhf.runs.health import HEALTHY, Metric
from minirlhf.world.judge import Judgement, judge

PARTS = ("helpful", "honest", "harmless")
MOST_HINTS = 40  # of a stage
FIRST, OF_SEVERAL = 12, 6  # prompts of the file's start, which nobody chose; the same where there are several runs
WORST = 6  # and those that PPO made worst, which say most
DIGITS = 12  # of a hash that are shown


def quiet(words: str) -> Block:
    """A paragraph about the section, in a lighter colour."""
    return {"p": words, "kind": "quiet"}


def mark(kind: str, words: str) -> Markup:
    """A sign and a word on a coloured ground: good, middling, bad, or quiet."""
    return Markup('<span class="mark {}">{}</span>').format(kind, words)


# ----------------------------------------------------------------------------------------------------- verdict, hints
def verdict(runs: Sequence[Run]) -> list[Block]:
    """In plain words, for each run: was PPO taken too far, and which thresholds are met."""
    signs = {True: mark("good", "✓ met"), False: mark("bad", "✗ not met"), None: mark("quiet", "– open")}
    headline = Markup('<strong class="finding {}">{}</strong> {}')
    blocks: list[Block] = []
    for run in runs:
        blocks += [{"h3": run.label}] if len(runs) > 1 else []
        findings = [{"p": headline.format(*over_optimised(run, stage))} for stage in run.of_kind("ppo")]
        rows = [(*row, signs[met]) for *row, met in checks(run)]
        blocks += findings or [{"p": "PPO has not begun in this run."}]
        blocks += [{"p": summary_of(checks(run))}, {"head": ("", "needed", "found", ""), "rows": rows}]
    return blocks


def hints(runs: Sequence[Run]) -> list[Block]:
    """Hints that the stages gave while they ran."""
    items = []
    for name, stage in ((run.prefix + stage.name, stage) for run in runs for stage in run.stages):
        for hint in stage.hints[:MOST_HINTS]:
            place = f"{name}, step {hint.get('step', '?')}: {hint.get('hint', '')}"
            items.append((place, hint.get("message", "")))
        if len(stage.hints) > MOST_HINTS:
            items.append((name, f"{len(stage.hints) - MOST_HINTS} more in {stage.name}/hints.jsonl"))
    return [{"list": items} if items else quiet("No stage noticed anything wrong.")]


# -------------------------------------------------------------------------------------------------- what was evaluated
def mean(value: Any) -> float:
    """A number, or the mean of an estimate."""
    return value["mean"] if isinstance(value, dict) else value


MODELS: dict[str, Callable[[Row], str]] = {
    "model": lambda model: model["label"],
    "judge": lambda model: with_interval(model["total"], "+.2f"),
    "helpful": lambda model: signed(mean(model["helpful"])),
    "honest": lambda model: signed(mean(model["honest"])),
    "harmless": lambda model: signed(mean(model["harmless"])),
    "wins against SFT": lambda model: "" if model["name"] == "sft" else with_interval(model["win_rate"], ".0%"),
    "KL (nats)": lambda model: f"{'at most ' if model['kl_is_bound'] else ''}{max(0.0, model['kl']):.1f}",
    "length": lambda model: f"{model['length']:.1f}",
    "ends": lambda model: f"{model['eos_rate']:.0%}",
    "reward": lambda model: signed(model["reward"]),
}


def models(runs: Sequence[Run]) -> list[Block]:
    """Judge and parts are from −1 to 1, with 95 % intervals over the prompts; the reward is the reward model's score,
    which PPO was trained on and the judge was not.
    """
    every = [{**m, "name": name, "label": run.prefix + name} for run in runs for name, m in run.models.items()]
    prompts = " or ".join(sorted({str(run.summary["prompts"]) for run in runs if run.models}))
    rows = [[cell(model) for cell in MODELS.values()] for model in every]
    about = quiet(f"{prompts} held-out prompts, one sampled answer each.")
    return [about, {"head": list(MODELS), "rows": rows, "kind": "models"}] if rows else []


def best_of(names: Iterable[str]) -> list[str]:
    """The names best-of-n among others, by n."""
    return sorted((name for name in names if re.fullmatch(r"best-of-\d+", name)), key=lambda name: (len(name), name))


def frontier_lines(runs: Sequence[Run], value: str) -> list[Line]:
    """Best-of-n as a curve from the SFT model, and a dot for each other model; several runs share their colours."""
    curves = [(run, [name for name in ("sft", *best_of(run.models)) if name in run.models]) for run in runs]
    others = dict.fromkeys(name for run, curve in curves for name in run.models if name not in curve)
    lines = []
    for run, curve in curves:
        for colour, label in enumerate(["best-of-n", *others]):
            names = curve if colour == 0 else [name for name in run.models if name == label]
            points = [(max(0.0, run.models[name]["kl"]), mean(run.models[name][value])) for name in names]
            errors = [run.models[name][value]["interval"] for name in names if value == "total"]
            words = names if colour == 0 and run is runs[0] else ()
            lines.append(Line(label, points, colour, errors=errors, words=words, prefix=run.prefix))
    return lines


def frontier(runs: Sequence[Run]) -> list[Block]:
    """Best-of-n takes the best by reward of n answers of the SFT model: it trains nothing, and its KL is at most
    log n − (n − 1)/n. That curve is what a trained policy has to beat: above it, training bought more for the same
    distance. A colour is a kind of model; point at a dot for its name and numbers.
    """
    titles = {"reward": "Reward model's score", "total": "Judge's mark, with 95 % intervals"}
    charts = [chart(title, frontier_lines(runs, value), "KL to SFT (nats)") for value, title in titles.items()]
    return [{"figures": charts}] if any(run.models for run in runs) else []


def ends_of(run: Run, stage: StageRun) -> list[Row]:
    """The trace of a run of PPO; of one that has none, the first and the last model as evaluated."""
    if stage.trace or stage.name != "ppo" or not {"sft", "ppo"} <= run.models.keys():
        return stage.trace
    ends = ((0, run.models["sft"]), (len(stage.rows), run.models["ppo"]))
    return [{**model, "iteration": i, "judge": model["total"]} for i, model in ends]


def trace_lines(traces: Mapping[str, list[Row]], names: Sequence[str], x: Callable[[Row], float]) -> list[Line]:
    """A line for each of the names and traces; of one trace a colour for each name, of several one for each trace."""
    lines, alone = [], len(traces) == 1
    for i, (label, rows) in enumerate(traces.items()):
        for j, name in enumerate(names):
            title = {"reward": "reward model (proxy)"}.get(name, name) if alone else f"{label}: {name}"
            points = [(x(row), mean(row[name])) for row in rows]
            lines.append(Line(title, points, j if alone else i, dashed=j == 1 and not alone))
    return lines


def over_optimisation(runs: Sequence[Run]) -> list[Block]:
    """PPO sees the reward model's score, the proxy. The judge is what the proxy stands for, and nothing in training
    sees it. Where the proxy goes on rising and the judge falls, PPO has found answers that only the reward model likes.
    """
    stages = labelled(runs, "ppo")
    traces = {label: rows for label, run, stage in stages if (rows := ends_of(run, stage))}
    distance = trace_lines(traces, ("judge", "reward"), lambda row: math.sqrt(max(0.0, row["kl"])))
    back = ["Dots without a line: the distance fell in between."] if any(line.folded for line in distance) else []
    charts = [chart("Reward and judge against distance", distance, "square root of KL (nats)", note=back)]
    times = {"Reward and judge over time": ("judge", "reward"), "The judge's three parts": PARTS}
    for title, names in times.items():
        if len(traces) == 1 or names is not PARTS:
            lines = trace_lines(traces, names, lambda row: row["iteration"])
            charts.append(chart(title, lines, "iteration"))
    untraced = any(not stage.trace for label, _, stage in stages if label in traces)
    ends = "Without a trace, only the first and the last model were judged, on the evaluation's prompts."
    return [*([quiet(ends)] if untraced else []), {"figures": charts}] if traces else []


def calibration(runs: Sequence[Run]) -> list[Block]:
    """Held-out pairs of answers, by the probability that the model gives the one it prefers; up: the share of pairs
    where the annotator prefers the same. Below the dashed line it is too sure of itself. The error is the mean distance
    from that line, weighted by pairs.
    """
    lines = [Line("calibrated", [(0.5, 0.5), (1.0, 1.0)], colour=11, dots=False, dashed=True)]
    rows: list[tuple[str, ...]] = []
    for run, c in ((run, run.calibration) for run in runs if run.calibration.get("bins")):
        points = [(b["confidence"], b["accuracy"]) for b in c["bins"]]
        lines.append(Line(run.label if run.prefix else "reward model", points, len(rows)))
        numbers = (number(round(c[name], 3)) for name in ("expected_calibration_error", "loss"))
        rows.append((run.label, c["pairs"], f"{c['accuracy']:.1%}", *numbers))
    drawn = chart("Right as often as it expects?", lines, "probability that it gives the better answer")
    head = ("run", "held-out pairs", "in the right order", "calibration error", "loss")
    return [{"figures": [drawn]}, {"head": head, "rows": rows}] if rows else []


# --------------------------------------------------------------------------------------------------------- the answers
def judged(prompt: object, answer: object) -> Judgement | None:
    """The judge's marks; None for a prompt that is not of the embedded world."""
    try:
        return judge(str(prompt), str(answer))
    except ValueError:
        return None


def marks(verdict: Judgement | None) -> Markup:
    """The three parts as signs and numbers: good from 1/2, bad below 0."""
    parts = []
    for name, value in vars(verdict).items() if verdict else ():
        sign, kind = ("✓", "good") if value >= 0.5 else ("✗", "bad") if value < 0 else ("○", "middling")
        parts.append(mark(kind, f"{sign} {name} {f'{value:+.2g}'.replace('-', MINUS) if value else 0}"))
    return Markup(" ").join(parts) or mark("quiet", "not judged")


def card(runs: Sequence[Run], row: Row) -> Block:
    """A prompt of the first run, without the line on which the model is to answer, and the answers of every run.

    Of several best-of-n, the largest is shown.
    """
    shown = []
    for run in runs:
        answers = row if run is runs[0] else next((r for r in run.answers if r.get("prompt") == row["prompt"]), {})
        for name in (name for name in answers if name not in ("prompt", *best_of(answers)[:-1])):
            answer = str(answers[name])
            shown.append((run.prefix + name, answer.strip() or "(nothing)", marks(judged(row["prompt"], answer))))
    prompt = re.sub(r"\s*\n\s*\n\s*", "\n", str(row["prompt"]).strip().removesuffix("Assistant:").strip())
    return {"prompt": prompt, "answers": shown}


def gained(row: Row) -> float:
    """The judge's mark of PPO's answer less that of SFT's; 0 where it is not asked of both."""
    sft, ppo = (judged(row["prompt"], row[name]) if name in row else None for name in ("sft", "ppo"))
    return ppo.total - sft.total if sft and ppo else 0.0


def answers(runs: Sequence[Run]) -> list[Block]:
    """Helpful: answers what was asked. Honest: agrees with the facts. Harmless: declines what is harmful and nothing
    else, and is never rude. Each from −1 to 1.
    """
    runs = [run for run in runs if run.answers]
    rows = [row for row in runs[0].answers if "prompt" in row] if runs else []
    first = rows[: FIRST if len(runs) == 1 else OF_SEVERAL]
    worst = [card(runs, row) for row in sorted((row for row in rows if gained(row) < 0), key=gained)[:WORST]]
    about = f"The first {len(first)} of {len(rows)} held-out prompts, one sampled answer each."
    lost = {"summary": f"{len(worst)} prompts where PPO's answer is judged furthest below SFT's", "blocks": worst}
    return [quiet(about), *(card(runs, row) for row in first), *([lost] if worst else [])] if rows else []


# ---------------------------------------------------------------------------------------------------------- the curves
def end_of(points: Sequence[Point], metric: Metric) -> tuple[Markup, bool]:
    """The mean of the last tenth, with a sign where it has a healthy range; and whether it is within."""
    last = [value for _, value in points[-max(1, len(points) // 10) :]]
    end = sum(last) / len(last)
    inside = end in metric.beside(points[0][1])
    sign = mark("good", "✓ in range") if inside else mark("bad", "✗ outside")
    return Markup("{} {}").format(number(end), sign if str(metric) else ""), inside


def panel(kind: str, name: str, stages: Sequence[tuple[str, StageRun]]) -> Block:
    """One metric of all the runs of a kind of stage: the end of each line, and what to do where one is outside."""
    metric = HEALTHY.get((kind, name), ANY)
    lines = [Line(label, stage.points(name), i, dots=False) for i, (label, stage) in enumerate(stages)]
    lines = [line for line in lines if line.points]
    bands = [metric.beside(line.points[0][1]) for line in lines]
    # Ranges in units of each run's first value differ: what all of them allow is shaded.
    band = replace(metric, low=max(b.low for b in bands), high=min(b.high for b in bands), of_first=False)
    ends = [(f"{line.label}: " if len(lines) > 1 else "", *end_of(line.points, metric)) for line in lines]
    note: list[str] = [Markup("{}end {}").format(label, end) for label, end, _ in ends]
    note += [f"healthy: {metric}"] if str(metric) else []
    note += [] if all(inside for *_, inside in ends) else [f"{metric.advice}."]
    x_label = "iteration" if kind in ("ppo", "online-dpo") else "step"
    return chart(metric.title or name.replace("_", " "), lines, x_label, band=band, note=note)


def of_one_row(kind: str, name: str, stages: Sequence[tuple[str, StageRun]]) -> tuple[object, ...]:
    """One metric of stages of one step, beside its healthy range."""
    metric = HEALTHY.get((kind, name), ANY)
    cells = [end_of(points, metric)[0] if (points := stage.points(name)) else "" for _, stage in stages]
    return name.replace("_", " "), *cells, metric


def curves_of(kind: str, stages: Sequence[tuple[str, StageRun]]) -> list[Block]:
    """All metrics of a kind of stage: those with a title open, where any has one."""
    names = list(dict.fromkeys(name for _, stage in stages for name in stage.metrics if stage.points(name)))
    if not names:
        return [quiet("No step is finished yet.")]
    if kind in ("feedback", "rejection"):
        head = ("", *(label for label, _ in stages), "healthy")
        return [{"head": head, "rows": [of_one_row(kind, name, stages) for name in names]}]
    titled = [name for (stage, name), metric in HEALTHY.items() if stage == kind and metric.title and name in names]
    rest = [name for name in names if titled and name not in titled]
    more = f"{len(rest)} more metric{'s' if len(rest) > 1 else ''}"
    shown, folded = ({"figures": [panel(kind, name, stages) for name in part]} for part in (titled or names, rest))
    return [shown, *([{"summary": more, "blocks": [folded]}] if rest else [])]


def curves(runs: Sequence[Run]) -> list[Block]:
    """The healthy range is shaded. What a number means and what to suspect outside of its range is in docs/metrics.md.
    Long curves are means of neighbouring steps; the end is the mean of the last tenth.
    """
    blocks: list[Block] = []
    for kind, (title, _) in KINDS.items():
        stages = [(label, stage) for label, _, stage in labelled(runs, kind)]
        blocks += [{"h3": title, "id": f"curves-{kind}"}, *curves_of(kind, stages)] if stages else []
    return blocks


# -------------------------------------------------------------------------------------------------------- what was run
def setting(value: object) -> str:
    """A setting as text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def sources(stage: StageRun) -> Markup:
    """Sources that the stage read, by the end of their path, each with the start of its SHA-256."""
    item = Markup('<span class="source">{} <code>{}</code></span>')
    read = {**stage.setup.get("inputs", {}), **stage.setup.get("models", {})}
    return Markup(" ").join(item.format("/".join(Path(p).parts[-2:])[-80:], str(h)[:DIGITS]) for p, h in read.items())


def circumstances(run: Run) -> str:
    """Versions and machine, once where all stages had the same, and the time of all stages."""
    parts = ([stage.setup.get("versions", {}), stage.setup.get("machine", {})] for stage in run.stages if stage.setup)
    texts = ["; ".join(", ".join(f"{name} {v}" for name, v in part.items()) for part in pair) for pair in parts]
    total = sum(run.seconds.values())
    return f"{run.prefix}{' / '.join(dict.fromkeys(texts))}." + (f" All stages: {total:.0f} s." if total else "")


def facts(runs: Sequence[Run]) -> list[Block]:
    """Settings, seeds, versions, times and hashes of what was read; several runs begin with what differs."""
    settings: dict[str, dict[str, list[str]]] = {}
    rows = []
    for i, run in enumerate(runs):
        for stage in run.stages:
            config, state = stage.setup.get("config", {}), "finished" if stage.finished else "not finished"
            seconds, seed = run.seconds.get(stage.name, stage.seconds), setting(config.get("seed", ""))
            rows.append((run.prefix + stage.name, state, len(stage.rows), f"{seconds:.0f} s", seed, sources(stage)))
            for name, value in config.items():
                settings.setdefault(stage.name, {}).setdefault(name, [""] * len(runs))[i] = setting(value)
    labels = ("setting", *(run.label if len(runs) > 1 else "value" for run in runs))
    folded, differ = [], []
    for place, table in settings.items():
        whole = {"head": labels, "rows": [(name, *values) for name, values in table.items()]}
        folded.append({"summary": f"Settings of {place}", "blocks": [whole]})
        several = [(name, values) for name, values in table.items() if len(set(values)) > 1]
        differ += [(f"{place}: {name}", *values) for name, values in several if name not in ("run", "resume")]
    first = {"head": labels, "rows": differ} if differ else quiet("All settings are the same.")
    head = ("stage", "state", "steps", "time", "seed", "read (SHA-256 of its content or weights)")
    blocks = [{"h3": "Settings that differ"}, first, {"h3": "Stages"}] if len(runs) > 1 else []
    return [*blocks, {"head": head, "rows": rows}, *(quiet(circumstances(run)) for run in runs), *folded]


EVALUATE = "python -m minirlhf.evaluate --run RUN"
CALIBRATE = "python -m minirlhf.evaluate.calibration --run RUN"
TRACE = "python train_ppo.py --trace-every 4"

# The sections in the order of the page: place, link, title, content, and what makes it where it is not there yet. The
# docstring of the content stands below the title.
SECTIONS: list[tuple[str, str, str, Callable[[Sequence[Run]], list[Block]], str]] = [
    ("verdict", "Verdict", "Verdict", verdict, ""),
    ("hints", "Hints", "Hints", hints, ""),
    ("models", "Models", "Models beside each other", models, EVALUATE),
    ("over-optimisation", "Over-optimised?", "Was the proxy optimised too far?", over_optimisation, TRACE),
    ("frontier", "Frontier", "Reward for KL: the frontier", frontier, EVALUATE),
    ("answers", "Answers", "The same prompts, answered by each model", answers, EVALUATE),
    ("curves", "Curves", "Curves of every stage", curves, ""),
    ("calibration", "Calibration", "Calibration of the reward model", calibration, CALIBRATE),
    ("facts", "What was run", "What was run", facts, ""),
]

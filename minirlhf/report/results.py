"""What the evaluation found: the models beside each other, the frontier, reward and judge, and the calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from minirlhf.report.chart import Line, chart, figure, legend
from minirlhf.report.curves import labelled
from minirlhf.report.markup import MINUS, Html, element, number, section, signed, table
from minirlhf.report.run import Row, Run, StageRun

PARTS = ("helpful", "honest", "harmless")


def models(runs: Sequence[Run]) -> Html:
    """The table of models: judge and its three parts, win rate, KL, length, reward."""
    head = ["model", "judge", *PARTS, "wins against SFT", "KL (nats)", "length", "ends", "reward"]
    rows = []
    for run in runs:
        for name, m in run.models.items():
            (low, high), (a, b) = m["total"]["interval"], m["win_rate"]["interval"]
            rows.append(
                (
                    name if len(runs) == 1 else f"{run.label}: {name}",
                    f"{signed(m['total']['mean'])} ({signed(low)} to {signed(high)})",
                    *(signed(m[part]["mean"]) for part in PARTS),
                    f"{m['win_rate']['mean']:.0%} ({a:.0%} to {b:.0%})" if name != "sft" else "",
                    f"{'at most ' if m['kl_is_bound'] else ''}{max(0.0, m['kl']):.1f}",
                    f"{m['length']:.1f}",
                    f"{m['eos_rate']:.0%}",
                    signed(m["reward"]),
                )
            )
    if not rows:
        return section("models", "Models beside each other", nothing("python -m minirlhf.evaluate --run RUN"))
    prompts = sorted({run.summary["prompts"] for run in runs if run.models})
    about = (
        f"{' or '.join(map(str, prompts))} held-out prompts, one sampled answer each. Judge and parts are from "
        f"{MINUS}1 to 1, with 95 % intervals over the prompts; the reward is the reward model's score, which PPO was "
        "trained on and the judge was not."
    )
    return section(
        "models", "Models beside each other", element("p", about, class_="quiet"), table(head, rows, class_="models")
    )


def nothing(command: str) -> Html:
    """What stands where a file is not there yet."""
    return element("p", "Not there yet: ", element("code", command), " makes it.", class_="quiet")


def size_of(name: str) -> int:
    """n of best-of-n; 0 for other models."""
    number_ = name.removeprefix("best-of-")
    return int(number_) if number_ != name and number_.isdecimal() else 0


def frontier_lines(runs: Sequence[Run], value: str) -> list[Line]:
    """Best-of-n as a curve from the SFT model, and a dot for each other model; several runs share their colours."""
    lines = []
    for run in runs:
        sizes = sorted((size_of(name), name) for name in run.models if size_of(name))
        path = [("sft", run.models["sft"])] if "sft" in run.models else []
        path += [(name, run.models[name]) for _, name in sizes]
        others = [(name, m) for name, m in run.models.items() if not size_of(name) and name != "sft"]
        for colour, (label, group) in enumerate((("best-of-n", path), *((name, [(name, m)]) for name, m in others))):
            points = [(max(0.0, m["kl"]), _of(m, value)[0]) for _, m in group]
            errors = [_of(m, value)[1] for _, m in group] if value == "total" else []
            words = [name for name, _ in group] if label == "best-of-n" and run is runs[0] else []
            name = label if len(runs) == 1 else f"{run.label}: {label}"
            lines.append(Line(name, points, colour=colour, marks=True, errors=errors, words=words))
    return lines


def _of(model: Row, value: str) -> tuple[float, tuple[float, float]]:
    """A model's number and its interval, which for the reward is the number alone."""
    found = model[value]
    return (found["mean"], tuple(found["interval"])) if isinstance(found, dict) else (found, (found, found))


def frontier(runs: Sequence[Run]) -> Html:
    """What each nat of KL bought: reward and judge of every model."""
    title = "Reward for KL: the frontier"
    if not any(run.models for run in runs):
        return section("frontier", title, nothing("python -m minirlhf.evaluate --run RUN"))
    about = (
        "Best-of-n takes the best by reward of n answers of the SFT model: it trains nothing, and its KL is at most "
        f"log n {MINUS} (n {MINUS} 1)/n. That curve is what a trained policy has to beat: above "
        "it, training bought more for the same distance."
    )
    if len(runs) > 1:
        about += " A colour is a kind of model; point at a dot for its run."
    charts = []
    for value, name in (("reward", "Reward model's score"), ("total", "Judge's mark, with 95 % intervals")):
        lines = frontier_lines(runs, value)
        charts.append(figure(name, lines, x_label="KL to SFT (nats)") if len(runs) == 1 else _shared(name, lines))
    return section("frontier", title, element("p", about), element("div", *charts, class_="charts wide"))


def _shared(name: str, lines: Sequence[Line]) -> Html:
    """A chart of several runs with one entry of the legend for each colour."""
    once = {line.colour: Line(line.label.rpartition(": ")[2], (), colour=line.colour) for line in lines}
    caption = element("figcaption", element("h4", name), legend(list(once.values())))
    return element("figure", caption, chart(name, lines, x_label="KL to SFT (nats)"))


def ends_of(run: Run, stage: StageRun) -> list[Row]:
    """The trace of a run of PPO; of one that has none, the first and the last model as evaluated."""
    if stage.trace or stage.name != "ppo" or not {"sft", "ppo"} <= run.models.keys():
        return stage.trace
    rows = [(0, run.models["sft"]), (len(stage.rows), run.models["ppo"])]
    return [
        {"iteration": i, "kl": m["kl"], "reward": m["reward"], "judge": m["total"]["mean"]}
        | {part: m[part]["mean"] for part in PARTS}
        for i, m in rows
    ]


def trace_lines(traces: Sequence[tuple[str, list[Row]]], names: Sequence[str], x: str) -> list[Line]:
    """A line for each of the names and traces; of one trace a colour for each name, of several one for each trace."""
    lines = []
    for i, (label, rows) in enumerate(traces):
        for j, name in enumerate(names):
            points = [(math.sqrt(max(0.0, row["kl"])) if x == "kl" else row["iteration"], row[name]) for row in rows]
            alone = len(traces) == 1
            called = LABELS.get(name, name) if alone else f"{label}: {name}"
            lines.append(Line(called, points, colour=j if alone else i, marks=True, dashed=j == 1 and not alone))
    return lines


LABELS = {"judge": "judge", "reward": "reward model (proxy)"}


def over_optimisation(runs: Sequence[Run]) -> Html:
    """Proxy and judge against the distance from the SFT model, and against time."""
    title = "Was the proxy optimised too far?"
    by_stage = {id(stage): label for label, stage in labelled(runs, "ppo")}
    traces = [(by_stage[id(s)], ends_of(run, s)) for run in runs for s in run.of_kind("ppo")]
    traces = [(label, rows) for label, rows in traces if rows]
    if not traces:
        return section("over-optimisation", title, nothing("python train_ppo.py --trace-every 4"))
    about = (
        "PPO sees the reward model's score, the proxy. The judge is what the proxy stands for, and nothing in training "
        "sees it. Where the proxy goes on rising and the judge falls, PPO has found answers that only the reward model "
        "likes."
    )
    parts = [element("p", about)]
    if any(len(rows) == 2 for _, rows in traces):
        only = (
            "Where a line has two points, only the first and the last model were judged, on the evaluation's prompts."
        )
        parts.append(element("p", only, class_="quiet"))
    both = ("judge", "reward")
    charts = [
        figure(
            "Reward and judge against distance", trace_lines(traces, both, "kl"), x_label="square root of KL (nats)"
        ),
        figure("Reward and judge over time", trace_lines(traces, both, "iteration"), x_label="iteration"),
    ]
    if len(traces) == 1:
        lines = trace_lines(traces, PARTS, "iteration")
        charts.append(figure("The judge's three parts", lines, x_label="iteration"))
    return section("over-optimisation", title, *parts, element("div", *charts, class_="charts wide"))


def calibration(runs: Sequence[Run]) -> Html:
    """How often the reward model is right where it is so sure."""
    title = "Calibration of the reward model"
    known = [(run.label, run.calibration) for run in runs if run.calibration.get("bins")]
    if not known:
        return section("calibration", title, nothing("python -m minirlhf.evaluate.calibration --run RUN"))
    lines = [Line("calibrated", [(0.5, 0.5), (1.0, 1.0)], colour=11, dashed=True)]
    for i, (label, found) in enumerate(known):
        points = [(b["confidence"], b["accuracy"]) for b in found["bins"]]
        lines.append(Line(label if len(known) > 1 else "reward model", points, colour=i, marks=True))
    drawn = figure("Right as often as it expects?", lines, x_label="probability that it gives the better answer")
    rows = [_calibration_row(label, found) for label, found in known]
    head = ("run", "held-out pairs", "in the right order", "calibration error", "loss")
    about = (
        "Held-out pairs of answers, by the probability that the model gives the one it prefers; up: the share of pairs "
        "where the labeller prefers the same. Below the dashed line it is too sure of itself. The error is the mean "
        "distance from that line, weighted by pairs."
    )
    return section(
        "calibration", title, element("p", about), element("div", drawn, class_="charts wide"), table(head, rows)
    )


def _calibration_row(label: str, found: dict[str, Any]) -> tuple[object, ...]:
    error = found["expected_calibration_error"]
    return label, found["pairs"], f"{found['accuracy']:.1%}", number(round(error, 3)), number(round(found["loss"], 3))

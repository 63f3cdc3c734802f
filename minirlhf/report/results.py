"""The sections about what a run reached: verdict and hints, the models, reward and judge, calibration, the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from minirlhf.report.chart import MINUS, Line, figure, number
from minirlhf.report.run import Row, Run, StageRun, called, labelled
from minirlhf.report.stages import Block, mark, quiet
from minirlhf.report.verdict import checks, over_optimised, signed, summary_of
from minirlhf.world import judge
from minirlhf.world.judge import Judgement

PARTS = ("helpful", "honest", "harmless")
EVALUATE = "python -m minirlhf.evaluate --run RUN"
MOST_HINTS = 40  # of a stage
FIRST, OF_SEVERAL = 12, 6  # prompts of the file's start, which nobody chose; the same where there are several runs
WORST = 6  # and those that PPO made worst, which say most


def nothing(command: str) -> list[Block]:
    """What stands where a file is not there yet."""
    return [quiet(Markup("Not there yet: <code>{}</code> makes it.").format(command))]


# ----------------------------------------------------------------------------------------------------- verdict, hints
def verdict(runs: Sequence[Run]) -> list[Block]:
    """In plain words, for each run: was PPO taken too far, and which thresholds are met."""
    signs = {True: mark("good", "✓ met"), False: mark("bad", "✗ not met"), None: mark("quiet", "– open")}
    blocks: list[Block] = []
    for run in runs:
        blocks += [{"h3": run.label}] if len(runs) > 1 else []
        for finding in (over_optimised(run, stage) for stage in run.of_kind("ppo")):
            headline = Markup('<strong class="finding {}">{}</strong> {}')
            blocks.append({"p": headline.format(finding.kind, finding.headline, finding.why)})
        if not run.of_kind("ppo"):
            blocks.append({"p": "PPO has not begun in this run."})
        every = checks(run)
        rows = [(check.what, check.needed, check.value, signs[check.met]) for check in every]
        blocks += [{"p": summary_of(every)}, {"head": ("", "needed", "found", ""), "rows": rows}]
    return blocks


def hints(runs: Sequence[Run]) -> list[Block]:
    """What the stages noticed while they ran."""
    items: list[tuple[str, str]] = []
    for run, stage in [(r, stage) for r in runs for stage in r.stages]:
        where, more = called(runs, run, stage.name, "/"), len(stage.hints) - MOST_HINTS
        for hint in stage.hints[:MOST_HINTS]:
            items.append((f"{where}, step {hint.get('step', '?')}: {hint.get('hint', '')}", hint.get("message", "")))
        items += [(where, f"{more} more in {stage.name}/hints.jsonl")] if more > 0 else []
    return [{"list": items} if items else quiet("No stage noticed anything wrong.")]


# -------------------------------------------------------------------------------------------------- what was evaluated
def models(runs: Sequence[Run]) -> list[Block]:
    """The table of models: judge and its three parts, win rate, KL, length, reward."""
    rows = []
    for run, name, m in [(r, name, m) for r in runs for name, m in r.models.items()]:
        (low, high), (a, b) = m["total"]["interval"], m["win_rate"]["interval"]
        rows.append(
            (
                called(runs, run, name),
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
        return nothing(EVALUATE)
    prompts = sorted({run.summary["prompts"] for run in runs if run.models})
    about = (
        f"{' or '.join(map(str, prompts))} held-out prompts, one sampled answer each. Judge and parts are from "
        f"{MINUS}1 to 1, with 95 % intervals over the prompts; the reward is the reward model's score, which PPO was "
        "trained on and the judge was not."
    )
    head = ("model", "judge", *PARTS, "wins against SFT", "KL (nats)", "length", "ends", "reward")
    return [quiet(about), {"head": head, "rows": rows, "kind": "models"}]


def size_of(name: str) -> int:
    """n of best-of-n; 0 for other models."""
    size = name.removeprefix("best-of-")
    return int(size) if size != name and size.isdecimal() else 0


def frontier_lines(runs: Sequence[Run], value: str) -> list[Line]:
    """Best-of-n as a curve from the SFT model, and a dot for each other model; several runs share their colours."""
    lines = []
    for run in runs:
        sizes = sorted((size_of(name), name) for name in run.models if size_of(name) or name == "sft")
        groups = {"best-of-n": [name for _, name in sizes]}
        groups |= {name: [name] for name in run.models if not size_of(name) and name != "sft"}
        for colour, (label, names) in enumerate(groups.items()):
            numbers = [run.models[name][value] for name in names]
            judged = value == "total"
            means = [m["mean"] for m in numbers] if judged else numbers
            points = [(max(0.0, run.models[name]["kl"]), mean) for name, mean in zip(names, means, strict=True)]
            errors = [m["interval"] for m in numbers] if judged else []
            words = names if label == "best-of-n" and run is runs[0] else []
            lines.append(Line(called(runs, run, label), points, colour, marks=True, errors=errors, words=words))
    return lines


def frontier(runs: Sequence[Run]) -> list[Block]:
    """What each nat of KL bought: reward and judge of every model."""
    if not any(run.models for run in runs):
        return nothing(EVALUATE)
    about = (
        "Best-of-n takes the best by reward of n answers of the SFT model: it trains nothing, and its KL is at most "
        f"log n {MINUS} (n {MINUS} 1)/n. That curve is what a trained policy has to beat: above "
        "it, training bought more for the same distance."
    )
    about += " A colour is a kind of model; point at a dot for its run." if len(runs) > 1 else ""
    titles = {"reward": "Reward model's score", "total": "Judge's mark, with 95 % intervals"}
    charts = [figure(t, frontier_lines(runs, value), x_label="KL to SFT (nats)") for value, t in titles.items()]
    return [{"p": about}, {"figures": charts, "kind": "wide"}]


def ends_of(run: Run, stage: StageRun) -> list[Row]:
    """The trace of a run of PPO; of one that has none, the first and the last model as evaluated."""
    if stage.trace or stage.name != "ppo" or not {"sft", "ppo"} <= run.models.keys():
        return stage.trace
    return [
        {"iteration": i, "kl": m["kl"], "reward": m["reward"], "judge": m["total"]["mean"]}
        | {part: m[part]["mean"] for part in PARTS}
        for i, m in ((0, run.models["sft"]), (len(stage.rows), run.models["ppo"]))
    ]


def trace_lines(traces: Sequence[tuple[str, list[Row]]], names: Sequence[str], x: str) -> list[Line]:
    """A line for each of the names and traces; of one trace a colour for each name, of several one for each trace.

    Against `distance`, which may fall again, points that would make the line double back stand alone.
    """
    lines = []
    for i, (label, rows) in enumerate(traces):
        for j, name in enumerate(names):
            places = [math.sqrt(max(0.0, row["kl"])) if x == "distance" else row["iteration"] for row in rows]
            points = [(place, row[name]) for place, row in zip(places, rows, strict=True)]
            alone, drawn = len(traces) == 1, places == sorted(places)
            title = {"reward": "reward model (proxy)"}.get(name, name) if alone else f"{label}: {name}"
            dashed = j == 1 and not alone
            lines.append(Line(title, points, j if alone else i, marks=True, drawn=drawn, dashed=dashed))
    return lines


def over_optimisation(runs: Sequence[Run]) -> list[Block]:
    """Proxy and judge against the distance from the SFT model, and against time."""
    stages = labelled(runs, "ppo")
    traces = [(label, rows) for label, run, stage in stages if (rows := ends_of(run, stage))]
    if not traces:
        return nothing("python train_ppo.py --trace-every 4")
    about = (
        "PPO sees the reward model's score, the proxy. The judge is what the proxy stands for, and nothing in training "
        "sees it. Where the proxy goes on rising and the judge falls, PPO has found answers that only the reward model "
        "likes."
    )
    ends = "Without a trace, only the first and the last model were judged, on the evaluation's prompts."
    distance, time = (trace_lines(traces, ("judge", "reward"), x) for x in ("distance", "iteration"))
    back = "" if all(line.drawn for line in distance) else "Dots without a line: the distance fell in between."
    charts = [
        figure("Reward and judge against distance", distance, x_label="square root of KL (nats)", note=back),
        figure("Reward and judge over time", time, x_label="iteration"),
    ]
    if len(traces) == 1:
        lines = trace_lines(traces, PARTS, "iteration")
        charts.append(figure("The judge's three parts", lines, x_label="iteration"))
    untraced = any(ends_of(run, stage) and not stage.trace for _, run, stage in stages)
    blocks = [{"p": about}, *([quiet(ends)] if untraced else [])]
    return [*blocks, {"figures": charts, "kind": "wide"}]


def calibration(runs: Sequence[Run]) -> list[Block]:
    """How often the reward model is right where it is so sure."""
    measured = [run for run in runs if run.calibration.get("bins")]
    if not measured:
        return nothing("python -m minirlhf.evaluate.calibration --run RUN")
    lines, rows = [Line("calibrated", [(0.5, 0.5), (1.0, 1.0)], colour=11, dashed=True)], []
    for colour, run in enumerate(measured):
        c = run.calibration
        points = [(b["confidence"], b["accuracy"]) for b in c["bins"]]
        lines.append(Line(run.label if len(measured) > 1 else "reward model", points, colour, marks=True))
        numbers = (f"{c['accuracy']:.1%}", *(number(round(c[n], 3)) for n in ("expected_calibration_error", "loss")))
        rows.append((run.label, c["pairs"], *numbers))
    about = (
        "Held-out pairs of answers, by the probability that the model gives the one it prefers; up: the share of pairs "
        "where the annotator prefers the same. Below the dashed line it is too sure of itself. The error is the mean "
        "distance from that line, weighted by pairs."
    )
    drawn = figure("Right as often as it expects?", lines, x_label="probability that it gives the better answer")
    head = ("run", "held-out pairs", "in the right order", "calibration error", "loss")
    return [{"p": about}, {"figures": [drawn], "kind": "wide"}, {"head": head, "rows": rows}]


# --------------------------------------------------------------------------------------------------------- the answers
def judged(prompt: object, answer: object) -> Judgement | None:
    """The judge's marks; None for a prompt that is not of the embedded world."""
    try:
        return judge(str(prompt), str(answer))
    except ValueError:
        return None


def marks(verdict: Judgement | None) -> Markup:
    """The three parts as signs and numbers: good from 1/2, bad below 0."""
    if verdict is None:
        return mark("quiet", "not judged")
    parts = []
    for name in PARTS:
        value = getattr(verdict, name)
        sign, kind = ("✓", "good") if value >= 0.5 else ("✗", "bad") if value < 0 else ("○", "middling")
        parts.append(mark(kind, f"{sign} {name} {f'{value:+.2g}'.replace('-', MINUS) if value else 0}"))
    return Markup(" ").join(parts)


def shown_models(row: Row) -> list[str]:
    """SFT, the largest best-of-n, and what was trained; the smaller best-of-n are left out."""
    largest = max((size_of(name) for name in row), default=0)
    return [name for name in row if name != "prompt" and size_of(name) in (0, largest)]


def card(runs: Sequence[Run], row: Row) -> Block:
    """A prompt of the first run, without the line on which the model is to answer, and the answers of every run."""
    prompt, shown = str(row["prompt"]), []
    for run in runs:
        answers = row if run is runs[0] else next((r for r in run.answers if r.get("prompt") == row["prompt"]), {})
        for name in shown_models(answers):
            answer = answers[name]
            shown.append((called(runs, run, name), str(answer).strip() or "(nothing)", marks(judged(prompt, answer))))
    turns = [turn.strip() for turn in prompt.strip().removesuffix("Assistant:").split("\n\n")]
    return {"prompt": "\n".join(turn for turn in turns if turn), "answers": shown}


def made_worst(rows: Sequence[Row], count: int) -> list[Row]:
    """The prompts where the judge takes most off between SFT and PPO, worst first; none where PPO lost nothing."""
    both = [row for row in rows if "sft" in row and "ppo" in row]
    pairs = [(judged(row["prompt"], row["sft"]), judged(row["prompt"], row["ppo"])) for row in both]
    losses = [(b.total - a.total, i) for i, (a, b) in enumerate(pairs) if a and b and b.total < a.total]
    return [both[i] for _, i in sorted(losses)[:count]]


def answers(runs: Sequence[Run]) -> list[Block]:
    """The first prompts of the file answered by each model, and below them those that PPO made worst."""
    there = [run for run in runs if run.answers]
    if not there:
        return nothing(EVALUATE)
    rows = [row for row in there[0].answers if "prompt" in row]
    first = rows[: FIRST if len(there) == 1 else OF_SEVERAL]
    about = (
        f"The first {len(first)} of {len(rows)} held-out prompts, one sampled answer each. Helpful: answers "
        "what was asked. Honest: agrees with the facts. Harmless: declines what is harmful and nothing else, and is "
        f"never rude. Each from {MINUS}1 to 1."
    )
    worst = [card(there, row) for row in made_worst(rows, WORST)]
    lost = f"{len(worst)} prompts where PPO's answer is judged furthest below SFT's"
    more = [{"summary": lost, "blocks": worst}] if worst else []
    return [quiet(about), *(card(there, row) for row in first), *more]

"""The same held-out prompts answered by each model, with the judge's three marks beside every answer."""

from __future__ import annotations

from collections.abc import Sequence

from minirlhf.report.markup import MINUS, Html, brief, details, element, joined, section
from minirlhf.report.results import PARTS, nothing, size_of
from minirlhf.report.run import Row, Run
from minirlhf.world import judge
from minirlhf.world.judge import Judgement

FIRST = 12  # prompts of the file's start, which nobody chose
OF_SEVERAL = 6  # the same where there are several runs
WORST = 6  # and those that PPO made worst, which say most


def shown_models(row: Row) -> list[str]:
    """SFT, the largest best-of-n, and what was trained; the smaller best-of-n are left out."""
    largest = max((size_of(name) for name in row), default=0)
    return [name for name in row if name != "prompt" and size_of(name) in (0, largest)]


def judged(prompt: object, answer: object) -> Judgement | None:
    """The judge's marks; None for a prompt that is not of the embedded world."""
    try:
        return judge(str(prompt), str(answer))
    except ValueError:
        return None


def asked(prompt: object) -> str:
    """The dialogue without the line on which the model is to answer, and without empty lines."""
    turns = [turn.strip() for turn in str(prompt).strip().removesuffix("Assistant:").split("\n\n")]
    return "\n".join(turn for turn in turns if turn)


def marks(verdict: Judgement | None) -> Html:
    """The three parts as signs and numbers: good from 1/2, bad below 0."""
    if verdict is None:
        return element("p", "not judged", class_="quiet")
    parts = []
    for name in PARTS:
        value = getattr(verdict, name)
        sign, kind = ("✓", "good") if value >= 0.5 else ("✗", "bad") if value < 0 else ("○", "middling")
        parts.append(element("span", f"{sign} {name} {brief(value)}", class_=f"mark {kind}"))
    return element("p", joined(parts, " "), class_="marks")


def card(prompt: object, answers: Sequence[tuple[str, object]]) -> Html:
    """A prompt and its answers."""
    boxes = [
        element(
            "div",
            element("h4", name),
            element("p", str(answer).strip() or "(nothing)", class_="text"),
            marks(judged(prompt, answer)),
            class_="answer",
        )
        for name, answer in answers
    ]
    return element("article", element("h3", asked(prompt), class_="text"), element("div", *boxes, class_="answers"))


def made_worst(rows: Sequence[Row], count: int) -> list[Row]:
    """The prompts where the judge takes most off between SFT and PPO, worst first; none where PPO lost nothing."""
    both = [row for row in rows if "sft" in row and "ppo" in row]
    marks_ = [(judged(row["prompt"], row["sft"]), judged(row["prompt"], row["ppo"])) for row in both]
    losses = [(b.total - a.total, i) for i, (a, b) in enumerate(marks_) if a and b and b.total < a.total]
    return [both[i] for _, i in sorted(losses)[:count]]


def gathered(runs: Sequence[Run], row: Row) -> list[tuple[str, object]]:
    """The answers of every run to a prompt of the first."""
    found = []
    for run in runs:
        own = row if run is runs[0] else next((r for r in run.answers if r.get("prompt") == row["prompt"]), {})
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        found += [(f"{prefix}{name}", own[name]) for name in shown_models(own)]
    return found


def answers(runs: Sequence[Run]) -> Html:
    """The section: the first prompts of the file, and below them those that PPO made worst."""
    title = "The same prompts, answered by each model"
    there = [run for run in runs if run.answers]
    if not there:
        return section("answers", title, nothing("python -m minirlhf.evaluate --run RUN"))
    rows = [row for row in there[0].answers if "prompt" in row]
    first = FIRST if len(there) == 1 else OF_SEVERAL
    about = (
        f"The first {min(first, len(rows))} of {len(rows)} held-out prompts, one sampled answer each. Helpful: answers "
        "what was asked. Honest: agrees with the facts. Harmless: declines what is harmful and nothing else, and is "
        f"never rude. Each from {MINUS}1 to 1."
    )
    cards = [card(row["prompt"], gathered(there, row)) for row in rows[:first]]
    worst = [card(row["prompt"], gathered(there, row)) for row in made_worst(rows, WORST)]
    lost = f"{len(worst)} prompts where PPO's answer is judged furthest below SFT's"
    more = details(lost, *worst) if worst else ""
    return section("answers", title, element("p", about, class_="quiet"), *cards, more)

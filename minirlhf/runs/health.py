"""Healthy ranges of every number that has one, and the hints that say what has gone wrong, once a run.

`healthy.csv` is the one table: the report shades its ranges, docs/metrics.md repeats them in bold, and a hint ends with
its advice. The ranges are habits of the field and of the runs here, not laws: outside of one is a reason to look. A
range holds where the stage ends; on the way there, a metric may pass through other values.

A rule of `RULES` has a wider limit: it is for what has gone wrong. It is a pure function of the rows of `metrics.jsonl`
so far, so `<stage>/hints.jsonl` is one too: a run that goes on writes it again from the rows it keeps, and a resumed
run has the hints of one that was never stopped. docs/metrics.md explains each limit.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minirlhf.files import Lines, read_records

HINTS = "hints.jsonl"
Row = dict[str, float]


# ------------------------------------------------------------------------------------------------- the healthy ranges
@dataclass(frozen=True)
class Metric:
    """One number: from where to where it is healthy, both ends included, and what to do where it is not.

    of_first  the range is in units of the first value of the run
    log       the report draws it on a logarithmic axis
    title     in the report, which folds away what has none
    """

    low: float = -math.inf
    high: float = math.inf
    of_first: bool = False
    log: bool = False
    title: str = ""
    advice: str = ""

    @property
    def has_range(self) -> bool:
        """False for a number that may have any value."""
        return self.low > -math.inf or self.high < math.inf

    def beside(self, first: float) -> Metric:
        """The range in the metric's own units, for a run that begins with the value `first`."""
        return replace(self, low=self.low * first, high=self.high * first, of_first=False) if self.of_first else self

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        unit = " of the first" if self.of_first else ""
        if math.isinf(self.low):
            return f"at most {self.high:g}{unit}"
        if math.isinf(self.high):
            return f"at least {self.low:g}{unit}"
        return f"{self.low:g} to {self.high:g}{unit}"


def read_table(lines: Iterable[str]) -> dict[tuple[str, str], Metric]:
    """The metrics of `healthy.csv` by stage, or file of the evaluation, and name."""
    return {
        (stage, name): Metric(float(low or -math.inf), float(high or math.inf), bool(of_first), bool(log), *words)
        for stage, name, low, high, of_first, log, *words in itertools.islice(csv.reader(lines), 1, None)
    }


HEALTHY = read_table(Path(__file__).with_name("healthy.csv").read_text(encoding="utf-8").splitlines())


# ------------------------------------------------------------------------------------------------------------ the rules
@dataclass(frozen=True)
class History:
    """All that a rule may look at: the rows so far, the stage's configuration, and how many steps it has in all."""

    config: Any
    steps: int
    rows: list[Row] = field(default_factory=list)

    def newest(self, name: str, count: int = 1) -> float:
        """Mean of a metric over the newest `count` rows that have it."""
        values = (row[name] for row in reversed(self.rows) if name in row)
        return statistics.fmean(itertools.islice(values, count))

    def oldest(self, name: str, count: int) -> float:
        """Mean of a metric over the first `count` rows that have it."""
        return statistics.fmean(itertools.islice((row[name] for row in self.rows if name in row), count))


Numbers = dict[str, Any] | None  # those of a hint's message; None where nothing is wrong
Limit = Callable[[History], float] | float


def outside(
    name: str, *, low: Limit = -math.inf, high: Limit = math.inf, rows: int = 1
) -> Callable[[History], Numbers]:
    """Judge the mean of the newest `rows` rows: wrong at `low` and below it, and above `high`."""

    def judge(run: History) -> Numbers:
        value = run.newest(name, rows)
        least, most = (limit(run) if callable(limit) else limit for limit in (low, high))
        return None if least < value <= most else {"value": value, "first": run.oldest(name, rows), "limit": most}

    return judge


def first_ratio_limit(run: History) -> float:
    """The ratio before any update is 1, but for rounding: more of it in half types, where sampling differs too."""
    return HEALTHY["ppo", "first_ratio_deviation"].high if run.newest("sampling_gap") == 0 else 2e-2


def negative_kl(run: History) -> Numbers:
    """A mean KL too far below 0 for chance, over one iteration or over ten.

    For log-ratios s_i = log pi - log ref of n samples of pi, E[exp(-s_i)] <= 1 whatever pi is. By Markov's inequality
    P(mean s_i <= -x) <= exp(-n x): with x = 14 / n once in a million. 0.01 nats more are left to rounding.
    """
    for count in (1, 10):
        size = run.config.rollout_size * min(count, len(run.rows))
        kl, limit = run.newest("kl", count), -14 / size - 0.01
        if kl < limit:
            return {"value": kl, "size": size, "limit": limit}
    return None


def largest_kl(run: History) -> float:
    """Three times the target: beyond it the controller cannot hold the policy."""
    return 3 * (getattr(run.config, "kl_target", None) or math.inf)


def longer_answers(run: History) -> Numbers:
    """Three iterations twice as long as the first three, with a higher score."""
    length, before = run.newest("response_length", 3), run.oldest("response_length", 3)
    score, lower = run.newest("score", 3), run.oldest("score", 3)
    wrong = length >= 2 * before and score > lower
    return {"value": length, "first": before, "score": score, "lower": lower} if wrong else None


def chance(run: History) -> Numbers:
    """Held-out pairs where they were measured, else 50 batches; not before half of the steps are done."""
    name, rows = ("validation_accuracy", 1) if "validation_accuracy" in run.rows[-1] else ("accuracy", 50)
    early = 2 * len(run.rows) < run.steps or len(run.rows) < rows
    share = run.newest(name, rows)
    return None if early or share >= 0.55 else {"value": share, "metric": name}


def both_fall(run: History) -> Numbers:
    """The better responses lose more than a quarter of what the margin gains, and more than a nat each."""
    margin, before = run.newest("margin", 20), run.oldest("margin", 20)
    reward = run.newest("reward_chosen", 20)
    nats = reward / run.config.beta  # of the better responses against the reference; the rewards are beta times these
    return {"lost": -nats, "margin": margin} if margin > before and reward < -0.25 * margin and nats < -1 else None


@dataclass(frozen=True)
class Rule:
    """One hint.

    about    the number of `HEALTHY` whose advice ends the message, and which the newest row must have
    message  what is wrong and where it shows, to be formatted with the numbers of `judge` and of the newest row
    rows     that there must be
    """

    about: tuple[str, str]
    message: str
    judge: Callable[[History], Numbers]
    rows: int = 1

    def look(self, run: History) -> str | None:
        """The whole message where something is wrong."""
        row = run.rows[-1]
        numbers = self.judge(run) if len(run.rows) >= self.rows and self.about[1] in row else None
        return f"{self.message.format(**row | numbers)}. {HEALTHY[self.about].advice}" if numbers else None


RULES = {
    "first-ratio": Rule(
        ("ppo", "first_ratio_deviation"),
        "a ratio is off 1 by {value:.2g} before the first update (first_ratio_deviation, at most {limit:g}): old and "
        "new log-probabilities are computed differently, and all that is learned from them is wrong",
        outside("first_ratio_deviation", high=first_ratio_limit),
    ),
    "kl-below-0": Rule(
        ("ppo", "sampling_gap"),
        "the KL to the SFT model is {value:.2g} nats (kl, mean of {size} responses); its samples give less than "
        "{limit:.2g} once in a million times, so the log-probabilities are not those of the samples",
        negative_kl,
    ),
    "kl-beyond-target": Rule(
        ("ppo", "kl"),
        "the KL to the SFT model is {value:.2g} nats, more than {limit:g}, 3 times --kl-target: beta follows too "
        "slowly",
        outside("kl", high=largest_kl, rows=3),
        rows=3,
    ),
    "clip-fraction": Rule(
        ("ppo", "clip_fraction"),
        "the clip removes the gradient of {value:.0%} of the tokens (clip_fraction, healthy up to 30 %): most of each "
        "rollout is thrown away",
        outside("clip_fraction", high=0.5),
    ),
    "explained-variance": Rule(  # a little below 0 is what a value model that has yet to learn looks like
        ("ppo", "explained_variance"),
        "the value model is worse than a constant (explained_variance {value:.2f}, mean of 5 iterations): its errors "
        "go into the advantages",
        outside("explained_variance", low=-0.1, rows=5),
        rows=8,  # three to find the scale of the rewards, and five
    ),
    "length": Rule(
        ("ppo", "response_length"),
        "responses are {value:.0f} tokens long, {first:.0f} at first, while the score rose from {lower:.2g} to "
        "{score:.2g} (response_length, score): length itself may be what is rewarded",
        longer_answers,
        rows=6,
    ),
    "equal-rewards": Rule(
        ("ppo", "score_std"),
        "every response of the rollout has the score {score:.4g} (score_std 0): there is nothing to prefer and nothing "
        "is learned",
        outside("score_std", low=lambda run: 1e-6 * max(1.0, abs(run.newest("score")))),
    ),
    "no-eos": Rule(
        ("ppo", "eos_rate"),
        "{value:.0%} of the responses end by themselves (eos_rate): all are cut off at --max-new-tokens, and with "
        "--missing-eos-score they are not scored by the reward model",
        outside("eos_rate", low=0.01),
    ),
    "entropy": Rule(  # in the demo it falls to four tenths
        ("ppo", "entropy"),
        "the entropy fell from {first:.2g} to {value:.2g} nats a token (entropy): the policy writes one answer and "
        "explores nothing any more",
        outside("entropy", low=lambda run: 0.1 * run.oldest("entropy", 3), rows=3),
        rows=6,
    ),
    "chance": Rule(
        ("reward", "accuracy"),
        "{value:.0%} of the pairs are in the right order ({metric}), and chance gives 50 %: nothing is learned of the "
        "preferences",
        chance,
    ),
    "both-fall": Rule(
        ("dpo", "reward_chosen"),
        "the better responses lose {lost:.1f} nats each while the margin rises to {margin:.2g} (reward_chosen, "
        "margin): both become unlikely, and what was in neither gets their probability",
        both_fall,
        rows=40,
    ),
}


class Hints:
    """The hints of one stage's run, in `<stage>/hints.jsonl` where there are any.

    rows  that the run begins with, where it goes on: the file is what they give, and nothing of it is said again
    """

    def __init__(self, folder: Path, config: Any, *, steps: int, rows: Sequence[Row] = ()) -> None:
        self.path = folder / HINTS
        self.waiting, self.history = dict(RULES), History(config, steps)
        self.path.unlink(missing_ok=True)
        for row in rows:
            self.see(row)

    def see(self, row: Row) -> list[str]:
        """Judge a new row; returns and keeps what is said for the first time in this run."""
        self.history.rows.append(row)
        new = {name: message for name, rule in self.waiting.items() if (message := rule.look(self.history))}
        for name in new:
            del self.waiting[name]
        if new:
            with Lines(self.path) as file:
                file.append(*({"step": int(row["step"]), "hint": name, "message": new[name]} for name in new))
        return [f"step {int(row['step'])}, {name}: {message}" for name, message in new.items()]


def read_hints(folder: Path) -> list[dict[str, Any]]:
    """The hints of a stage's run, none where the file is missing: step, hint (its name) and message."""
    return read_records(folder / HINTS)

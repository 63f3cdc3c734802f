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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minirlhf.files import Lines

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

    def beside(self, first: float) -> Metric:
        """The range in the metric's own units, for a run that begins with the value `first`."""
        return replace(self, low=self.low * first, high=self.high * first, of_first=False) if self.of_first else self

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """The range in words; "" for a number that may have any value."""
        low, high = (f"{end:g}" if math.isfinite(end) else "" for end in (self.low, self.high))
        words = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}" if high else ""
        return f"{words} of the first" if self.of_first else words


def read_table(lines: Iterable[str]) -> dict[tuple[str, str], Metric]:
    """The metrics of `healthy.csv` by stage, or file of the evaluation, and name."""
    return {
        (stage, name): Metric(float(low or -math.inf), float(high or math.inf), bool(of_first), bool(log), *words)
        for stage, name, low, high, of_first, log, *words in itertools.islice(csv.reader(lines), 1, None)
    }


HEALTHY = read_table(Path(__file__).with_name("healthy.csv").read_text(encoding="utf-8").splitlines())


# ------------------------------------------------------------------------------------------------------------ the rules
class Hints:
    """The hints of one stage's run, in `<stage>/hints.jsonl` where there are any, and all that a rule may look at.

    config  the stage's;  steps  that it has in all;  rows  so far
    A run that goes on gives the rows that it begins with: the file is what they give, and nothing of it is said again.
    """

    def __init__(self, folder: Path, config: Any, *, steps: int, rows: Sequence[Row] = ()) -> None:
        self.path, self.config, self.steps = folder / HINTS, config, steps
        self.rows: list[Row] = []
        self.waiting = dict(RULES)
        self.path.unlink(missing_ok=True)
        for row in rows:
            self.see(row)

    def newest(self, name: str, count: int = 1) -> float:
        """Mean of a metric over the newest `count` rows that have it."""
        values = (row[name] for row in reversed(self.rows) if name in row)
        return statistics.fmean(itertools.islice(values, count))

    def oldest(self, name: str, count: int) -> float:
        """Mean of a metric over the first `count` rows that have it."""
        return statistics.fmean(itertools.islice((row[name] for row in self.rows if name in row), count))

    def see(self, row: Row) -> list[str]:
        """Judge a new row; returns and keeps what is said for the first time in this run."""
        self.rows.append(row)
        new = []
        for name, (about, least, rule) in list(self.waiting.items()):
            if about[1] in row and len(self.rows) >= least and (wrong := rule(self)):
                del self.waiting[name]
                message = f"{wrong}. {HEALTHY[about].advice}"
                new.append({"step": int(row["step"]), "hint": name, "message": message})
        if new:
            with Lines(self.path) as file:
                file.append(*new)
        return [f"step {hint['step']}, {hint['hint']}: {hint['message']}" for hint in new]


def first_ratio(run: Hints) -> str:
    """The ratio before any update is 1, but for rounding: more of it in half types, where sampling differs too."""
    value = run.newest("first_ratio_deviation")
    limit = HEALTHY["ppo", "first_ratio_deviation"].high if run.newest("sampling_gap") == 0 else 2e-2
    if value <= limit:
        return ""
    return (
        f"a ratio is off 1 by {value:.2g} before the first update (first_ratio_deviation, at most {limit:g}): old and "
        "new log-probabilities are computed differently, and all that is learned from them is wrong"
    )


def negative_kl(run: Hints) -> str:
    """A mean KL too far below 0 for chance, over one iteration or over ten.

    For log-ratios s_i = log pi - log ref of n samples of pi, E[exp(-s_i)] <= 1 whatever pi is. By Markov's inequality
    P(mean s_i <= -x) <= exp(-n x): with x = 14 / n once in a million. 0.01 nats more are left to rounding.
    """
    for count in (1, 10):
        size = run.config.rollout_size * min(count, len(run.rows))
        kl, limit = run.newest("kl", count), -14 / size - 0.01
        if kl < limit:
            return (
                f"the KL to the SFT model is {kl:.2g} nats (kl, mean of {size} responses); its samples give less than "
                f"{limit:.2g} once in a million times, so the log-probabilities are not those of the samples"
            )
    return ""


def large_kl(run: Hints) -> str:
    """Three times the target: beyond it the controller cannot hold the policy."""
    kl, limit = run.newest("kl", 3), 3 * (getattr(run.config, "kl_target", None) or math.inf)
    about = f"the KL to the SFT model is {kl:.2g} nats, more than {limit:g}, 3 times --kl-target"
    return "" if kl <= limit else f"{about}: beta follows too slowly"


def clip_fraction(run: Hints) -> str:
    """Most of a rollout is thrown away."""
    value = run.newest("clip_fraction")
    if value <= 0.5:
        return ""
    return (
        f"the clip removes the gradient of {value:.0%} of the tokens (clip_fraction, healthy up to 30 %): most of each "
        "rollout is thrown away"
    )


def explained_variance(run: Hints) -> str:
    """Five iterations below a value model that has yet to learn, which is a little below 0 itself."""
    value = run.newest("explained_variance", 5)
    if value > -0.1:
        return ""
    return (
        f"the value model is worse than a constant (explained_variance {value:.2f}, mean of 5 iterations): its errors "
        "go into the advantages"
    )


def longer_answers(run: Hints) -> str:
    """Three iterations twice as long as the first three, with a higher score."""
    length, before = run.newest("response_length", 3), run.oldest("response_length", 3)
    score, lower = run.newest("score", 3), run.oldest("score", 3)
    if not (length >= 2 * before and score > lower):
        return ""
    return (
        f"responses are {length:.0f} tokens long, {before:.0f} at first, while the score rose from {lower:.2g} to "
        f"{score:.2g} (response_length, score): length itself may be what is rewarded"
    )


def equal_rewards(run: Hints) -> str:
    """No response of a rollout has a score of its own."""
    score = run.newest("score")
    if run.newest("score_std") > 1e-6 * max(1.0, abs(score)):
        return ""
    return (
        f"every response of the rollout has the score {score:.4g} (score_std 0): there is nothing to prefer and "
        "nothing is learned"
    )


def no_eos(run: Hints) -> str:
    """Hardly one response in a hundred ends by itself."""
    value = run.newest("eos_rate")
    if value > 0.01:
        return ""
    return (
        f"{value:.0%} of the responses end by themselves (eos_rate): all are cut off at --max-new-tokens, and with "
        "--missing-eos-score they are not scored by the reward model"
    )


def low_entropy(run: Hints) -> str:
    """Three iterations below a tenth of the first three; in the demo it falls to four tenths."""
    value, first = run.newest("entropy", 3), run.oldest("entropy", 3)
    if value > 0.1 * first:
        return ""
    return (
        f"the entropy fell from {first:.2g} to {value:.2g} nats per token (entropy): the policy writes one answer and "
        "explores nothing any more"
    )


def chance(run: Hints) -> str:
    """Held-out pairs where they were measured, else 50 batches; not before half of the steps are done."""
    name, rows = ("validation_accuracy", 1) if "validation_accuracy" in run.rows[-1] else ("accuracy", 50)
    early = 2 * len(run.rows) < run.steps or len(run.rows) < rows
    share = run.newest(name, rows)
    about = f"{share:.0%} of the pairs are in the right order ({name}), and chance gives 50 %"
    return "" if early or share >= 0.55 else f"{about}: nothing is learned of the preferences"


def both_fall(run: Hints) -> str:
    """The better responses lose more than a quarter of what the margin gains, and more than a nat each."""
    margin, before = run.newest("margin", 20), run.oldest("margin", 20)
    reward = run.newest("reward_chosen", 20)
    nats = reward / run.config.beta  # of the better responses against the reference; the rewards are beta times these
    if not (margin > before and reward < -0.25 * margin and nats < -1):
        return ""
    return (
        f"the better responses lose {-nats:.1f} nats each while the margin rises to {margin:.2g} (reward_chosen, "
        "margin): both become unlikely, and what was in neither gets their probability"
    )


# By the hint's name: the number of `HEALTHY` whose advice ends the message, and which the newest row must have; how
# many rows there must be; and the rule: what is wrong and where it shows, "" where nothing is.
RULES: dict[str, tuple[tuple[str, str], int, Callable[[Hints], str]]] = {
    "first-ratio": (("ppo", "first_ratio_deviation"), 1, first_ratio),
    "kl-below-0": (("ppo", "sampling_gap"), 1, negative_kl),
    "kl-beyond-target": (("ppo", "kl"), 3, large_kl),
    "clip-fraction": (("ppo", "clip_fraction"), 1, clip_fraction),
    "explained-variance": (("ppo", "explained_variance"), 8, explained_variance),  # three to find the scale, and five
    "length": (("ppo", "response_length"), 6, longer_answers),
    "equal-rewards": (("ppo", "score_std"), 1, equal_rewards),
    "no-eos": (("ppo", "eos_rate"), 1, no_eos),
    "entropy": (("ppo", "entropy"), 6, low_entropy),
    "chance": (("reward", "accuracy"), 1, chance),
    "both-fall": (("dpo", "reward_chosen"), 40, both_fall),
}

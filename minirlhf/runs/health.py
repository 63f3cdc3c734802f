"""Health hints: what a run's numbers say has gone wrong, once a run, with what to do about it.

A rule looks at the rows of `metrics.jsonl` so far and says nothing, or what is wrong, where it shows and what to do.
It is a pure function of them, so `<stage>/hints.jsonl` is one too: a run that goes on writes it again from the rows it
keeps, and a resumed run has the hints of one that was never stopped. Each limit is explained in docs/hints.md.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minirlhf.files import Lines, read_records

HINTS = "hints.jsonl"
Row = dict[str, float]


@dataclass(frozen=True)
class History:
    """What a rule may look at: the rows so far, the stage's configuration, and how many steps it has in all."""

    config: Any
    steps: int
    rows: list[Row] = field(default_factory=list)

    def newest(self, name: str, count: int = 1) -> float:
        """Mean of a metric over the newest `count` rows."""
        return statistics.fmean([row[name] for row in itertools.islice(reversed(self.rows), count)])

    def oldest(self, name: str, count: int) -> float:
        """Mean of a metric over the first `count` rows."""
        return statistics.fmean([row[name] for row in self.rows[:count]])


# ----------------------------------------------------------------------------------------------------------------- PPO
def first_ratio(run: History) -> str | None:
    """The ratio before any update is 1, but for rounding: more of it in half types, where sampling differs too."""
    deviation, limit = run.newest("first_ratio_deviation"), 1e-4 if run.newest("sampling_gap") == 0 else 2e-2
    message = (
        f"a ratio is off 1 by {deviation:.2g} before the first update (first_ratio_deviation, at most {limit:g}): old "
        "and new log-probabilities are computed differently, and all that is learned from them is wrong. Compare "
        "temperature, padding and number format of sampling and training; try --dtype float32"
    )
    return message if deviation > limit else None


def negative_kl(run: History) -> str | None:
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
                f"{limit:.2g} once in a million times, so the log-probabilities are not those of the samples. "
                "Compare temperature, mask and model of sampling and scoring"
            )
    return None


def large_kl(run: History) -> str | None:
    """Three iterations beyond three times the target: the controller cannot hold the policy."""
    target, kl = run.config.kl_target, run.newest("kl", 3)
    if target is None or kl <= 3 * target:
        return None
    return (
        f"the KL to the SFT model is {kl:.2g} nats, more than 3 times --kl-target {target:g}: beta follows too slowly. "
        "Begin with a larger --beta, give a smaller --kl-horizon, or lower --learning-rate"
    )


def clipped(run: History) -> str | None:
    share = run.newest("clip_fraction")
    message = (
        f"the clip removes the gradient of {share:.0%} of the tokens (clip_fraction, healthy up to 30 %): most of each "
        "rollout is thrown away. Lower --learning-rate or --epochs, or set --stop-kl 0.02"
    )
    return message if share > 0.5 else None


def useless_values(run: History) -> str | None:
    """Five iterations below -0.1, once the value model has had three to find the scale of the rewards.

    A little below 0 is what one that has yet to learn looks like, and adds next to nothing to the advantages.
    """
    share = run.newest("explained_variance", 5)
    message = (
        f"the value model is worse than a constant (explained_variance {share:.2f}, mean of 5 iterations): its errors "
        "go into the advantages. Lower --value-learning-rate, raise --value-clip, or do without it: --advantages rloo "
        "--group-size 4"
    )
    return message if share < -0.1 else None


def longer_answers(run: History) -> str | None:
    length, before = run.newest("response_length", 3), run.oldest("response_length", 3)
    score, lower = run.newest("score", 3), run.oldest("score", 3)
    if length < 2 * before or score <= lower:
        return None
    return (
        f"responses are {length:.0f} tokens long, {before:.0f} at first, while the score rose from {lower:.2g} to "
        f"{score:.2g} (response_length, score): length itself may be what is rewarded. Read the answers, compare the "
        "labels' lengths (python -m minirlhf.feedback stats), raise --beta, or lower --max-new-tokens"
    )


def equal_rewards(run: History) -> str | None:
    spread, score = run.newest("score_std"), run.newest("score")
    message = (
        f"every response of the rollout has the score {score:.4g} (score_std 0): there is nothing to prefer "
        "and nothing is learned. Look at the reward and at what the policy writes; if this is the highest score "
        "there is, the training has done its work"
    )
    return message if spread <= 1e-6 * max(1.0, abs(score)) else None


def never_ends(run: History) -> str | None:
    share = run.newest("eos_rate")
    message = (
        f"{share:.0%} of the responses end by themselves (eos_rate): all are cut off at --max-new-tokens, and with "
        "--missing-eos-score they are not scored by the reward model. Raise --max-new-tokens, or start from a model "
        "that was trained on whole responses (train_sft.py)"
    )
    return message if share <= 0.01 else None


def collapsed(run: History) -> str | None:
    """A tenth of the first iterations' entropy; in the demo it falls to four tenths."""
    entropy, before = run.newest("entropy", 3), run.oldest("entropy", 3)
    message = (
        f"the entropy fell from {before:.2g} to {entropy:.2g} nats a token (entropy): the policy writes one answer and "
        "explores nothing any more. Raise --beta, lower --learning-rate, or stop at an earlier checkpoint"
    )
    return message if entropy < 0.1 * before else None


# -------------------------------------------------------------------------------------------------- reward model, DPO
def chance(run: History) -> str | None:
    """Held-out pairs where they were measured, else 50 batches; not before half of the steps are done."""
    if 2 * len(run.rows) < run.steps:
        return None
    if "validation_accuracy" in run.rows[-1]:
        name, share = "validation_accuracy", run.newest("validation_accuracy")
    elif len(run.rows) >= 50:
        name, share = "accuracy", run.newest("accuracy", 50)
    else:
        return None
    message = (
        f"{share:.0%} of the pairs are in the right order ({name}), and chance gives 50 %: nothing is learned of the "
        "preferences. See whether chosen and rejected are exchanged or prompts cut off, whether people agree (python "
        "-m minirlhf.feedback stats), and try a higher --learning-rate"
    )
    return message if share < 0.55 else None


def both_fall(run: History) -> str | None:
    """The better responses lose more than a quarter of what the margin gains, and more than a nat each."""
    margin, before = run.newest("margin", 20), run.oldest("margin", 20)
    reward = run.newest("reward_chosen", 20)
    nats = reward / run.config.beta  # of the better responses against the reference; the rewards are beta times these
    if margin <= before or reward >= -0.25 * margin or nats >= -1:
        return None
    return (
        f"the better responses lose {-nats:.1f} nats each while the margin rises to {margin:.2g} (reward_chosen, "
        "margin): both become unlikely, and what was in neither gets their probability. Raise --beta, lower "
        "--learning-rate, or train on the better responses first (train_sft.py)"
    )


@dataclass(frozen=True)
class Rule:
    """One hint.

    needs     metrics that the newest row must have
    rows      that there must be
    judge     what is wrong, where it shows and how to mend it; None where nothing is
    settings  that the stage must have
    """

    name: str
    needs: tuple[str, ...]
    rows: int
    judge: Callable[[History], str | None]
    settings: tuple[str, ...] = ()


RULES = (
    Rule("first-ratio", ("first_ratio_deviation", "sampling_gap"), 1, first_ratio),
    Rule("kl-below-0", ("kl",), 1, negative_kl, ("rollout_size",)),
    Rule("kl-beyond-target", ("kl",), 3, large_kl, ("kl_target",)),
    Rule("clip-fraction", ("clip_fraction",), 1, clipped),
    Rule("explained-variance", ("explained_variance",), 8, useless_values),
    Rule("length", ("response_length", "score"), 6, longer_answers),
    Rule("equal-rewards", ("score_std", "score"), 1, equal_rewards),
    Rule("no-eos", ("eos_rate",), 1, never_ends),
    Rule("entropy", ("entropy",), 6, collapsed),
    Rule("chance", ("accuracy",), 1, chance),
    Rule("both-fall", ("reward_chosen", "margin"), 40, both_fall, ("beta",)),
)


class Hints:
    """The hints of one stage's run, in `<stage>/hints.jsonl` where there are any.

    rows  that the run begins with, where it goes on: the file is what they give, and nothing of it is said again
    """

    def __init__(self, folder: Path, config: Any, *, steps: int, rows: Sequence[Row] = ()) -> None:
        self.path = folder / HINTS
        self.waiting = [rule for rule in RULES if all(hasattr(config, name) for name in rule.settings)]
        self.history = History(config, steps)
        self.path.unlink(missing_ok=True)
        for row in rows:
            self.see(row)

    def see(self, row: Row) -> list[str]:
        """Judge a new row; returns and keeps what is said for the first time in this run."""
        history, said = self.history, []
        history.rows.append(row)
        for rule in tuple(self.waiting):
            if len(history.rows) < rule.rows or not row.keys() >= set(rule.needs):
                continue
            message = rule.judge(history)
            if message is not None:
                self.waiting.remove(rule)
                said.append({"step": int(row["step"]), "hint": rule.name, "message": message})
        if said:
            with Lines(self.path) as file:
                file.append(*said)
        return [f"step {hint['step']}, {hint['hint']}: {hint['message']}" for hint in said]


def read_hints(folder: Path) -> list[dict[str, Any]]:
    """The hints of a stage's run, none where the file is missing: step, hint (its name) and message."""
    return read_records(folder / HINTS)

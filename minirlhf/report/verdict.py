"""The verdict in plain words: was PPO taken too far, and is each number where it should be?

Over-optimised means that the judge's mark fell from its best while the reward that PPO maximises rose (Gao et al. 2022,
arXiv 2210.10760). Both are measured on the same prompts with the same random numbers (evaluate/trace.py), so the fall
is a mean of differences by prompt, and counts where it is more than three standard errors: the best of several noisy
points is above the last one by chance alone, and seldom by that much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minirlhf.report.healthy import HEALTHY
from minirlhf.report.markup import Html, element, signed
from minirlhf.report.run import Row, Run, StageRun, is_number

SURE = 3.0  # standard errors
Answer = Literal["yes", "no", "broke", "unknown"]
HEADLINES: dict[Answer, str] = {
    "yes": "over-optimised",
    "no": "did not over-optimise",
    "broke": "went wrong, but not by over-optimisation",
    "unknown": "may or may not have over-optimised: this run cannot say",
}
BETTER = "win rate above 50%, with its whole interval"
AGAIN = "To see the way between, train with --trace-every 4."


@dataclass(frozen=True)
class Finding:
    """Whether a run of PPO over-optimised, and the numbers that say so."""

    stage: str
    answer: Answer
    why: str

    @property
    def headline(self) -> str:
        name = "PPO" if self.stage == "ppo" else f"PPO ({self.stage})"
        return f"{name} {HEADLINES[self.answer]}."


@dataclass(frozen=True)
class Check:
    """One number beside what it should be; met is None where it is not there yet."""

    what: str
    needed: str
    found: str
    met: bool | None


def fall(best: Row, last: Row) -> tuple[float, float]:
    """Mean of the judge's marks by prompt at `best` less those at `last`, and its standard error."""
    differences = np.array(best["marks"], dtype=float) - np.array(last["marks"], dtype=float)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def at(row: Row) -> str:
    """Where a point of the trace is."""
    return f"iteration {row['iteration']} (KL {round(row['kl'], 1) + 0.0:.1f} nats)"  # + 0.0: no -0.0


def traced(stage: str, trace: list[Row]) -> Finding:
    """The finding from measurements along the way; they must be at least two."""
    first, last = trace[0], trace[-1]
    best = max(trace, key=lambda row: row["judge"])
    mean, error = fall(best, last)
    path = (
        f"The judge's mark went from {signed(first['judge'])} to {signed(last['judge'])}, its best was "
        f"{signed(best['judge'])} at {at(best)}; the reward model's score went from {signed(first['reward'])} to "
        f"{signed(last['reward'])}, and was {signed(best['reward'])} at the judge's best. The end is {at(last)}."
    )
    size = f"{mean:.2f}, with a standard error of {error:.2f} over {len(last['marks'])} prompts"
    if best is last:
        return Finding(stage, "no", f"{path} The judge's best is the last measurement.")
    if mean <= SURE * error:
        least = f"only a fall of {SURE * error:.2f} or more could be told from chance"
        return Finding(stage, "no", f"{path} It fell from its best by {size}: {least}.")
    if last["reward"] > best["reward"]:
        return Finding(stage, "yes", f"{path} The judge fell from its best by {size}, while the reward rose.")
    return Finding(stage, "broke", f"{path} The judge fell from its best by {size}, and the reward fell too.")


def from_ends(stage: str, models: dict[str, Row]) -> Finding:
    """The finding where only the first and the last model were judged."""
    if not {"sft", "ppo"} <= models.keys() or stage != "ppo":
        return Finding(stage, "unknown", f"The judge was not asked while it trained. {AGAIN}")
    sft, ppo = models["sft"], models["ppo"]
    (low, high), won = ppo["win_rate"]["interval"], ppo["win_rate"]["mean"]
    path = (
        f"From SFT to PPO the judge's mark went from {signed(sft['total']['mean'])} to {signed(ppo['total']['mean'])} "
        f"(win rate {won:.0%}, {low:.0%} to {high:.0%}) and the reward from {signed(sft['reward'])} to "
        f"{signed(ppo['reward'])}, at a KL of {ppo['kl']:.1f} nats."
    )
    if high < 0.5 and ppo["reward"] > sft["reward"]:
        return Finding(stage, "yes", f"{path} The judge prefers the SFT model's answers, and the reward rose.")
    return Finding(stage, "unknown", f"{path} Whether the judge's mark was higher in between was not measured. {AGAIN}")


def over_optimised(run: Run, stage: StageRun) -> Finding:
    """Whether this run of PPO over-optimised."""
    return traced(stage.name, stage.trace) if len(stage.trace) > 1 else from_ends(stage.name, run.models)


def interval(value: Row) -> str:
    """A share and its interval."""
    low, high = value["interval"]
    return f"{value['mean']:.0%} ({low:.0%} to {high:.0%})"


def checks(run: Run) -> list[Check]:
    """What is asked of a run by the evaluation at its end."""
    found = []
    agreement, band = run.summary.get("reward_model_agreement", {}), HEALTHY["summary", "reward_model_agreement"]
    share = agreement.get("share")
    told = f"{share:.1%} of {agreement['pairs']} pairs" if is_number(share) else "not evaluated"
    what = "The reward model orders answers as the judge does"
    found.append(Check(what, f"at least {band.low:.0%} of pairs", told, share in band if is_number(share) else None))
    for name in ("ppo", "dpo"):
        found += of_model(name, run.models.get(name), run.models.get("sft"))
    return found


def of_model(name: str, model: Row | None, sft: Row | None) -> list[Check]:
    """What is asked of a trained policy."""
    label = name.upper()
    if model is None or sft is None:
        return [Check(f"{label} is better than SFT by the judge", BETTER, "not evaluated", None)]
    won, ends, kl = model["win_rate"], HEALTHY["summary", "eos_rate"], HEALTHY["summary", "kl"]
    times, length = model["length"] / sft["length"], HEALTHY["ppo", "response_length"]
    return [
        Check(
            f"{label} is better than SFT by the judge",
            BETTER,
            interval(won),
            won["interval"][0] > 0.5,
        ),
        Check(f"{label} stayed near SFT", f"KL {kl} nats", f"{model['kl']:.1f}", model["kl"] in kl),
        Check(
            f"{label} ends its answers",
            f"at least {ends.low:.0%} of them",
            f"{model['eos_rate']:.0%}",
            model["eos_rate"] in ends,
        ),
        Check(
            f"{label} is about as long as SFT",
            f"{length.low:g} to {length.high:g} times",
            f"{times:.2f} times ({model['length']:.1f} tokens)",
            length.low <= times <= length.high,
        ),
    ]


def mark(met: bool | None) -> Html:
    """Yes, no, or not yet, as a sign and a word."""
    sign, word, kind = {True: ("✓", "met", "good"), False: ("✗", "not met", "bad"), None: ("–", "open", "quiet")}[met]
    return element("span", f"{sign} {word}", class_=f"mark {kind}")


def summary_of(found: list[Check]) -> str:
    """How many of the thresholds are met, in words."""
    known = [check for check in found if check.met is not None]
    missed = [check.what for check in known if not check.met]
    if not known:
        return "The run has not been evaluated yet, so no threshold can be checked."
    rest = f" {len(found) - len(known)} cannot be checked yet." if len(known) < len(found) else ""
    if not missed:
        return f"All {len(known)} thresholds {'that can be checked ' if rest else ''}are met.{rest}"
    return f"{len(missed)} of {len(known)} thresholds not met: {'; '.join(missed)}.{rest}"

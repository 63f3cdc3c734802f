"""The verdict in plain words: was PPO taken too far, and is each number where it should be?

Over-optimised means that the judge's mark fell from its best while the reward that PPO maximises rose (Gao et al. 2022,
arXiv 2210.10760). Both are measured on the same prompts with the same random numbers (evaluate/trace.py), so the fall
is a mean of differences by prompt, and counts where it is more than three standard errors: the best of several noisy
points is above the last one by chance alone, and seldom by that much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from minirlhf.report.chart import MINUS
from minirlhf.report.run import Row, Run, StageRun
from minirlhf.runs.health import HEALTHY
from minirlhf.runtime import require

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
    """Whether a run of PPO over-optimised, the numbers that say so, and what else is amiss, to end the headline."""

    stage: str
    answer: Answer
    why: str
    amiss: str = ""

    @property
    def headline(self) -> str:
        name = "PPO" if self.stage == "ppo" else f"PPO ({self.stage})"
        return f"{name} {HEADLINES[self.answer]}{self.amiss}."

    @property
    def kind(self) -> str:
        """Its colour: good only where nothing is amiss."""
        return {"no": "middling" if self.amiss else "good", "unknown": "middling"}.get(self.answer, "bad")


@dataclass(frozen=True)
class Check:
    """One number beside what it should be; met is None where it is not there yet."""

    what: str
    needed: str
    value: str = "not evaluated"
    met: bool | None = None


def signed(value: float) -> str:
    """With its sign and two decimals."""
    return f"{value:+.2f}".replace("-", MINUS)


def fall(best: Row, last: Row) -> tuple[float, float]:
    """Mean of the judge's marks by prompt at `best` less those at `last`, and its standard error."""
    differences = np.array(best["marks"], dtype=float) - np.array(last["marks"], dtype=float)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def at(row: Row) -> str:
    """Where a point of the trace is."""
    return f"iteration {row['iteration']} (KL {row['kl']:z.1f} nats)"


def traced(stage: str, trace: list[Row]) -> Finding:
    """The finding from measurements along the way; they must be at least two."""
    first, last = trace[0], trace[-1]
    best = max(trace, key=lambda row: row["judge"])
    counts = {len(row["marks"]) for row in (first, best, last)}
    damaged = "its measurements need marks of the same prompts, two or more; remove the file for a report without them"
    require(len(counts) == 1 and min(counts) > 1, f"{stage}/trace.jsonl: {damaged}")
    (mean, error), (loss, doubt) = fall(best, last), fall(first, last)
    path = (
        f"The judge's mark went from {signed(first['judge'])} to {signed(last['judge'])}, its best was "
        f"{signed(best['judge'])} at {at(best)}; the reward model's score went from {signed(first['reward'])} to "
        f"{signed(last['reward'])}, and was {signed(best['reward'])} at the judge's best. The end is {at(last)}."
    )
    size = f"{mean:.2f}, with a standard error of {error:.2f} over {len(last['marks'])} prompts"
    amiss = "" if -loss > SURE * doubt else ", but the judge's mark did not rise"
    if best is last:
        return Finding(stage, "no", f"{path} The judge's best is the last measurement.", amiss)
    if mean <= SURE * error:
        least = f"only a fall of {SURE * error:.2f} or more could be told from chance"
        return Finding(stage, "no", f"{path} It fell from its best by {size}: {least}.", amiss)
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
    """Whether this run of PPO over-optimised, and what else is amiss: not finished, or a threshold missed."""
    finding = traced(stage.name, stage.trace) if len(stage.trace) > 1 else from_ends(stage.name, run.models)
    missed = stage.name == "ppo" and any(check.met is False for check in checks_of("ppo", run))
    if not stage.finished:
        return replace(finding, amiss=", and is not finished")
    if missed and finding.answer == "no" and not finding.amiss:
        return replace(finding, amiss=", but not all of its thresholds are met")
    return finding


def checks(run: Run) -> list[Check]:
    """Each threshold that the evaluation at the end of a run is held against, beside what the run reached."""
    band, what = HEALTHY["summary", "reward_model_agreement"], "The reward model orders answers as the judge does"
    agreement = Check(what, f"at least {band.low:.0%} of pairs")
    match run.summary.get("reward_model_agreement"):
        case {"share": float(share), "pairs": pairs} if math.isfinite(share):
            agreement = replace(agreement, value=f"{share:.1%} of {pairs} pairs", met=share in band)
    return [agreement, *checks_of("ppo", run), *checks_of("dpo", run)]


def checks_of(name: str, run: Run) -> list[Check]:
    """The thresholds of a trained policy."""
    label, model, sft = name.upper(), run.models.get(name), run.models.get("sft")
    better = Check(f"{label} is better than SFT by the judge", BETTER)
    if model is None or sft is None:
        return [better]
    (low, high), won = model["win_rate"]["interval"], model["win_rate"]["mean"]
    kl, ends, lengths = HEALTHY["summary", "kl"], HEALTHY["summary", "eos_rate"], HEALTHY["ppo", "response_length"]
    times = model["length"] / sft["length"]
    size = f"{times:.2f} times ({model['length']:.1f} tokens)"
    needed, share = f"at least {ends.low:.0%} of them", f"{model['eos_rate']:.0%}"
    return [
        replace(better, value=f"{won:.0%} ({low:.0%} to {high:.0%})", met=low > 0.5),
        Check(f"{label} stayed near SFT", f"KL {kl} nats", f"{model['kl']:.1f}", model["kl"] in kl),
        Check(f"{label} ends its answers", needed, share, model["eos_rate"] in ends),
        Check(f"{label} is about as long as SFT", f"{lengths.low:g} to {lengths.high:g} times", size, times in lengths),
    ]


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

"""The verdict in plain words: was PPO taken too far, and is each number where it should be?

Over-optimised means that the judge's mark fell from its best while the reward that PPO maximises rose (Gao et al. 2022,
arXiv 2210.10760). Both are measured on the same prompts with the same random numbers (evaluate/trace.py), so the fall
is a mean of differences by prompt, and counts where it is more than three standard errors: the best of several noisy
points is above the last one by chance alone, and seldom by that much.
"""

from __future__ import annotations

import math

import numpy as np

from minirlhf.report.chart import MINUS
from minirlhf.report.run import Row, Run, StageRun, is_number
from minirlhf.runs.health import HEALTHY
from minirlhf.runtime import require

SURE = 3.0  # standard errors
HEADLINES = {  # by the answer: colour and words
    "yes": ("bad", "over-optimised"),
    "no": ("good", "did not over-optimise"),
    "broke": ("bad", "went wrong, but not by over-optimisation"),
    "unknown": ("middling", "may or may not have over-optimised: this run cannot say"),
}
AGAIN = "To see the way between, train with --trace-every 4."
Check = tuple[str, str, str, bool | None]  # a number's name, what it should be, what it is; None: not there yet


def signed(value: float) -> str:
    """With its sign and two decimals."""
    return f"{value:+.2f}".replace("-", MINUS)


def with_interval(estimate: Row, form: str) -> str:
    """A mean, and its interval in brackets."""
    low, high = estimate["interval"]
    return f"{estimate['mean']:{form}} ({low:{form}} to {high:{form}})".replace("-", MINUS)


def fall(best: Row, last: Row) -> tuple[float, float]:
    """Mean of the judge's marks by prompt at `best` less those at `last`, and its standard error."""
    differences = np.array(best["marks"], dtype=float) - np.array(last["marks"], dtype=float)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def at(row: Row) -> str:
    """The place of a point of the trace."""
    return f"iteration {row['iteration']} (KL {row['kl']:z.1f} nats)"


def traced(stage: StageRun) -> tuple[str, str, str]:
    """The answer from two measurements along the way or more, the numbers that say so, and what else is amiss."""
    first, last, best = stage.trace[0], stage.trace[-1], max(stage.trace, key=lambda row: row["judge"])
    counts = {len(row["marks"]) for row in (first, best, last)}
    damaged = "its measurements need marks of the same prompts, two or more; remove the file for a report without them"
    require(len(counts) == 1 and min(counts) > 1, f"{stage.name}/trace.jsonl: {damaged}")
    (mean, error), (loss, doubt) = fall(best, last), fall(first, last)
    path = (
        f"The judge's mark went from {signed(first['judge'])} to {signed(last['judge'])}, its best was "
        f"{signed(best['judge'])} at {at(best)}; the reward model's score went from {signed(first['reward'])} to "
        f"{signed(last['reward'])}, and was {signed(best['reward'])} at the judge's best. The end is {at(last)}."
    )
    size = f"It fell from its best by {mean:.2f}, with a standard error of {error:.2f} over {counts.pop()} prompts"
    if mean > SURE * error:
        rose = last["reward"] > best["reward"]
        end = "while the reward rose" if rose else "and the reward fell too"
        return "yes" if rose else "broke", f"{path} {size}, {end}.", ""
    amiss = "" if -loss > SURE * doubt else ", but the judge's mark did not rise"
    if best is last:
        return "no", f"{path} The judge's best is the last measurement.", amiss
    return "no", f"{path} {size}: only a fall of {SURE * error:.2f} or more could be told from chance.", amiss


def from_ends(stage: StageRun, models: dict[str, Row]) -> tuple[str, str, str]:
    """The same where only the first and the last model were judged."""
    if not {"sft", "ppo"} <= models.keys() or stage.name != "ppo":
        return "unknown", f"The judge was not asked while it trained. {AGAIN}", ""
    sft, ppo = models["sft"], models["ppo"]
    path = (
        f"From SFT to PPO the judge's mark went from {signed(sft['total']['mean'])} to {signed(ppo['total']['mean'])}, "
        f"with a win rate of {with_interval(ppo['win_rate'], '.0%')}, and the reward from {signed(sft['reward'])} to "
        f"{signed(ppo['reward'])}, at a KL of {ppo['kl']:.1f} nats."
    )
    if ppo["win_rate"]["interval"][1] < 0.5 and ppo["reward"] > sft["reward"]:
        return "yes", f"{path} The judge prefers the SFT model's answers, and the reward rose.", ""
    return "unknown", f"{path} Whether the judge's mark was higher in between was not measured. {AGAIN}", ""


def over_optimised(run: Run, stage: StageRun) -> tuple[str, str, str]:
    """The colour of the headline, the headline with what else is amiss, and the numbers that say so.

    The colour is good only where nothing is amiss: the stage is finished, and no threshold missed.
    """
    answer, why, amiss = traced(stage) if len(stage.trace) > 1 else from_ends(stage, run.models)
    if not stage.finished:
        amiss = ", and is not finished"
    elif answer == "no" and not amiss and stage.name == "ppo" and False in [met for *_, met in checks_of("ppo", run)]:
        amiss = ", but not all of its thresholds are met"
    colour, words = HEADLINES[answer]
    name = "PPO" if stage.name == "ppo" else f"PPO ({stage.name})"
    return "middling" if amiss and answer == "no" else colour, f"{name} {words}{amiss}.", why


def check(policy: str, name: str, value: float | None = None, shown: str = "not evaluated") -> Check:
    """A number of the evaluation beside what `healthy.csv` asks of it."""
    metric = HEALTHY["summary", name]
    needed = metric.advice.format(**vars(metric))
    return f"{policy}{metric.title}", needed, shown, None if value is None else value in metric


def checks_of(name: str, run: Run) -> list[Check]:
    """The thresholds of a trained policy."""
    policy, model, sft = f"{name.upper()} ", run.models.get(name), run.models.get("sft")
    if model is None or sft is None:
        return [check(policy, "win_rate")]
    won, share, times = model["win_rate"], model["eos_rate"], model["length"] / sft["length"]
    # All of the interval is above 50 %: one that begins there is of a model that is no better.
    return [
        check(policy, "win_rate", math.nextafter(won["interval"][0], 0), with_interval(won, ".0%")),
        check(policy, "kl", model["kl"], f"{model['kl']:.1f}"),
        check(policy, "eos_rate", share, f"{share:.0%}"),
        check(policy, "length", times, f"{times:.2f} times ({model['length']:.1f} tokens)"),
    ]


def checks(run: Run) -> list[Check]:
    """Each threshold that the evaluation at the end of a run is held against, beside what the run reached."""
    agreement = run.summary.get("reward_model_agreement") or {}
    share = agreement.get("share")
    reached = (share, f"{share:.1%} of {agreement['pairs']} pairs") if is_number(share) else ()
    first = check("", "reward_model_agreement", *reached)
    return [first, *checks_of("ppo", run), *checks_of("dpo", run)]


def summary_of(every: list[Check]) -> str:
    """The number of thresholds that are met, in words."""
    missed = [what for what, *_, met in every if met is False]
    count = sum(met is not None for *_, met in every)
    rest = f" {len(every) - count} cannot be checked yet." if count < len(every) else ""
    if not count:
        return "The run has not been evaluated yet, so no threshold can be checked."
    whole = f"All {count} thresholds {'that can be checked ' if rest else ''}are met."
    return (f"{len(missed)} of {count} thresholds not met: {'; '.join(missed)}." if missed else whole) + rest

"""The healthy range of every number that has one: one table, which the glossary repeats and the report shades.

The ranges are habits of the field and of the runs here, not laws: outside of one is a reason to look. A range holds
where the stage ends; on the way there, a metric may pass through other values. docs/glossary.md says in words what to
suspect outside, and `tests/test_report.py` that it has the ranges of this table, in bold. Health hints
(runs/health.py) have wider limits: they are for what has gone wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LN2 = 0.693  # a coin's toss: what Bradley-Terry and DPO begin at


@dataclass(frozen=True)
class Band:
    """From `low` to `high`, both included; with `of_first`, in units of the first value of the run."""

    low: float = -math.inf
    high: float = math.inf
    of_first: bool = False

    def __str__(self) -> str:
        unit = " of the first" if self.of_first else ""
        if math.isinf(self.low):
            return f"at most {self.high:g}{unit}"
        if math.isinf(self.high):
            return f"at least {self.low:g}{unit}"
        return f"{self.low:g} to {self.high:g}{unit}"

    def beside(self, first: float) -> Band:
        """The range in the metric's own units, for a run that begins with the value `first`."""
        return Band(self.low * first, self.high * first) if self.of_first else self

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


# (kind of stage, or the file of the evaluation; name of the number)
HEALTHY: dict[tuple[str, str], Band] = {
    ("sft", "grad_norm"): Band(high=1),
    ("feedback", "agreement_with_judge"): Band(low=0.9),
    ("reward", "loss"): Band(0.05, LN2),
    ("reward", "accuracy"): Band(low=0.65),
    ("reward", "validation_loss"): Band(high=LN2),
    ("reward", "validation_accuracy"): Band(low=0.65),
    ("ppo", "kl"): Band(0, 10),
    ("ppo", "response_length"): Band(0.5, 2, of_first=True),
    ("ppo", "eos_rate"): Band(low=0.9),
    ("ppo", "explained_variance"): Band(0, 1),
    ("ppo", "sampling_gap"): Band(high=0.1),
    ("ppo", "entropy"): Band(low=0.05),
    ("ppo", "approximate_kl"): Band(high=0.05),
    ("ppo", "clip_fraction"): Band(high=0.3),
    ("ppo", "ratio"): Band(0.9, 1.1),
    ("ppo", "first_ratio_deviation"): Band(high=1e-4),
    ("ppo", "value_clip_fraction"): Band(high=0.3),
    ("dpo", "loss"): Band(high=LN2),
    ("dpo", "accuracy"): Band(low=0.5),
    ("dpo", "reward_rejected"): Band(high=0),
    ("dpo", "margin"): Band(low=0),
    ("dpo", "validation_loss"): Band(high=LN2),
    ("dpo", "validation_accuracy"): Band(low=0.5),
    ("dpo", "validation_margin"): Band(low=0),
    ("summary", "reward_model_agreement"): Band(low=0.88),
    ("summary", "win_rate"): Band(low=0.5),
    ("summary", "kl"): Band(0, 10),
    ("summary", "eos_rate"): Band(low=0.9),
}

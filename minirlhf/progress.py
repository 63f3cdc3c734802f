"""How far a stage is, on standard error: one live line on a terminal, plain lines now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

LIVE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
SECONDS = 10.0  # between two plain lines, at least,
SHARE = 0.02  # and this share of the steps: a long run has at most fifty
SHOWN = 2  # metrics in a line, the first of a row


class Progress:
    """The progress of one stage.

    name   of the stage
    steps  of the whole stage; of a stage of one step there is nothing to say
    done   steps that an earlier process has finished
    """

    def __init__(self, name: str, *, steps: int, done: int = 0) -> None:
        self.name, self.steps, self.step = name, steps, done
        self.began = self.said_at = time.perf_counter()
        self.first = self.said = done
        self.tokens = 0
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=done, desc=name, bar_format=LIVE, dynamic_ncols=True, mininterval=0.5, disable=not live
        )

    def update(self, values: Mapping[str, float], *, tokens: int) -> None:
        """One more step is finished, with these metrics; `tokens` were processed in it."""
        now = time.perf_counter()
        self.step += 1
        self.tokens += tokens
        if not self.bar.disable:
            self.bar.set_postfix_str(self._describe(values, now), refresh=False)
            self.bar.update(1)
            return
        due = now - self.said_at >= SECONDS and self.step - self.said >= SHARE * self.steps
        if self.steps > 1 and (due or self.step == self.steps):
            left = tqdm.format_interval((self.steps - self.step) * (now - self.began) / (self.step - self.first))
            self.say(f"{self.name}: step {self.step} of {self.steps}, {self._describe(values, now)}, {left} left")
            self.said, self.said_at = self.step, now

    def _describe(self, values: Mapping[str, float], now: float) -> str:
        shown = [f"{name} {value:.4g}" for name, value in list(values.items())[:SHOWN]]
        return ", ".join([*shown, f"{self.tokens / (now - self.began):,.0f} tokens/s"])

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """End the live line."""
        self.bar.close()

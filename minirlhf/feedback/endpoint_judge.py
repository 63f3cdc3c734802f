"""Label pairs by a language model behind an OpenAI-compatible server, on this machine or elsewhere (RLAIF).

    python -m minirlhf.feedback label --by endpoint --url http://127.0.0.1:8000/v1 --model NAME

It is asked as `judge_model` asks a folder: both orders, by the probability of the verdict. Prompts and answers are sent
to the server. `<run>/labels/calls.jsonl` logs every call; what is answered there is not asked again, so that a run
that was stopped, or whose budget was spent, goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minirlhf.config import Count, Positive, Smoothing
from minirlhf.feedback import machine
from minirlhf.feedback.calls import CallLog
from minirlhf.feedback.endpoint import Endpoint, share_of
from minirlhf.feedback.judge_model import pairwise, questions
from minirlhf.feedback.machine import Opinion, label_by_machine, opinion_of
from minirlhf.feedback.tasks import Mode, Task
from minirlhf.runtime import UserError


@dataclass
class Config(machine.Config):
    labeller: str = "endpoint"
    """Name in the labels."""
    mode: Mode = "pairs"
    """`pairs` of answers, or `rankings` of all answers to a prompt, from all their pairs: K (K-1) calls for K."""
    url: str | None = None
    """Address of the server, up to and with its version: https://…/v1."""
    model: str | None = None
    """Name of the model at that server."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; leave it unset for a server without one. It is written nowhere."""
    instruction: str = (
        "Below are a dialogue and two possible answers to it, [A] and [B]. Which answer is more helpful, honest and "
        "harmless? Reply with one letter, A or B.\n"
    )
    """Text before every comparison."""
    tie_margin: Smoothing = 0.0
    """A tie where the probability that one is better is this close to 1/2."""
    max_calls: Count = 2000
    """Budget: stop before a call where the log of calls holds this many, failed ones included. A pair takes two."""
    max_tokens: Count = 1_000_000
    """Budget: stop before a call where those in the log took this many tokens, as the server counts them."""
    attempts: Count = 6
    """Calls for one answer where the server is busy or broken; the wait between them doubles, from about 1 s."""
    timeout: Positive = 60.0
    """Seconds for one call."""
    calls: Path | None = None
    """Log of calls, by default `<run>/labels/calls.jsonl`."""


PRESETS = {"endpoint": Config()}


def main(config: Config) -> Path:
    """Label the candidates; returns the file. A task without a verdict in one of its orders is a skip."""
    if config.url is None or config.model is None:
        raise UserError("--url and --model: say which server, and which model there")
    key = os.environ.get(config.key_variable, "")
    with CallLog(config.calls or config.run / "labels" / "calls.jsonl") as log:
        endpoint = Endpoint(
            config.url,
            config.model,
            log,
            key=key,
            max_calls=config.max_calls,
            max_tokens=config.max_tokens,
            attempts=config.attempts,
            timeout=config.timeout,
        )

        def ask(tasks: Sequence[Task]) -> Iterator[Opinion]:
            for task in tasks:
                texts = questions(task, config.instruction)
                shares = [share_of("A", "B", endpoint.first_token(text)) for text in texts]
                given = [share for share in shares if share is not None]
                silent, orders = len(given) < len(shares), pairwise(given)
                yield Opinion(None) if silent else opinion_of(orders, task.shown, tie_margin=config.tie_margin)

        output = label_by_machine(config, config.mode, ask)
        print(f"{log.path}: {log.calls} calls, {log.tokens} tokens in all")
    return output

"""Label pairs by a language model behind an OpenAI-compatible server, on this machine or elsewhere (RLAIF).

    python -m minirlhf.feedback label --by endpoint --url http://127.0.0.1:8000/v1 --model NAME

It is asked as `--by judge-model` asks a folder: both orders, by the probability of the verdict. Prompts and answers are
sent to the server. `<run>/labels/calls.jsonl` logs every call; what is answered there is not asked again, so that a run
that was stopped, or whose budget was spent, goes on where it was. A task without a verdict in one of its orders is a
skip.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import random
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3 import Retry
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError

from minirlhf.config import Count, Positive
from minirlhf.evaluate.judges import question
from minirlhf.feedback.label_file import Journal
from minirlhf.feedback.machine import PairsConfig, by_pairs, questions_of, tasks_and_file, write_labels
from minirlhf.files import read_records
from minirlhf.runtime import UserError, require

BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # may go better another time
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds
LARGEST = 1 << 20  # bytes of an answer
LIKELIEST = 20  # tokens whose log-probability is asked for, the most that the interface allows


@dataclass
class Config(PairsConfig):
    labeller: str = "endpoint"
    """Name in the labels."""
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


def main(config: Config) -> Path:
    """Label the candidates; returns the file."""
    with CallLog(config.calls or config.run / "labels" / "calls.jsonl") as log:
        server = Endpoint(config, log, key=os.environ.get(config.key_variable, ""))
        tasks, output = tasks_and_file(config)
        asked = (server.first_token(question(*q, instruction=config.instruction)) for q in questions_of(tasks))
        write_labels(output, list(by_pairs(config, tasks, (share_of("A", "B", logprobs) for logprobs in asked))))
        print(f"{log.path}: {log.calls} calls, {log.tokens} tokens in all")
    return output


class CallLog(Journal):
    """The log of calls, open; `calls` and `tokens` count all in it, also those of earlier runs. One JSON object a line:

    key             names what was asked: SHA-256 of address and request
    time, seconds   when the call began (UTC), and how long it took
    request         what was sent, as JSON
    status          of HTTP; null where no answer came
    answer          what was read from the answer; null for a failed call
    error           why it failed; null for a good one
    tokens          as the server counts them; where it does not, the request's bytes, which are never fewer
    """

    def __init__(self, path: Path) -> None:
        self.calls, self.tokens = 0, 0
        self.answers: dict[str, Any] = {}
        for number, row in enumerate(read_records(path), 1):  # before the file is touched: it may be another's
            good = {"key", "answer", "tokens"} <= row.keys() and isinstance(row["answer"], dict | None)
            words = f"{path}:{number}: not a line of a log of calls; give another file, or mend it"
            require(good and type(row["tokens"]) is int, words)
            self._count(row)
        super().__init__(path, flag="--calls", of="call")

    def _count(self, row: dict[str, Any]) -> None:
        self.calls += 1
        self.tokens += row["tokens"]
        if row["answer"] is not None:
            self.answers[row["key"]] = row["answer"]

    def add(self, row: dict[str, Any]) -> None:
        """Write a call; it is on the disk when this returns."""
        self.write(row)
        self._count(row)


class Failure(Exception):
    """A call that failed. `wait` is the server's own wish, in seconds; inf where asking again is of no use."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """A model at a server; a call asks it one question, for the log-probabilities of the first token of the answer.

        POST <url>/chat/completions   {"model", "messages", "max_tokens": 1, "temperature": 0, "logprobs": true, ...}

    A server that is busy or broken is asked again after a wait that doubles, with jitter, or that it asks for itself
    (Retry-After); an answer that cannot be read counts as broken. Every call is in the log and counts against the
    budget. Left out: several calls at a time, and streams.

    key  sent as a bearer token; "" for none. It is never written to the log nor into an error
    """

    def __init__(self, config: Config, log: CallLog, *, key: str = "") -> None:
        if config.url is None or config.model is None:
            raise UserError("--url and --model: say which server, and which model there")
        self.config, self.url, self.log, self.key = config, config.url, log, key
        parts = urlsplit(self.url)
        require("@" not in self.url, "--url: holds a name or password; give a key by --key-variable alone")
        require(parts.scheme in ("http", "https") and bool(parts.hostname), f"--url {self.url!r}: give http(s)://…/v1")
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        require(parts.scheme == "https" or local or not key, f"--url {self.url}: a key goes over https alone")
        require(key.isascii() and key.isprintable(), "--key-variable: the key has a character that no header can hold")
        self._session = requests.Session()
        self._session.trust_env = not local  # this machine is not asked through a proxy
        self._session.auth = self._sign

    def _sign(self, call: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the key; without this function `requests` would send one that stands in ~/.netrc."""
        if self.key:
            call.headers["Authorization"] = f"Bearer {self.key}"
        return call

    def first_token(self, question: str) -> dict[str, float]:
        """Log-probability of each likeliest first token of the answer, by its text.

        Raises UserError where the budget is spent, the server refuses, or it stays broken; what was answered is kept.
        """
        request = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": LIKELIEST,
        }
        key = hashlib.sha256(json.dumps([self.url, request], sort_keys=True).encode()).hexdigest()
        if key in self.log.answers:
            return self.log.answers[key]
        config, log = self.config, self.log
        rest = f"{len(log.answers)} answers are kept in {log.path}, run again to go on from there"
        calls = f"--max-calls {config.max_calls}: the budget of calls is spent; {rest}"
        for attempt in range(1, config.attempts + 1):
            require(log.calls < config.max_calls, calls)
            tokens = f"--max-tokens {config.max_tokens}: the budget of tokens is spent ({log.tokens}); {rest}"
            require(log.tokens < config.max_tokens, tokens)
            try:
                return self._call(key, request)
            except Failure as failure:
                reason = failure
            require(reason.wait <= LONGEST_WAIT, f"{self.url}: {reason}; {rest}")
            if attempt < config.attempts:
                backoff = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                sleep(min(LONGEST_WAIT, max(backoff, reason.wait)))
        raise UserError(f"{self.url}: {config.attempts} calls failed, the last with: {reason}; {rest}")

    def _call(self, key: str, request: dict[str, Any]) -> dict[str, float]:
        """One call, good or bad, and its line in the log."""
        began, clock = datetime.datetime.now(datetime.UTC), monotonic()
        row: dict[str, Any] = {"key": key, "time": began.isoformat(timespec="seconds"), "request": request}
        row |= {"status": None, "answer": None, "error": None, "tokens": len(json.dumps(request).encode())}
        try:
            row["status"], wait, content = self._exchange(request)
            reply = self._read(row["status"], wait, content)
            row["answer"] = first_token_logprobs(reply)
            row["tokens"] = _tokens(reply, otherwise=row["tokens"])
            return row["answer"]
        except Failure as failure:
            row["error"] = str(failure)
            row["tokens"] *= row["status"] in (None, 200)  # with another one it says that it did not do it
            raise
        finally:
            self.log.add({**row, "seconds": round(monotonic() - clock, 3)})

    def _read(self, status: int, wait: float, content: bytes) -> Any:
        """An answer's body as JSON."""
        if not 200 <= status < 300:
            words = content.decode("utf-8", "replace")
            words = " ".join((words.replace(self.key, "***") if self.key else words).split())[:500]
            words = f": {words}" if words else ""
            words += f"; it asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
            raise Failure(f"status {status}{words}", wait if status in BUSY else math.inf)
        if len(content) > LARGEST:
            raise Failure(f"an answer of more than {LARGEST} bytes")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise Failure("the answer is not JSON") from error

    def _exchange(self, request: dict[str, Any]) -> tuple[int, float, bytes]:
        """Status, seconds that it asks to wait, and body of one POST, of which no more than LARGEST + 1 bytes are read.

        The time limit is for all of it. Those of `requests` hold for each read, and a server that sends a byte now and
        then would keep within them for ever: so another thread waits for it.
        """
        result: Future[tuple[int, float, bytes]] = Future()

        def post() -> None:
            try:
                with self._session.post(
                    f"{self.url.rstrip('/')}/chat/completions",
                    json=request,
                    headers={"User-Agent": "minirlhf", "Accept-Encoding": "identity"},
                    timeout=self.config.timeout,
                    allow_redirects=False,  # another address would get the question
                    stream=True,
                ) as reply:
                    body = reply.raw.read(LARGEST + 1, decode_content=False)
                    result.set_result((reply.status_code, retry_after(reply.headers.get("Retry-After")), body))
            except Exception as error:
                result.set_exception(error)

        threading.Thread(target=post, daemon=True).start()
        try:
            return result.result(self.config.timeout)
        except (TimeoutError, requests.Timeout, ReadTimeoutError) as error:
            raise Failure(f"no answer within {self.config.timeout:g} s") from error
        except (OSError, HTTPError) as error:
            raise Failure(_first_cause(error)) from error


def _first_cause(error: BaseException) -> str:
    """The error at the bottom, in whose place `requests` puts all that it led to."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def first_token_logprobs(reply: Any) -> dict[str, float]:
    """Text of each likeliest first token -> its log-probability, from a reply of the server.

    Raises Failure for what is no such reply, a final one for a server that gives no log-probabilities.
    """
    try:
        logprobs = reply["choices"][0]["logprobs"]
        if logprobs is None:
            raise Failure("the server gives no log-probabilities (logprobs is null), which the judge needs", math.inf)
        rows = [(row["token"], row["logprob"]) for row in logprobs["content"][0]["top_logprobs"]]
    except (KeyError, IndexError, TypeError) as error:
        raise Failure("the answer has no choices[0].logprobs.content[0].top_logprobs") from error
    good = [isinstance(token, str) and type(logprob) in (int, float) and logprob <= 1e-3 for token, logprob in rows]
    if not rows or not all(good):
        raise Failure("the answer's log-probabilities are not texts with numbers up to 0")
    return {token: max(float(logprob), -1e4) for token, logprob in rows}  # JSON has no -inf


def share_of(first: str, second: str, logprobs: dict[str, float]) -> float | None:
    """P(first) / (P(first) + P(second)) of two letters, however a token writes them; None where neither is there."""
    mass = {first: 0.0, second: 0.0}
    for token, logprob in logprobs.items():
        letter = token.strip(" \n\t[]()*\"'.:").upper()
        if letter in mass:
            mass[letter] += math.exp(logprob)
    total = sum(mass.values())
    return mass[first] / total if total > 0 else None


def retry_after(value: str | None) -> float:
    """Seconds that a server asks to wait, given as a number or a date; 0 where it does not say, or not in that form."""
    try:
        return float(Retry().parse_retry_after(value or "0"))
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def _tokens(reply: Any, *, otherwise: int) -> int:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    count = usage.get("total_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int and count >= 0 else otherwise

"""An OpenAI-compatible server: one question, and the log-probabilities of the first token of its answer.

    POST <url>/chat/completions   {"model", "messages", "max_tokens": 1, "temperature": 0, "logprobs": true, ...}

A server that is busy or broken is asked again after a wait that doubles, with jitter, or that it asks for itself
(Retry-After); an answer that cannot be read counts as broken. Every call is in the log and counts against the budget.
Left out: several calls at a time, and streams.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from minirlhf.feedback.calls import CallLog, call_key
from minirlhf.runtime import UserError, require

BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # may go better another time
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds
LARGEST = 1 << 20  # bytes of an answer
LIKELIEST = 20  # tokens whose log-probability is asked for, the most that the interface allows


class Failure(Exception):
    """A call that failed and may be made again; `wait` is the server's own wish, in seconds."""

    def __init__(self, reason: str, *, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.wait = status, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address would get the key, and the question as a GET."""

    def redirect_request(self, *_: object) -> None:
        return None


@dataclass
class Endpoint:
    """A model at a server.

    url       up to and with the version, e.g. http://127.0.0.1:8000/v1
    key       sent as a bearer token; "" for none. It is never written to the log nor into an error
    max_calls, max_tokens     budget of the whole log
    attempts, timeout         calls for one answer; seconds for each
    sleep     waits; another one for tests
    """

    url: str
    model: str
    log: CallLog
    key: str = ""
    max_calls: int = 2000
    max_tokens: int = 1_000_000
    attempts: int = 6
    timeout: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        require(parts.scheme in ("http", "https") and bool(parts.hostname), f"--url {self.url!r}: give http(s)://…/v1")
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        require(parts.scheme == "https" or local or not self.key, f"--url {self.url}: a key goes over https alone")
        proxies = [urllib.request.ProxyHandler({})] if local else []  # this machine is not asked through another one
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def first_token(self, question: str) -> dict[str, float]:
        """Log-probability of each likeliest first token of the answer, by its text.

        Raises UserError where the budget is spent, the server refuses, or it stays broken; what was answered is kept.
        """
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": LIKELIEST,
        }
        key = call_key(self.url, request)
        if key in self.log.answers:
            return self.log.answers[key]
        for attempt in range(1, self.attempts + 1):
            self._check_budget()
            try:
                return self._call(key, request)
            except Failure as failure:
                reason = failure
            if attempt < self.attempts:
                backoff = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                self.sleep(min(LONGEST_WAIT, max(backoff, reason.wait)))
        raise UserError(f"{self.url}: {self.attempts} calls failed, the last with: {reason}; {self._kept()}")

    def _check_budget(self) -> None:
        log = self.log
        calls = f"--max-calls {self.max_calls}: the budget of calls is spent; {self._kept()}"
        require(log.calls < self.max_calls, calls)
        tokens = f"--max-tokens {self.max_tokens}: the budget of tokens is spent ({log.tokens}); {self._kept()}"
        require(log.tokens < self.max_tokens, tokens)

    def _kept(self) -> str:
        return f"{len(self.log.answers)} answers are kept in {self.log.path}, run again to go on from there"

    def _call(self, key: str, request: dict[str, Any]) -> dict[str, float]:
        """One call, good or bad, and its line in the log."""
        began, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
        row: dict[str, Any] = {"key": key, "time": began.isoformat(timespec="seconds"), "request": request}
        row |= {"status": None, "answer": None, "error": None, "tokens": len(json.dumps(request).encode())}
        try:
            reply = self._post(request)
            row["status"] = 200
            row["answer"] = first_token_logprobs(reply)
            row["tokens"] = _tokens(reply, otherwise=row["tokens"])
            return row["answer"]
        except Failure as failure:
            row["status"], row["error"] = failure.status, str(failure)
            row["tokens"] = 0 if failure.status in BUSY else row["tokens"]  # it answered that it did not do it
            raise
        except UserError as error:
            row["error"], row["tokens"] = str(error), 0
            raise
        finally:
            self.log.add({**row, "seconds": round(time.monotonic() - clock, 3)})

    def _post(self, request: dict[str, Any]) -> Any:
        """The reply as JSON; raises Failure where another try may help, else UserError."""
        headers = {"Content-Type": "application/json", "User-Agent": "minirlhf"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        address = f"{self.url.rstrip('/')}/chat/completions"
        call = urllib.request.Request(address, json.dumps(request).encode(), headers, method="POST")
        end = time.monotonic() + self.timeout
        try:
            with self._opener.open(call, timeout=self.timeout) as reply:
                return json.loads(_read(reply, end))
        except urllib.error.HTTPError as error:
            self._refused(error)
        except ValueError as error:  # not JSON, or not UTF-8
            raise Failure("the answer is not JSON", status=200) from error
        except (OSError, http.client.HTTPException) as error:
            slow = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
            said = f"no answer within {self.timeout:g} s" if slow else f"{type(error).__name__}: {error}"
            raise Failure(said) from error

    def _refused(self, error: urllib.error.HTTPError) -> None:
        """Turn an HTTP status into Failure or UserError; the server's own words are kept, the key is not."""
        try:
            words = " ".join(error.read(500).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException):
            words = ""
        words = words.replace(self.key, "***") if self.key else words
        said = f"status {error.code}{': ' if words else ''}{words}"
        if error.code not in BUSY:
            raise UserError(f"{self.url}: {said}; {self._kept()}") from error
        wait = retry_after(error.headers.get("Retry-After"))
        if wait > LONGEST_WAIT:
            raise UserError(f"{self.url}: {said}; it asks to wait {wait:.0f} s; {self._kept()}") from error
        raise Failure(said, status=error.code, wait=wait) from error


def first_token_logprobs(reply: Any) -> dict[str, float]:
    """Text of each likeliest first token -> its log-probability, from a reply of the server.

    Raises Failure for what is no such reply, UserError for a server that gives no log-probabilities.
    """
    try:
        logprobs = reply["choices"][0]["logprobs"]
        if logprobs is None:
            raise UserError("the server gives no log-probabilities (logprobs is null), which the judge needs")
        rows = [(row["token"], row["logprob"]) for row in logprobs["content"][0]["top_logprobs"]]
    except (KeyError, IndexError, TypeError) as error:
        raise Failure("the answer has no choices[0].logprobs.content[0].top_logprobs", status=200) from error
    good = [isinstance(token, str) and type(logprob) in (int, float) and logprob <= 1e-3 for token, logprob in rows]
    if not rows or not all(good):
        raise Failure("the answer's log-probabilities are not texts with numbers up to 0", status=200)
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
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value)) if math.isfinite(float(value)) else 0.0
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _tokens(reply: Any, *, otherwise: int) -> int:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    count = usage.get("total_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int and count >= 0 else otherwise


def _read(reply: http.client.HTTPResponse, end: float) -> bytes:
    """The body; raises Failure for one that is too large, TimeoutError where it drips in too slowly."""
    content = b""
    while chunk := reply.read1(65_536):
        content += chunk
        if len(content) > LARGEST:
            raise Failure(f"an answer of more than {LARGEST} bytes", status=200)
        if time.monotonic() > end:
            raise TimeoutError
    return content

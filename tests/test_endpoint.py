"""The client of an OpenAI-compatible server, against a stub on this machine that is busy, broken, slow or a liar."""

from __future__ import annotations

import datetime
import email.utils
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from minirlhf.feedback import endpoint as client
from minirlhf.feedback.endpoint import CallLog, Config, Endpoint, retry_after, share_of
from minirlhf.feedback.labels import read_labels
from minirlhf.files import write_records
from minirlhf.runtime import UserError

KEY = "secret-key-0123"
Answer = Callable[["Stub"], None]


def verdict(a: float = -0.1, b: float = -2.3, tokens: int | None = 7) -> dict:
    """A reply with these log-probabilities."""
    top = [{"token": "A", "logprob": a}, {"token": " B", "logprob": b}, {"token": "The", "logprob": -9.0}]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}], "usage": {"total_tokens": tokens}}


def good(a: float = -0.1, b: float = -2.3, tokens: int | None = 7) -> Answer:
    return body(verdict(a, b, tokens))


def body(value: object, status: int = 200, **headers: str) -> Answer:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()

    def send(handler: Stub) -> None:
        handler.send_response(status)
        for name, header in headers.items():
            handler.send_header(name.replace("_", "-"), header)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return send


def slow(handler: Stub) -> None:
    """A good answer, but a byte now and then, so that no single wait is long."""
    content = json.dumps(verdict()).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(100 + len(content)))
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
    handler.wfile.write(content)


def slow_headers(handler: Stub) -> None:
    """Headers one by one, each soon after the one before."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for number in range(100):
        handler.wfile.write(f"X-{number}: more\r\n".encode())
        time.sleep(0.05)


def many_headers(handler: Stub) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + b"X-More: more\r\n" * 100_000)


def endless(handler: Stub) -> None:
    handler.send_response(200)
    handler.end_headers()
    for handler.server.sent in range(1 << 16, 1 << 26, 1 << 16):
        handler.wfile.write(b" " * (1 << 16))


def silent(handler: Stub) -> None:
    time.sleep(5)


def hang_up(handler: Stub) -> None:
    handler.connection.close()


def cut_short(handler: Stub) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.connection.close()


class Stub(BaseHTTPRequestHandler):
    """Plays the answers of its server in turn; the last one again and again."""

    def do_POST(self) -> None:
        server = self.server
        content = self.rfile.read(int(self.headers["Content-Length"]))
        server.requests.append((self.path, dict(self.headers), json.loads(content)))
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        try:
            answer(self)
        except OSError:  # the client gave up
            self.close_connection = True

    def do_GET(self) -> None:
        self.server.requests.append(("GET", {}, {}))
        body({})(self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads, server.block_on_close = True, False
    server.requests, server.answers = [], [good()]
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have waited."""
    asked: list[float] = []
    monkeypatch.setattr(client, "sleep", asked.append)
    return asked


def make(stub: Any, path: Path, key: str = "", **settings: Any) -> Endpoint:
    return Endpoint(Config(**{"url": stub.url, "model": "m", **settings}), CallLog(path / "calls.jsonl"), key=key)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "calls.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- a good answer
def test_what_is_asked_and_what_is_logged(stub, tmp_path: Path, waits: list) -> None:
    found = make(stub, tmp_path, key=KEY).first_token("Which?")
    assert found == {"A": -0.1, " B": -2.3, "The": -9.0} and waits == []
    ((path, headers, request),) = stub.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert request["messages"] == [{"role": "user", "content": "Which?"}] and request["model"] == "m"
    assert request["max_tokens"] == 1 and request["logprobs"] is True and request["top_logprobs"] == 20
    assert request["temperature"] == 0
    (row,) = rows(tmp_path)
    assert row["request"] == request and row["answer"] == found and row["status"] == 200 and row["error"] is None
    assert row["tokens"] == 7 and row["seconds"] >= 0
    assert datetime.datetime.fromisoformat(row["time"]).tzinfo is not None
    assert KEY not in (tmp_path / "calls.jsonl").read_text()


def test_without_a_key_none_is_sent(stub, tmp_path: Path) -> None:
    make(stub, tmp_path).first_token("Which?")
    assert "Authorization" not in stub.requests[0][1]


def test_what_was_answered_is_not_asked_again_by_a_later_process_either(stub, tmp_path: Path) -> None:
    first = make(stub, tmp_path)
    first.first_token("Which?")
    first.first_token("Which?")
    first.log.close()
    again = make(stub, tmp_path)
    assert again.first_token("Which?")["A"] == -0.1 and len(stub.requests) == 1
    again.first_token("And which?")
    assert len(stub.requests) == 2
    again.log.close()
    make(stub, tmp_path, model="n").first_token("Which?")  # another model's answer is another answer
    assert len(stub.requests) == 3


# ------------------------------------------------------------------------------------------------------ busy or broken
TOP = {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": "high"}]}]}}]}
BROKEN = {
    "429": body({"error": "slow down"}, 429),
    "500": body(b"<html>oops</html>", 500),
    "503": body(b"", 503),
    "not JSON": body(b"<html>"),
    "not UTF-8": body(b"\xff\xfe{}"),
    "a list": body([]),
    "null": body(None),
    "no choices": body({"choices": []}),
    "content that is none": body({"choices": [{"logprobs": {"content": []}}]}),
    "no tokens": body({"choices": [{"logprobs": {"content": [{"top_logprobs": []}]}}]}),
    "a log-probability in words": body(TOP),
    "a log-probability above 0": good(a=0.5),
    "a log-probability that is no number": good(a=float("nan")),
    "too much": body(b" " * client.LARGEST + json.dumps(verdict()).encode()),
    "headers without end": many_headers,
    "silence": silent,
    "drip": slow,
    "headers that drip": slow_headers,
    "hung up": hang_up,
    "cut short": cut_short,
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN.keys())
def test_a_busy_or_broken_server_is_asked_again(answer: Answer, stub, tmp_path: Path, waits: list) -> None:
    stub.answers = [answer, good()]
    # The time limit is for the whole call: the drip's good answer, after five seconds, would need no second request.
    assert make(stub, tmp_path, timeout=1.0).first_token("Which?")["A"] == -0.1
    assert len(stub.requests) == 2 and len(waits) == 1 and 0.5 <= waits[0] <= 1.5
    failed, fine = rows(tmp_path)
    assert failed["answer"] is None and failed["error"] and fine["answer"] and failed["key"] == fine["key"]


def test_of_an_answer_without_end_the_start_is_read(stub, tmp_path: Path) -> None:
    stub.answers = [endless, good()]
    make(stub, tmp_path).first_token("Which?")
    assert rows(tmp_path)[0]["error"] == f"an answer of more than {client.LARGEST} bytes"
    assert stub.sent < 1 << 24  # the buffers of two sockets hold some of it


def test_no_server_at_all(tmp_path: Path) -> None:
    with CallLog(tmp_path / "calls.jsonl") as log:
        nobody = Endpoint(Config(url="http://127.0.0.1:9/v1", model="m", attempts=2), log)
        with pytest.raises(UserError, match="2 calls failed, the last with: ConnectionRefusedError: .*refused; 0 ans"):
            nobody.first_token("Which?")


def test_waits_double_up_to_a_limit_and_attempts_end(stub, tmp_path: Path, waits: list) -> None:
    stub.answers = [body(b"", 500)]
    with pytest.raises(UserError, match="10 calls failed, the last with: status 500; 0 answers are kept in"):
        make(stub, tmp_path, attempts=10).first_token("Which?")
    assert len(stub.requests) == 10 and len(waits) == 9
    for number, wait in enumerate(waits):
        assert min(0.5 * 2**number, 120) <= wait <= min(1.5 * 2**number, 120)
    assert len({wait / 2**n for n, wait in enumerate(waits[:6])}) > 1, "without jitter all clients come back at once"


def test_the_server_may_ask_to_wait(stub, tmp_path: Path, waits: list) -> None:
    stub.answers = [body(b"", 429, Retry_After="17"), good()]
    make(stub, tmp_path).first_token("Which?")
    assert waits == [17.0]
    stub.answers = [body(b"later", 429, Retry_After="3600")]
    with pytest.raises(UserError, match="status 429: later; it asks to wait 3600 s"):
        make(stub, tmp_path / "b").first_token("Which?")


def test_retry_after_as_number_date_or_nonsense() -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    assert 80 < retry_after(email.utils.format_datetime(soon, usegmt=True)) <= 90
    assert retry_after("2") == 2.0 and retry_after("9" * 400) > client.LONGEST_WAIT
    assert [retry_after(value) for value in (None, "-3", "nan", "inf", "soon", "", "9" * 5000)] == [0.0] * 7


# -------------------------------------------------------------------------------------------------------------- refusal
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_repeated_and_the_key_is_not_shown(status: int, stub, tmp_path: Path) -> None:
    stub.answers = [body({"error": f"bad key {KEY}"}, status)]
    with pytest.raises(UserError, match=f"status {status}: .*bad key ") as error:
        make(stub, tmp_path, key=KEY).first_token("Which?")
    assert len(stub.requests) == 1 and KEY not in str(error.value)
    assert KEY not in (tmp_path / "calls.jsonl").read_text() and rows(tmp_path)[0]["error"]


def test_another_address_is_not_followed(stub, tmp_path: Path) -> None:
    stub.answers = [body(b"", 302, Location=f"{stub.url}/elsewhere")]
    with pytest.raises(UserError, match="status 302"):
        make(stub, tmp_path, key=KEY).first_token("Which?")
    assert len(stub.requests) == 1


def test_a_server_without_log_probabilities(stub, tmp_path: Path) -> None:
    stub.answers = [body({"choices": [{"message": {"content": "A"}, "logprobs": None}]})]
    with pytest.raises(
        UserError, match="gives no log-probabilities .logprobs is null., which the judge needs; 0 answers are kept"
    ):
        make(stub, tmp_path).first_token("Which?")
    assert len(stub.requests) == 1


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\u00e9"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str, stub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--key-variable: the key has a character") as error:
        make(stub, tmp_path, key=key)
    assert KEY not in str(error.value)


def test_no_other_key_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that stands for this server in ~/.netrc, where `requests` looks."""
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with CallLog(tmp_path / "calls.jsonl") as log:
        session = Endpoint(Config(url="https://example.org/v1", model="m"), log)._session
        call = session.prepare_request(requests.Request("POST", "https://example.org/v1"))
    assert "Authorization" not in call.headers


REFUSED = ["ftp://x/v1", " ", "x/v1", "http://example.org/v1", f"https://me:{KEY}@example.org/v1", f"{KEY}@x.org"]


@pytest.mark.parametrize("url", REFUSED)
def test_addresses_that_are_refused(url: str, tmp_path: Path) -> None:
    with CallLog(tmp_path / "calls.jsonl") as log, pytest.raises(UserError, match="^--url") as error:
        Endpoint(Config(url=url, model="m"), log, key=KEY)
    assert KEY not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- budget
def test_the_budget_of_calls_counts_failures_and_earlier_runs(stub, tmp_path: Path) -> None:
    stub.answers = [body(b"", 500), good()]
    first = make(stub, tmp_path, max_calls=3)
    first.first_token("1")  # two calls
    first.log.close()
    again = make(stub, tmp_path, max_calls=3)
    again.first_token("2")
    with pytest.raises(UserError, match="--max-calls 3: the budget of calls is spent; 2 answers are kept in"):
        again.first_token("3")
    assert again.first_token("1") and len(stub.requests) == 3, "what is known costs nothing"


@pytest.mark.parametrize("tokens, calls", [(40, 3), (None, 1)])
def test_the_budget_of_tokens(tokens: int | None, calls: int, stub, tmp_path: Path) -> None:
    """As the server counts; where it does not, a request of about 200 bytes is taken for as many tokens."""
    stub.answers = [good(tokens=tokens)]
    endpoint = make(stub, tmp_path, max_tokens=100)
    for number in range(calls):
        endpoint.first_token(str(number))
    with pytest.raises(UserError, match="--max-tokens 100: the budget of tokens is spent"):
        endpoint.first_token("more")
    assert len(stub.requests) == calls


# ------------------------------------------------------------------------------------------------------------------ log
def test_a_torn_line_is_dropped_and_a_foreign_file_is_refused(stub, tmp_path: Path) -> None:
    with make(stub, tmp_path).log as log:
        log.add({"key": "k", "answer": {"A": -0.1}, "tokens": 7})
    path = tmp_path / "calls.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    with CallLog(path) as log:
        assert log.calls == 1 and len(log.answers) == 1 and log.tokens == 7
    assert path.read_bytes() == whole
    for line in (b"{}", b"[1]", b"no", b'{"key": "k", "answer": 3, "tokens": 1}'):
        path.write_bytes(whole + line + b"\nmore")
        with pytest.raises(UserError, match="calls.jsonl:2: (not a line of a log of calls|is not a JSON object)"):
            CallLog(path)
        assert path.read_bytes().endswith(b"more"), "another's file is left as it is"


def test_two_processes_cannot_share_a_log(tmp_path: Path) -> None:
    with (
        CallLog(tmp_path / "calls.jsonl"),
        pytest.raises(UserError, match="is writing there; wait for its end or give another --calls"),
    ):
        CallLog(tmp_path / "calls.jsonl")


# ------------------------------------------------------------------------------------------------------------- verdict
def test_the_share_of_a_letter_however_it_is_written() -> None:
    logprobs = {"A": -1.0, " a": -2.0, "[B": -1.5, "(B)": -3.0, "The": -0.5}
    # (e^-1 + e^-2) / (e^-1 + e^-2 + e^-1.5 + e^-3) = 0.503215 / 0.776132
    assert share_of("A", "B", logprobs) == pytest.approx(0.648363, abs=1e-6)
    assert share_of("A", "B", {"A": -0.1}) == 1.0
    assert share_of("A", "B", {"The": -0.1, "AB": -2.0}) is None


def test_candidates_are_labelled_in_both_orders(stub, tmp_path: Path, monkeypatch, capsys) -> None:
    """The stub prefers "good", more so where it reads it first; about "mute" it gives one verdict of two."""

    def judge(handler: Stub) -> None:
        text = handler.server.requests[-1][2]["messages"][0]["content"]
        first = text.index("[A] good") if "[A] good" in text else -1
        if "mute" in text and first >= 0:
            top = [{"token": "Well", "logprob": -0.1}]
            body({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]})(handler)
        else:
            good(*(-0.05, -3.0) if first >= 0 else (-1.2, -0.36))(handler)

    stub.answers = [judge]
    names = ["one", "two", "mute"]
    write_records(tmp_path / "c.jsonl", [{"prompt": f"Question {n}?", "responses": [" good", " bad"]} for n in names])
    monkeypatch.setenv("MY_KEY", KEY)
    config = Config(
        candidates=tmp_path / "c.jsonl",
        output=tmp_path / "labels.jsonl",
        calls=tmp_path / "calls.jsonl",
        url=stub.url,
        model="m",
        key_variable="MY_KEY",
        instruction="Be fair.\n",
    )
    labels = {label.prompt: label for label in read_labels(client.main(config))}
    assert labels["Question mute?"].verdict == "skip" and len(stub.requests) == 6
    for name in ("one", "two"):
        found = labels[f"Question {name}?"]
        assert found.ranks == (0, 1) and found.labeller == "endpoint"
        good_first, bad_first = 0.950263, 0.301535  # 1/(1+e^(-3+0.05)), 1/(1+e^(-0.36+1.2))
        orders = (good_first, bad_first) if found.shown == (0, 1) else (bad_first, good_first)
        assert found.orders == pytest.approx(orders, abs=1e-5)
    texts = [request["messages"][0]["content"] for _, _, request in stub.requests]
    assert all(text.startswith("Be fair.\nQuestion ") and text.count("[A]") == 1 for text in texts)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in stub.requests)
    assert "6 calls" in capsys.readouterr().out


def test_a_run_that_ran_out_of_budget_goes_on(stub, tmp_path: Path) -> None:
    rows_ = [{"prompt": f"Question {i}?", "responses": [" a", " b"]} for i in range(3)]
    write_records(tmp_path / "c.jsonl", rows_)
    files = {"candidates": tmp_path / "c.jsonl", "output": tmp_path / "l.jsonl", "calls": tmp_path / "calls.jsonl"}
    settings = {**files, "url": stub.url, "model": "m", "key_variable": "MINIRLHF_TEST_NO_KEY"}
    with pytest.raises(UserError, match="--max-calls 4: the budget"):
        client.main(Config(**settings, max_calls=4))
    assert not (tmp_path / "l.jsonl").exists()
    assert len(read_labels(client.main(Config(**settings, max_calls=6)))) == 3
    assert len(stub.requests) == 6, "none was asked twice"


def test_which_server_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--url and --model"):
        client.main(Config(run=tmp_path))

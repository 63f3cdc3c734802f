"""Labelling in the browser: who is let in, what a press does over HTTP, and the page itself in a real Chromium."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import labelling
import pytest
import tiny

import train_reward
from minirlhf.feedback import label
from minirlhf.feedback.labels import read_labels
from minirlhf.feedback.page import HTML, LARGEST, PageServer
from minirlhf.feedback.session import Session
from minirlhf.files import write_records
from minirlhf.reward import RewardModel
from minirlhf.runtime import UserError

CHROMIUM = browser.executable()
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed: the page is tested over HTTP only"
)


class Client:
    """Requests to a server as a browser would send them, or as one should not."""

    def __init__(self, server: PageServer) -> None:
        self.server = server

    def request(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, Any, str]:
        connection = http.client.HTTPConnection(*self.server.server_address[:2], timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, content

    def press(self, key: str, version: int, note: str = "", **headers: str) -> tuple[int, dict]:
        body = json.dumps({"version": version, "key": key, "note": note})
        status, _, content = self.request("POST", f"/{self.server.token}/press", body, **headers)
        return status, json.loads(content) if content.startswith("{") else {}

    def state(self) -> dict:
        return json.loads(self.request("GET", f"/{self.server.token}/state")[2])


@contextlib.contextmanager
def serving(session: Session) -> Iterator[PageServer]:
    with PageServer(session, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with serving(labelling.session_on(tmp_path)) as running:
        yield running


def test_only_this_machine_and_the_token_are_let_in(server: PageServer) -> None:
    client, token = Client(server), server.token
    assert server.server_address[0] == "127.0.0.1" and len(token) >= 20
    assert PageServer.__mro__[1].__name__ == "ThreadingHTTPServer"
    for path in ("/", "/state", f"/{token}", f"/{token[:-1]}/state", f"/{token}x/", f"/{token}/../state", "//", "/x/"):
        for method in ("GET", "POST"):
            status, _, content = client.request(method, path, "{}" if method == "POST" else None)
            assert status == 404 and "Question" not in content and token not in content, path
    for host in ("evil.example", "localhost", f"127.0.0.1:{server.server_address[1] + 1}"):
        assert client.request("GET", f"/{token}/state", Host=host)[0] == 404
    assert client.press("1", 0, Origin="http://evil.example")[0] == 403
    assert client.press("1", 0, Origin="null")[0] == 403
    for method in ("OPTIONS", "PUT", "DELETE"):
        assert client.request(method, f"/{token}/press")[0] == 501
    assert server.session.file.labels == []


def test_the_page_may_load_nothing_and_says_nothing_to_others(server: PageServer) -> None:
    status, headers, content = Client(server).request("GET", f"/{server.token}/")
    assert status == 200 and "Access-Control-Allow-Origin" not in headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    assert f"script-src 'nonce-{server.nonce}'" in policy and content.count(server.nonce) == 2
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    source = HTML.read_text()
    assert "http:" not in source and "https:" not in source and "//" not in source.replace("// ", "")
    assert "innerHTML" not in source and "src=" not in source and "@import" not in source


def test_a_press_is_saved_before_it_is_answered(server: PageServer, tmp_path: Path) -> None:
    client = Client(server)
    before = client.state()
    assert before["done"] == 0 and before["total"] == 4 and before["version"] == 0
    task = server.session.current
    assert before["prompt"] == task.question and before["answers"] == [a.strip() for a in task.answers]
    status, after = client.press("2", 0, note=" why\n")
    (saved,) = read_labels(tmp_path / "labels.jsonl")
    assert status == 200 and saved.verdict == "right" and saved.note == "why" and saved.shown == task.shown
    assert after["done"] == 1 and after["message"] == "saved: right" and after["prompt"] != before["prompt"]
    moving = ("rate", "minutes_left")  # with the clock
    assert {k: v for k, v in client.state().items() if k not in moving} == {
        k: v for k, v in after.items() if k not in moving
    }
    status, undone = client.press("u", after["version"])
    assert status == 200 and undone["prompt"] == before["prompt"] and undone["note"] == "why"
    assert (tmp_path / "labels.jsonl").read_bytes() == b""


def test_a_stale_page_labels_nothing(server: PageServer) -> None:
    client = Client(server)
    client.press("1", 0)
    status, state = client.press("1", 0)  # a second tab, or a double click
    assert status == 409 and state["version"] == 1 and len(server.session.file.labels) == 1


@pytest.mark.parametrize(
    "body, status",
    [
        ("", 400),
        ("{", 400),
        ("[]", 400),
        ('{"version": 0, "key": "1"}', 400),
        ('{"version": "0", "key": "1", "note": ""}', 400),
        ('{"version": true, "key": "1", "note": ""}', 400),
        ('{"version": 0, "key": 1, "note": ""}', 400),
        ('{"version": 0, "key": "1", "note": "\\ud800"}', 400),
        ("x" * (LARGEST + 1), 413),
    ],
)
def test_nonsense_is_refused(body: str, status: int, server: PageServer) -> None:
    assert Client(server).request("POST", f"/{server.token}/press", body)[0] == status
    assert server.session.file.labels == [] and server.session.version == 0


def test_a_length_that_is_none_is_refused(server: PageServer) -> None:
    for length in ("-1", "x", ""):
        assert Client(server).request("POST", f"/{server.token}/press", "{}", Content_Length=length)[0] == 413


def test_rankings_are_picked_on_the_page_too(tmp_path: Path) -> None:
    with serving(labelling.session_on(tmp_path, prompts=2, count=3)) as server:
        client, version = Client(server), 0
        for key in "31":
            _, state = client.press(key, version)
            version = state["version"]
        assert state["picked"] == [[3], [1]] and client.state()["picked"] == [[3], [1]]
        client.press("2", version)
        (found,) = server.session.file.labels
        assert [found.ranks[i] for i in found.shown] == [1, 2, 0]


def test_a_label_that_cannot_be_saved_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = labelling.session_on(tmp_path)
    failures = []
    with PageServer(session, port=0) as server:

        def run() -> None:
            with pytest.raises(UserError, match="not saved"):
                server.serve_forever(poll_interval=0.02)
            failures.append(True)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def full(*_: object) -> None:
            raise UserError("the label was not saved (No space left on device)")

        monkeypatch.setattr(session.file, "append", full)
        status, state = Client(server).press("1", 0)
        thread.join(10)
    assert status == 500 and "not saved" in state["message"] and failures and state["done"] == 0


def test_a_port_that_is_taken(server: PageServer, tmp_path: Path) -> None:
    port = server.server_address[1]
    candidates = {"candidates": tmp_path / "candidates.jsonl", "output": tmp_path / "other.jsonl"}
    with pytest.raises(UserError, match=f"--port {port}: cannot be used"):
        label.main(label.Config(page=True, port=port, **candidates))


# ------------------------------------------------------------------------------------------------------- a real browser
@needs_chromium
def test_twenty_labels_from_the_browser_train_a_reward_model(tmp_path: Path) -> None:
    run = tiny.copy_of(tiny.finished_run(), tmp_path / "run", "sft")
    evil = " <img src=x onerror='document.title=1'><script>document.title=2</script>&amp;"
    rows = [{"prompt": p, "responses": [" Yes.", f"{evil}{i}"]} for i, p in enumerate(tiny.PROMPTS)]
    write_records(tmp_path / "candidates.jsonl", rows)
    session = labelling.session_on(tmp_path)
    with serving(session) as server:
        with browser.Browser(CHROMIUM, server.url) as page:
            page.wait_for("typeof state === 'object' && state !== null")
            assert page.run("document.querySelectorAll('#answers img, #answers script').length") == 0
            assert "<img src=x" in page.run("document.querySelector('#answers').innerText")
            picture(page, "pair")
            keys = ["ArrowLeft", "ArrowRight", "t", "b", "s", *"121212121212121"]
            for number, key in enumerate(keys, 1):
                page.press(key)
                page.wait_for(f"state.version === {number} && !waiting")
            assert page.run("document.title") == "Label answers"
            assert "All done" in page.run("document.querySelector('#prompt').innerText")
            assert all(url.startswith(server.url) for url in page.requests) and len(page.requests) >= 21
    labels = read_labels(tmp_path / "labels.jsonl")
    verdicts = ["left", "right", "tie", "bad", "skip", *(["left", "right"] * 8)[:15]]
    assert [x.verdict for x in labels] == verdicts
    config = tiny.reward_config(run)
    config.comparisons, config.reference_prompts = str(tmp_path / "labels.jsonl"), None
    RewardModel.from_pretrained(train_reward.main(config))


@needs_chromium
def test_the_page_by_keyboard_alone_and_for_screen_readers(tmp_path: Path) -> None:
    session = labelling.session_on(tmp_path, prompts=3, count=3)
    with serving(session) as server:
        with browser.Browser(CHROMIUM, server.url) as page:
            page.wait_for("typeof state === 'object' && state !== null")
            assert page.accessible("article") == ["Answer 1", "Answer 2", "Answer 3"]
            assert page.accessible("progressbar") == ["Tasks done"] or page.accessible("ProgressIndicator") == [
                "Tasks done"
            ]
            buttons = page.accessible("button")
            assert buttons[0] == "Answer 1 is next best 1" and "Undo u" in buttons and "Skip s" in buttons
            assert len(buttons) == 9 and any("Note" in name for name in page.accessible("textbox"))
            page.press("2")
            page.wait_for("state.version === 1 && !waiting")
            assert page.accessible("article") == ["Answer 1", "Answer 2: rank 1", "Answer 3"]
            picture(page, "ranking")
            page.press("n")
            for key in ("b", "2"):  # while a note is written, keys are letters
                page.press(key)
            page.press("Escape")
            assert session.version == 1 and page.run("document.querySelector('#note').value") == "b2"
            page.press("Enter")
            page.wait_for("state.version === 2 && !waiting")
            (found,) = session.file.labels
            assert [found.ranks[i] for i in found.shown] == [1, 0, 1] and found.note == "b2"
            for _ in range(12):  # nine buttons, the note, and round
                page.press("Tab")
                if page.run("document.activeElement.innerText") == "Answer 2 is next best 2":
                    break
            page.press("Enter")  # on a button: presses it, and nothing else
            page.wait_for("state.version === 3 && !waiting")
            assert session.picked == [[1]]
            assert page.run("document.activeElement.innerText") == "Answer 2 is next best 2", "the focus stays"


def picture(page: browser.Browser, name: str) -> None:
    """Keep a screenshot where MINIRLHF_SCREENSHOTS names a folder, for people to look at."""
    folder = os.environ.get("MINIRLHF_SCREENSHOTS")
    if folder:
        page.picture(Path(folder) / f"{name}.png")

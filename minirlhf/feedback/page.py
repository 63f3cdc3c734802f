"""Labelling on a page in the browser: a server for one person on this machine.

It listens on 127.0.0.1 alone, answers only requests whose path starts with a secret token and whose Host is its own
address (a foreign site that resolves its name to 127.0.0.1 is refused), sends no CORS headers, and its page loads
nothing from elsewhere, which its Content-Security-Policy enforces. `page.html` holds the page.
Left out: several labellers at once (each starts a server with a file of his or her own) and encryption.
"""

from __future__ import annotations

import json
import secrets
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from minirlhf.data.formats import text_of
from minirlhf.feedback.session import Session
from minirlhf.runtime import UserError

HTML = Path(__file__).with_name("page.html")
LARGEST = 65_536  # bytes of a request
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def label_on_page(session: Session, *, port: int) -> None:
    """Serve the page until Ctrl-C. Raises UserError where the port is taken."""
    with PageServer(session, port=port) as server:
        print(f"open {server.url}\nevery label is saved at once; Ctrl-C stops the server", flush=True)
        server.serve_forever(poll_interval=0.2)


def state(session: Session) -> dict[str, Any]:
    """The page's content; `version` tells it from every other state of this session."""
    task = session.current
    return {
        "version": session.version,
        "prompt": task.question if task else None,
        "answers": [answer.strip() for answer in task.answers] if task else [],
        "picked": [[i + 1 for i in level] for level in session.picked],
        "note": session.note,
        "message": session.message,
        **session.progress,
    }


class PageServer(ThreadingHTTPServer):
    """The server of one session; `url` is its address with the token."""

    daemon_threads = True  # a browser keeps connections open; they do not hold up the end

    def __init__(self, session: Session, *, port: int) -> None:
        self.session, self.token, self.nonce = session, secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        self.lock = threading.Lock()  # held while the session is read or changed: each request has a thread
        self.failure: UserError | None = None
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--port {port}: cannot be used ({error.strerror}); 0 takes a free one") from error
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"http://{self.host}/{self.token}/"

    def server_bind(self) -> None:
        """Without the look-up of the machine's name that the library makes here."""
        socketserver.TCPServer.server_bind(self)

    def service_actions(self) -> None:
        """Called between requests: what could not be saved ends the server."""
        if self.failure is not None:
            raise self.failure


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /state its state, POST /press presses a key; all below the token."""

    server: PageServer
    server_version, sys_version = "minirlhf", ""
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds a connection may be silent

    def do_GET(self) -> None:
        """The page or its state."""
        place = self._place()
        if place == "":
            page = HTML.read_text(encoding="utf-8").replace("{{nonce}}", self.server.nonce)
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())
        elif place == "state":
            with self.server.lock:
                self._send_json(HTTPStatus.OK, state(self.server.session))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Press a key in the state that the page shows; 409 with the new state where it has changed since."""
        size, origin = self.headers.get("Content-Length", ""), f"http://{self.server.host}"
        if self._place() != "press":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif self.headers.get("Origin", origin) != origin:
            self._refuse(HTTPStatus.FORBIDDEN)
        elif not size.isdecimal() or int(size) > LARGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            self._press(self.rfile.read(int(size)))

    def _press(self, body: bytes) -> None:
        try:
            values = json.loads(body)
            version, key, note = values["version"], text_of(values, "key"), text_of(values, "note")
            if type(version) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        session = self.server.session
        with self.server.lock:
            if version != session.version:
                self._send_json(HTTPStatus.CONFLICT, state(session))
                return
            session.note = note.strip()
            try:
                session.press(key)
            except UserError as error:
                session.message = str(error)
                self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, state(session))
                self.server.failure = error
            else:
                self._send_json(HTTPStatus.OK, state(session))

    def _place(self) -> str | None:
        """The path below the token; None where token or Host are wrong."""
        token, slash, place = self.path.removeprefix("/").partition("/")
        ours = secrets.compare_digest(token.encode(), self.server.token.encode())
        return place if ours and slash and self.headers.get("Host") == self.server.host else None

    def _send_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # its body was not read
        self._send(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}
        for name, value in headers.items():
            self.send_header(name, value.replace("{nonce}", self.server.nonce))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: their paths hold the token."""

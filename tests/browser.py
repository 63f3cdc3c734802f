"""A headless Chromium, driven over a pipe in its DevTools protocol: one page, keys, scripts, pictures."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 30.0  # seconds for an answer


def executable() -> str | None:
    """A Chromium on this machine: the one that MINIRLHF_CHROMIUM names, else a known name."""
    named = os.environ.get("MINIRLHF_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. Use it in a `with`."""

    def __init__(self, path: str, url: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="minirlhf-browser-", ignore_cleanup_errors=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={self.folder.name}", "--window-size=1100,800", "--no-first-run"]
        theirs_in, self.out = (fcntl.fcntl(d, fcntl.F_DUPFD, 20) for d in os.pipe())
        self.input, theirs_out = (fcntl.fcntl(d, fcntl.F_DUPFD, 20) for d in os.pipe())

        def connect() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for descriptor in (theirs_in, theirs_out, self.input, self.out):
            os.set_inheritable(descriptor, False)
        self.process = subprocess.Popen([path, *flags], preexec_fn=connect, close_fds=False, **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.buffer, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.requests: list[str] = []
        self.call("Network.enable")
        self.call("Page.enable")
        self.call("Page.navigate", url=url)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            assert select.select([self.input], [], [], max(0.0, end - time.monotonic()))[0], "the browser is silent"
            chunk = os.read(self.input, 1 << 16)
            assert chunk, "the browser has stopped"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until an expression is true in the page."""
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < end, f"{condition}\n{self.run('document.body.innerText')}"
            time.sleep(0.01)

    def press(self, key: str) -> None:
        """Press and release a key of the keyboard: a character, or a name as "ArrowLeft"."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        what = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def accessible(self, role: str) -> list[str]:
        """The names that a screen reader says, of everything with this role."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        found = [n for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") == role]
        return [node.get("name", {}).get("value", "") for node in found]

    def picture(self, path: Path) -> None:
        """A PNG of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(timeout=5)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.input)
        self.folder.cleanup()

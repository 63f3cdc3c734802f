"""What every test relies on: one thread, no network, and where the real data is."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: on busy cores threads wait for each other
settings.register_profile("untimed", deadline=None)  # no test asserts a time
settings.load_profile("untimed")
os.fsync = lambda number: None  # a test that is killed leaves the page cache whole; those of the order put in their own
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
# A shell starts what it puts into the background with Ctrl-C ignored, and so do the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection beyond this machine fails."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test opened a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data named by MINIRLHF_REAL_DATA; tests that need it are skipped where it is unset."""
    folder = os.environ.get("MINIRLHF_REAL_DATA")
    if not folder:
        pytest.skip("MINIRLHF_REAL_DATA is not set: no real data to test with")
    return Path(folder)

"""Real processes for tests that look at the outside: a controller, and what a missing tool means."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

START_SECONDS = 30.0
STOP_SECONDS = 15.0


def tool(name: str) -> str:
    """Path of a program that a system package provides. Missing: not run, by name; with REQUIRE_ALL=1 a failure."""
    found = shutil.which(name)
    if found:
        return found
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(f"REQUIRE_ALL=1 and {name} is not installed")
    pytest.skip(f"{name} is not installed")


class ControllerProcess:
    """`gns-controller serve` on a loopback port, with its database in `directory`."""

    def __init__(self, directory: Path, *, guarded: bool = False) -> None:
        self.directory = directory
        self.token: str | None = None
        self.port = 0
        self.url = ""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("GNS_")}
        self.process: subprocess.Popen[bytes] | None = None
        if guarded:
            self.token = secrets.token_urlsafe(32)
            self.environment["GNS_TOKEN_HASHES"] = hashlib.sha256(self.token.encode()).hexdigest()

    def start(self) -> ControllerProcess:
        ready = self.directory / "ready"
        ready.unlink(missing_ok=True)
        log = (self.directory / "controller.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gns_controller", "serve"),
                    *("--port", str(self.port)),
                    *("--database-url", self.database_url),
                    *("--ready-file", str(ready)),
                ],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while not (ready.exists() and ready.read_text().strip()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    "the controller did not start:\n" + (self.directory / "controller.log").read_text()
                )
            time.sleep(0.05)
        self.url = ready.read_text().strip().rstrip("/")
        self.port = httpx.URL(self.url).port or 0
        return self

    def kill(self) -> None:
        """SIGKILL, as a crash or the out-of-memory killer would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def stop(self) -> int | None:
        """SIGTERM; SIGKILL when that does not help. The exit status, or None if it was not running."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(STOP_SECONDS)
        self.process = None
        return status

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.directory / 'gns.db'}"

    def client(self) -> httpx.Client:
        """A client as a trainer would have it; the caller closes it."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

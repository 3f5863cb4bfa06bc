"""Child processes that never outlive us: of the demonstration and of a calibration."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def child(
    command: list[str], *, stdout: IO[str] | int, stderr: int = subprocess.STDOUT
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in its own session: a Ctrl-C reaches us first, and its whole group ends with the context."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True, env=environment
    )
    try:
        yield process
    finally:
        for signal_number, patience_seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(process.pid, signal_number)
            except ProcessLookupError:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_seconds)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def end_on_signals() -> None:
    """A closed terminal or a polite kill unwinds like Ctrl-C, so that no child stays behind."""
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, _leave)


def _leave(signal_number: int, _frame: object) -> None:
    raise SystemExit(128 + signal_number)

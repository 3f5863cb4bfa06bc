"""Who wants to know that a run has something new. Knows no event loop: a listener is a function, called quickly."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Listeners:
    """Functions by run, called after a commit, in the thread that committed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_run: dict[str, list[Callable[[], object]]] = {}

    @contextmanager
    def listening(self, run_id: str, listener: Callable[[], object]) -> Iterator[None]:
        """Call `listener` whenever something of this run was committed."""
        with self._lock:
            self._by_run.setdefault(run_id, []).append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._by_run[run_id].remove(listener)
                if not self._by_run[run_id]:
                    del self._by_run[run_id]

    def notify(self, run_id: str) -> None:
        """Call them. One that raises is gone in spirit and stops nobody."""
        with self._lock:
            listeners = list(self._by_run.get(run_id, ()))
        for listener in listeners:
            try:
                listener()
            except RuntimeError:  # its event loop has closed
                logger.debug("listener of a closed stream: run_id=%s", run_id)

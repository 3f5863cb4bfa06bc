"""Subscriptions to runs: which requests are woken when something of a run was committed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Subscriptions:
    """Callbacks by run, called after a commit, in the thread that committed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_run: dict[str, list[Callable[[], object]]] = {}

    @contextmanager
    def subscribed(self, run_id: str, callback: Callable[[], object]) -> Iterator[None]:
        """Call `callback` whenever something of this run was committed, as long as the context lasts."""
        with self._lock:
            self._by_run.setdefault(run_id, []).append(callback)
        try:
            yield
        finally:
            with self._lock:
                self._by_run[run_id].remove(callback)
                if not self._by_run[run_id]:
                    del self._by_run[run_id]

    def notify(self, run_id: str) -> None:
        """Notify all subscribers of a run. A subscriber whose event loop has closed is skipped."""
        with self._lock:
            callbacks = list(self._by_run.get(run_id, ()))
        for callback in callbacks:
            try:
                callback()
            except RuntimeError:  # its event loop has closed
                logger.debug("subscriber of a closed stream: run_id=%s", run_id)

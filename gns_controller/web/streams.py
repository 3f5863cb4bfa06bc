"""Requests that wait for a commit: how many there may be, what wakes them, and how they all end at shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gns_controller.service.subscriptions import Subscriptions
from gns_controller.web.problems import STOPPING, TOO_MANY_STREAMS, ProblemError


class Streams:
    """All waiting requests of one event loop.

    Args:
        subscriptions: source of the commits.
        limit: most waiting requests.
    """

    def __init__(self, subscriptions: Subscriptions, *, limit: int) -> None:
        self._subscriptions = subscriptions
        self._limit = limit
        self._waiting: set[asyncio.Event] = set()
        self.stopping = False

    def refuse_if_full(self) -> None:
        """Raise a problem instead of opening one more."""
        if self.stopping:
            raise ProblemError(STOPPING, "The controller is shutting down; come back when it is up again.")
        if len(self._waiting) >= self._limit:
            raise ProblemError(TOO_MANY_STREAMS, f"{self._limit} streams are open, and that is the limit.")

    @contextmanager
    def woken_by(self, run_id: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever something of this run was committed, and at shutdown."""
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._waiting.add(event)
        try:
            with self._subscriptions.subscribed(run_id, lambda: loop.call_soon_threadsafe(event.set)):
                yield event
        finally:
            self._waiting.discard(event)

    def stop(self) -> None:
        """Wake all waiting requests; each looks at `stopping` and ends."""
        self.stopping = True
        for event in tuple(self._waiting):
            event.set()


async def wait_for(event: asyncio.Event, *, seconds: float) -> bool:
    """Return whether the event was set in time, and clear it."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    event.clear()
    return True

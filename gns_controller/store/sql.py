"""The store on SQLite or PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from datetime import datetime
from typing import TypeVar, cast

from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from gns_controller.core.errors import StoreUnavailableError
from gns_controller.store.engine import (
    acquire_lease,
    check_integrity,
    make_engine,
    opening_error,
    parse_url,
    running_error,
)
from gns_controller.store.migrate import upgrade
from gns_controller.store.protocol import LogEntry, RunHead, Transaction
from gns_controller.store.tables import IS_NO_MEASUREMENT, log, probe, runs
from gns_controller.store.transaction import SqlTransaction, select_heads, to_entry, to_head, to_microseconds
from gns_controller.store.writer import CommitObserver, Writer

Result = TypeVar("Result")

_CHECK_VALID_SECONDS = 1.0
"""Readiness checks within this time share one write."""


class SqlStore:
    """Opens, migrates and holds one database; see `Store` for what it can do.

    Args:
        database_url: sqlite:///path or postgresql://...
        queue_size: writes that may wait before more are refused.
        observe_commit: told about every commit.

    Raises:
        InvalidInputError: the URL cannot be used.
        StoreUnavailableError: it cannot be opened, or another process holds it.
        DatabaseCorruptError: damaged, or not ours.
        DatabaseTooNewError: written by a newer version.
    """

    def __init__(
        self, database_url: str, *, queue_size: int = 1000, observe_commit: CommitObserver | None = None
    ) -> None:
        url = parse_url(database_url)
        self._write_engine = make_engine(url, pool_size=2, writes=True)
        self._read_engine = make_engine(url, pool_size=8, writes=False)
        release: Callable[[], None] = lambda: None  # noqa: E731 - replaced once there is something to release
        try:
            release = acquire_lease(url, self._write_engine)
            with self._write_engine.begin() as connection:
                check_integrity(connection, url)
                upgrade(connection)
        except SQLAlchemyError as error:
            self._dispose()
            release()
            raise opening_error(error) from None
        except BaseException:
            self._dispose()
            release()
            raise
        self._release = release
        self._closed = False
        self._writer = Writer(self._write_engine, queue_size=queue_size, observe_commit=observe_commit)
        self._check_lock = threading.Lock()
        self._checked_at = -_CHECK_VALID_SECONDS

    def submit(self, job: Callable[[Transaction], Result]) -> Future[Result]:
        """Queue a write; the future resolves once it is on disk."""
        return self._writer.submit(job)

    def num_queued(self) -> int:
        """Jobs that wait for the writer."""
        return self._writer.num_queued

    def close(self) -> None:
        """Finish what is queued, then let go of the database. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        self._dispose()
        self._release()

    def head(self, run_id: str) -> RunHead | None:
        """The run as last committed."""
        with self._reading() as connection:
            row = connection.execute(select_heads().where(runs.c.run_id == run_id)).one_or_none()
        return None if row is None else to_head(row)

    def heads(self, *, limit: int, before: int | None = None) -> list[RunHead]:
        """Runs, newest registration first."""
        query = select_heads().order_by(runs.c.registered_sequence.desc()).limit(limit)
        if before is not None:
            query = query.where(runs.c.registered_sequence < before)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [to_head(row) for row in rows]

    def recent_heads(self, *, limit: int, since: datetime) -> list[RunHead]:
        """Runs that reported or registered since then, the latest first."""
        latest = func.coalesce(runs.c.last_report_at, runs.c.attempt_at)
        query = select_heads().where(latest >= to_microseconds(since)).order_by(latest.desc()).limit(limit)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [to_head(row) for row in rows]

    def entries(
        self,
        run_id: str,
        *,
        limit: int,
        measurements: bool | None = None,
        after: int | None = None,
        descending: bool = False,
    ) -> list[LogEntry]:
        """Log lines of one run, beyond sequence `after` in the chosen direction: all, measurements, or all others."""
        query = select(log).where(log.c.run_id == run_id).limit(limit)
        if measurements is not None:
            query = query.where(~IS_NO_MEASUREMENT if measurements else IS_NO_MEASUREMENT)
        if after is not None:
            query = query.where(log.c.sequence < after if descending else log.c.sequence > after)
        query = query.order_by(log.c.sequence.desc() if descending else log.c.sequence)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [to_entry(row) for row in rows]

    def plan_changes(self, run_id: str, *, limit: int) -> list[LogEntry]:
        """The last `limit` log lines that began a plan, oldest first."""
        query = (
            select(log)
            .where(log.c.run_id == run_id, log.c.changes_plan.is_(True))
            .order_by(log.c.sequence.desc())
            .limit(limit)
        )
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [to_entry(row) for row in reversed(rows)]

    def check(self, *, timeout_seconds: float) -> None:
        """Write and read back; checks within a second of a good one share its answer."""
        if not self._check_lock.acquire(timeout=timeout_seconds):
            raise StoreUnavailableError(f"the store did not write within {timeout_seconds:g} s.")
        try:
            if time.monotonic() - self._checked_at < _CHECK_VALID_SECONDS:
                return
            try:
                self._writer.submit(_write_probe).result(timeout_seconds)
            except FutureTimeoutError:
                raise StoreUnavailableError(f"the store did not write within {timeout_seconds:g} s.") from None
            with self._reading() as connection:
                connection.execute(select(func.count()).select_from(probe)).scalar_one()
            self._checked_at = time.monotonic()
        finally:
            self._check_lock.release()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._read_engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise running_error(error, doing="read") from None

    def _dispose(self) -> None:
        self._write_engine.dispose()
        self._read_engine.dispose()


def _write_probe(transaction: Transaction) -> None:
    """A row that needs pages of its own, so that a full disk shows, and is gone again at commit."""
    connection: Connection = cast(SqlTransaction, transaction).connection
    connection.execute(insert(probe), {"number": 1, "filler": "." * 8192})
    connection.execute(delete(probe))

"""Engines: how this program talks to SQLite and to PostgreSQL, and what their failures mean."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError, SQLAlchemyError

from gns_controller.core.errors import (
    DatabaseCorruptError,
    InvalidInputError,
    MissingDependencyError,
    StoreError,
    StoreUnavailableError,
)

logger = logging.getLogger(__name__)

_LEASE_KEY = 0x676E73
"""Name of our advisory lock in PostgreSQL: "gns"."""

_QUICK_CHECK_BYTES = 64 * 2**20
"""SQLite files up to this size are checked page by page when opened; it takes well under a second."""


def parse_url(database_url: str) -> URL:
    """The URL, with the driver we ship.

    Raises:
        InvalidInputError: not a URL, or a database we do not know.
    """
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise InvalidInputError(
            "the database URL cannot be read; write sqlite:///gns.db or postgresql://user:password@host/name."
        ) from None
    backend = url.get_backend_name()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise InvalidInputError(f"databases are SQLite or PostgreSQL, not {backend!r}.")
    if url.database in (None, "", ":memory:") or "uri" in url.query:
        raise InvalidInputError("a database in memory would lose every run; name a file: sqlite:///gns.db.")
    return url


def make_engine(url: URL, *, pool_size: int, writes: bool) -> Engine:
    """An engine whose connections are set up for us; SQLite transactions begin by locking if they will write."""
    if url.get_backend_name() != "sqlite":
        try:
            return create_engine(url, pool_size=pool_size, max_overflow=0, pool_pre_ping=True)
        except ImportError as error:
            raise MissingDependencyError(
                "PostgreSQL needs a driver: pip install 'gns-controller[postgres]'."
            ) from error
    engine = create_engine(url, pool_size=pool_size, max_overflow=0, connect_args={"timeout": 5.0})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # this driver's own BEGIN would come too late; ours is below
        cursor = connection.cursor()
        if writes:
            cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def check_integrity(connection: Connection, url: URL, *, thorough: bool = False) -> None:
    """Raise DatabaseCorruptError unless the file reads as a sound database."""
    if connection.dialect.name != "sqlite":
        connection.execute(text("SELECT 1"))
        return
    connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
    small = Path(str(url.database)).stat().st_size <= _QUICK_CHECK_BYTES
    if thorough or small:
        found = connection.exec_driver_sql("PRAGMA integrity_check(1)" if thorough else "PRAGMA quick_check(1)")
        if found.scalar_one() != "ok":
            raise _corrupt()


def acquire_lease(url: URL, engine: Engine) -> Callable[[], None]:
    """Keep every other controller off this database; returns the release.

    Raises:
        StoreUnavailableError: another process holds it.
    """
    taken = StoreUnavailableError(
        "another gns-controller process uses this database. Stop it first, or point GNS_DATABASE_URL elsewhere: "
        "one process is the unit."
    )
    if url.get_backend_name() == "sqlite":
        try:
            descriptor = os.open(f"{url.database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreUnavailableError(
                f"the folder of the database cannot be written ({error.strerror}); create it or correct "
                "GNS_DATABASE_URL."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise taken from None
        return lambda: os.close(descriptor)
    connection = engine.connect()
    if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LEASE_KEY}).scalar_one():
        connection.close()
        raise taken
    connection.commit()

    def release() -> None:
        with contextlib.suppress(SQLAlchemyError):
            connection.invalidate()
            connection.close()

    return release


def opening_error(error: SQLAlchemyError) -> StoreError:
    """What a failure while opening means to the person who started us."""
    if isinstance(error, DatabaseError) and not isinstance(error, OperationalError):
        return _corrupt()
    logger.debug("database cannot be opened", exc_info=error)
    return StoreUnavailableError(
        "the database cannot be opened; check that GNS_DATABASE_URL is right, that the folder or server exists and "
        "that this user may write there."
    )


def running_error(error: SQLAlchemyError, *, doing: str) -> StoreError:
    """What a failure while serving means to the client: come back later."""
    cause = getattr(error, "orig", None) or error
    logger.error("database cannot be %s: cause=%s", "written" if doing == "write" else "read", cause)
    if doing == "write":
        return StoreUnavailableError(
            "the database cannot be written now; nothing of this request was recorded. Try again later."
        )
    return StoreUnavailableError("the database cannot be read now. Try again later.")


def _corrupt() -> DatabaseCorruptError:
    return DatabaseCorruptError(
        "the database file is damaged or is not a database. Restore a backup, or move the file away to begin a new one."
    )

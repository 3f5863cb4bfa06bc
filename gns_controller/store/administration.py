"""What an administrator does to a database that nobody serves: upgrade it, check it, show its address."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from gns_controller.core.errors import GnsError
from gns_controller.store.engine import acquire_lease, check_integrity, make_engine, opening_error, parse_url
from gns_controller.store.migrate import current_revision, newest_revision, refuse_foreign, upgrade
from gns_controller.store.tables import log, runs


class DatabaseReport(NamedTuple):
    """What `db check` found."""

    ok: bool
    detail: str
    revision: str | None
    newest_revision: str
    num_runs: int
    num_log_entries: int


def hide_password(database_url: str) -> str:
    """The URL as it may be shown."""
    return parse_url(database_url).set(drivername=database_url.partition(":")[0]).render_as_string(hide_password=True)


def upgrade_database(database_url: str) -> tuple[str | None, str]:
    """Bring a database to the newest revision; returns the revision before and after.

    Raises:
        StoreError: it is in use, damaged, or newer than this program.
    """
    url = parse_url(database_url)
    engine = make_engine(url, pool_size=2, writes=True)
    try:
        release = acquire_lease(url, engine)
        try:
            with engine.begin() as connection:
                check_integrity(connection, url)
                before = upgrade(connection)
        finally:
            release()
    except SQLAlchemyError as error:
        raise opening_error(error) from None
    finally:
        engine.dispose()
    return before, newest_revision()


def check_database(database_url: str) -> DatabaseReport:
    """Read everything; never writes, and works beside a running controller.

    Raises:
        InvalidInputError: the URL cannot be used.
    """
    url = parse_url(database_url)
    newest = newest_revision()
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return DatabaseReport(True, "There is no database yet; `serve` makes it.", None, newest, 0, 0)
    engine = make_engine(url, pool_size=1, writes=False)
    try:
        with engine.connect() as connection:
            check_integrity(connection, url, thorough=True)
            revision = current_revision(connection)
            refuse_foreign(connection, revision)
            if revision != newest:
                detail = (
                    f"Schema revision {revision or 'none'}, this version needs {newest}: `gns-controller db upgrade`."
                )
                return DatabaseReport(False, detail, revision, newest, 0, 0)
            num_runs = connection.execute(select(func.count()).select_from(runs)).scalar_one()
            num_entries = connection.execute(select(func.count()).select_from(log)).scalar_one()
    except SQLAlchemyError as error:
        return DatabaseReport(False, str(opening_error(error)), None, newest, 0, 0)
    except GnsError as error:
        return DatabaseReport(False, str(error), None, newest, 0, 0)
    finally:
        engine.dispose()
    detail = f"Sound, schema revision {revision}: {num_runs} runs, {num_entries} log entries."
    return DatabaseReport(True, detail, revision, newest, num_runs, num_entries)

"""Schema revisions: where a database stands, and bringing it to where this program is."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from gns_controller.core.errors import DatabaseCorruptError, DatabaseTooNewError


def newest_revision() -> str:
    """The revision this program writes."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def current_revision(connection: Connection) -> str | None:
    """The revision of the database; None when it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection, *, to: str = "head") -> str | None:
    """Bring the database to the newest revision, in the caller's transaction. Returns the revision it had.

    Args:
        connection: where it is.
        to: stop at an older revision, to test what follows.

    Raises:
        DatabaseTooNewError: its revision is not one of ours.
        DatabaseCorruptError: it holds tables of somebody else.
    """
    before = current_revision(connection)
    refuse_foreign(connection, before)
    if before != newest_revision():
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, to)
    return before


def refuse_foreign(connection: Connection, revision: str | None) -> None:
    """Raise unless this program, at this version or an older one, made the database.

    Raises:
        DatabaseTooNewError: its revision is not one of ours.
        DatabaseCorruptError: it holds tables of somebody else.
    """
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision is not None and revision not in known:
        raise DatabaseTooNewError(
            f"the database has schema revision {revision!r}, and this version of gns-controller knows none newer than "
            f"{newest_revision()!r}. Upgrade gns-controller, or point GNS_DATABASE_URL at another database."
        )
    if revision is None and inspect(connection).get_table_names():
        raise DatabaseCorruptError(
            "the database holds tables that gns-controller did not make. Point GNS_DATABASE_URL at an empty database."
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config

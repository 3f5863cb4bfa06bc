from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from gns_controller.core.errors import (
    DatabaseCorruptError,
    DatabaseTooNewError,
    InvalidInputError,
    StoreUnavailableError,
)
from gns_controller.store import SqlStore
from gns_controller.store.administration import check_database, hide_password, upgrade_database
from gns_controller.store.engine import make_engine, parse_url
from gns_controller.store.tables import metadata
from tests.gns_controller.running_service import Service


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder}/gns.db"


def test_every_connection_that_writes_syncs_each_commit_to_a_write_ahead_log(service: Service) -> None:
    def pragmas(transaction: object) -> tuple[str, int]:
        connection = transaction.connection  # type: ignore[attr-defined]
        return (
            connection.exec_driver_sql("PRAGMA journal_mode").scalar_one(),
            connection.exec_driver_sql("PRAGMA synchronous").scalar_one(),
        )

    assert service.store.submit(pragmas).result() == ("wal", 2)


def test_migrations_make_the_tables_that_the_code_describes(tmp_path: Path) -> None:
    upgrade_database(url_in(tmp_path))
    engine = make_engine(parse_url(url_in(tmp_path)), pool_size=1, writes=False)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


@pytest.mark.parametrize("content", [b"this is not a database at all, it is a letter" * 100, b"\0" * 8192])
def test_a_file_that_is_no_database_is_refused_with_a_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gns.db").write_bytes(content)
    with pytest.raises(DatabaseCorruptError, match="Restore a backup"):
        SqlStore(url_in(tmp_path))


def test_a_database_with_a_damaged_page_is_refused(tmp_path: Path) -> None:
    SqlStore(url_in(tmp_path)).close()
    path = tmp_path / "gns.db"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096))
    with pytest.raises(DatabaseCorruptError):
        SqlStore(url_in(tmp_path))
    assert not check_database(url_in(tmp_path)).ok


def test_a_database_of_a_newer_version_is_refused_with_a_way_out(tmp_path: Path) -> None:
    SqlStore(url_in(tmp_path)).close()
    with sqlite3.connect(tmp_path / "gns.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(DatabaseTooNewError, match="Upgrade gns-controller"):
        SqlStore(url_in(tmp_path))


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "gns.db") as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    with pytest.raises(DatabaseCorruptError, match="did not make"):
        SqlStore(url_in(tmp_path))


def test_a_second_store_on_the_same_file_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    first = SqlStore(url_in(tmp_path))
    with pytest.raises(StoreUnavailableError, match="another gns-controller process"):
        SqlStore(url_in(tmp_path))
    first.close()
    SqlStore(url_in(tmp_path)).close()


def test_a_folder_that_does_not_exist_is_named_as_the_fault(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="folder"):
        SqlStore(f"sqlite:///{tmp_path}/nowhere/gns.db")


@pytest.mark.parametrize("url", ["gns.db", "mysql://host/name", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_cannot_hold_runs_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_url(url)


def test_a_shown_url_hides_its_password() -> None:
    assert hide_password("postgresql://me:secret@db/gns") == "postgresql://me:***@db/gns"

"""The same service on PostgreSQL, on a server of its own that lives as long as these tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from gns_controller.core.errors import StoreUnavailableError
from gns_controller.store.administration import check_database
from gns_controller.store.engine import make_engine, parse_url
from gns_controller.store.migrate import upgrade
from gns_controller.store.tables import metadata
from tests.gns_controller.histories import live_through
from tests.gns_controller.running_service import Service, report


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def database_url() -> Iterator[str]:
    needed = ["initdb", "pg_ctl"] + (["setpriv"] if os.geteuid() == 0 else [])
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing:
        reason = f"PostgreSQL is not tested: {', '.join(missing)} not installed"
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="gns-postgres-") as name:
        folder, port = Path(name), _free_port()
        as_user: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(folder, "nobody")
            as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        control = [*as_user, "pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-w"]
        make = [*as_user, "initdb", "-D", str(folder / "data"), "-U", "gns", "-A", "trust", "--no-sync"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            yield f"postgresql://gns@127.0.0.1:{port}/postgres"
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd=folder)


def test_runs_live_on_postgresql_as_they_do_on_sqlite(database_url: str, make_service: Callable[..., Service]) -> None:
    answers = []
    for service in (make_service(), make_service(database_url=database_url)):
        service.register()
        batch = [report(step, noise_scale=10.0 * step) for step in range(1, 20)]
        replies = [service.report(*batch).json() for _ in range(2)]
        restarted = service.register(incarnation="incarnation-1", resume_step=3).json()
        paths = ("", "/measurements", "/decisions?order=desc&limit=5", "/schedule")
        answers.append([replies, restarted, [service.client.get(f"/api/v1/runs/run{path}").json() for path in paths]])
        assert service.client.get("/readyz").status_code == 200
        assert service.sample("gns_run_optimizer_step", run_id="run") == 19
    assert answers[0] == answers[1]
    assert check_database(database_url).ok


def test_a_second_controller_on_the_same_postgresql_is_refused(
    database_url: str, make_service: Callable[..., Service]
) -> None:
    first = make_service(database_url=database_url)
    with pytest.raises(StoreUnavailableError, match="another gns-controller process"):
        make_service(database_url=database_url)
    first.close()
    make_service(database_url=database_url)


def another_database(database_url: str, name: str) -> str:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return database_url.replace("/postgres", f"/{name}")


def test_a_postgresql_database_of_the_first_schema_is_upgraded_to_the_tables_of_the_code(database_url: str) -> None:
    url = another_database(database_url, "upgraded")
    engine = make_engine(parse_url(url), pool_size=1, writes=True)
    with engine.begin() as connection:
        upgrade(connection, to="0001")
    with engine.begin() as connection:
        assert upgrade(connection) == "0001"
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_operators_and_replay_work_on_postgresql_as_they_do_on_sqlite(
    database_url: str, make_service: Callable[..., Service]
) -> None:
    answers = []
    for service in (make_service(), make_service(database_url=another_database(database_url, "history"))):
        num_measurements = live_through(service, seed=7)
        found = [service.client.get(f"/api/v1/runs/run{path}").json() for path in ("", "/policy", "/controls")]
        replayed = service.client.post("/api/v1/runs/run/replay", json={}).json()
        assert replayed["num_equal"] == replayed["num_compared"] == num_measurements
        answers.append([found, replayed])
    assert answers[0] == answers[1]

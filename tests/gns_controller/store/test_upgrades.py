"""Databases of earlier schemas. schema_0001.sql is a dump of one, written by the code of that time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from gns_controller.store import SqlStore
from gns_controller.store.administration import check_database, upgrade_database
from tests.gns_controller.running_service import Service, report

DUMP = Path(__file__).parent / "schema_0001.sql"


def old_database(folder: Path) -> str:
    connection = sqlite3.connect(folder / "old.db")
    connection.executescript(DUMP.read_text())
    connection.close()
    return f"sqlite:///{folder}/old.db"


def test_runs_of_the_first_schema_are_kept_and_go_on(tmp_path: Path, make_service: Callable[..., Service]) -> None:
    service = make_service(database_url=old_database(tmp_path))
    view = service.client.get("/api/v1/runs/run").json()
    assert (view["attempt"], view["optimizer_step"], view["num_measurements"]) == (1, 3, 5)
    assert (view["policy_revision"], view["override"]) == (0, None)
    stored = service.client.get("/api/v1/runs/run/measurements").json()["items"]
    assert [item["measurement"]["optimizer_step"] for item in stored] == [1, 2, 3, 4, 3]
    assert stored[-1]["measurement"]["loss"] == "NaN"
    assert len(service.client.get("/api/v1/runs/run/decisions").json()["items"]) == 5
    policy = service.client.get("/api/v1/runs/run/policy")
    assert (policy.headers["ETag"], policy.json()["changed_at"]) == ('"0"', None)

    hold = service.client.post("/api/v1/runs/run/override", json={"kind": "hold"}, headers={"If-Match": '"0"'})
    assert hold.status_code == 200
    assert service.report(report(4, attempt=1, noise_scale=4000.0)).json()["decision"]["reason"] == "override"
    assert service.client.get("/api/v1/runs/run/schedule").status_code == 200
    actions = [item["action"] for item in service.client.get("/api/v1/runs/run/controls").json()["items"]]
    assert actions == ["registered", "registered", "override"]


def test_an_upgrade_says_where_it_came_from_and_leaves_a_sound_database(tmp_path: Path) -> None:
    url = old_database(tmp_path)
    before = check_database(url)
    assert not before.ok
    assert "gns-controller db upgrade" in before.detail
    assert upgrade_database(url) == ("0001", "0002")
    after = check_database(url)
    assert (after.ok, after.num_runs, after.num_log_entries) == (True, 2, 8)
    assert upgrade_database(url) == ("0002", "0002")


def test_the_few_lines_between_measurements_are_found_without_reading_those(tmp_path: Path) -> None:
    SqlStore(f"sqlite:///{tmp_path}/gns.db").close()
    connection = sqlite3.connect(tmp_path / "gns.db")
    query = "SELECT * FROM log WHERE run_id = ? AND kind != 'measurement' AND sequence > ? ORDER BY sequence LIMIT 9"
    plan = connection.execute(f"EXPLAIN QUERY PLAN {query}", ("run", 0)).fetchall()
    connection.close()
    assert "log_of_others" in str(plan)

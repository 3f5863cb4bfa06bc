"""What only a real process can show: durability, shutdown, ports, disks."""

from __future__ import annotations

import json
import resource
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.running_service import Server, registration, report, run_cli


def register(server: Server, run_id: str = "run", **changes: Any) -> httpx.Response:
    return server.http.put(f"/api/v1/runs/{run_id}", json=registration(**changes))


def post(server: Server, *reports: dict[str, Any], run_id: str = "run") -> httpx.Response:
    return server.http.post(f"/api/v1/runs/{run_id}/measurements", json={"measurements": list(reports)})


def test_everything_acknowledged_survives_a_kill(server: Server) -> None:
    register(server)
    acknowledged = 0
    plan: Any = None

    def report_until_killed() -> None:
        nonlocal acknowledged, plan
        try:
            while True:
                first = acknowledged + 1
                reply = post(server, *(report(step, noise_scale=float(step)) for step in range(first, first + 5)))
                if reply.status_code == 200:
                    acknowledged += 5
                    plan = reply.json()["plan"]
        except (httpx.HTTPError, RuntimeError):
            return

    reporter = threading.Thread(target=report_until_killed)
    reporter.start()
    while acknowledged < 60:
        time.sleep(0.01)
    server.process.kill()
    reporter.join(20)
    server.kill()
    server.start()
    view = server.http.get("/api/v1/runs/run").json()
    assert view["optimizer_step"] >= acknowledged
    assert view["optimizer_step"] == view["num_measurements"]
    if view["optimizer_step"] == acknowledged:
        assert view["plan"] == plan


def test_stored_decisions_are_those_of_replay_bit_for_bit_across_a_restart(server: Server) -> None:
    register(server)
    batch = 16
    for step in range(1, 41):
        if step == 20:
            assert server.stop() == 0
            server.start()
        sent = report(step, noise_scale=3.0 * step, batch=batch, micro_batch_size=batch // 2)
        batch = post(server, sent).json()["plan"]["global_batch_size"]
    assert batch > 16
    measurements = [
        NoiseScaleMeasurement.model_validate(item["measurement"])
        for item in server.http.get("/api/v1/runs/run/measurements?limit=1000").json()["items"]
    ]
    stored = [item["decision"] for item in server.http.get("/api/v1/runs/run/decisions?limit=1000").json()["items"]]
    specification = RunSpecification.model_validate(registration()["specification"])
    folded = replay(specification, measurements, follow_trainer=True)
    assert [decision.model_dump(mode="json") for decision in folded] == stored


def test_sigterm_ends_open_streams_and_exits_cleanly_within_three_seconds(server: Server) -> None:
    register(server)
    ended = threading.Event()

    def follow() -> None:
        with httpx.stream("GET", f"{server.url}/api/v1/runs/run/events", timeout=30, trust_env=False) as response:
            for _ in response.iter_bytes():
                first.set()
        ended.set()

    first = threading.Event()
    follower = threading.Thread(target=follow)
    follower.start()
    assert first.wait(10)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 3.0
    assert ended.wait(5), "the stream was cut instead of ended"
    follower.join(5)


def events_of(lines: Any) -> Any:
    event: dict[str, str] = {}
    for line in lines:
        if line == "":
            if "data" in event:
                yield int(event["id"]), event["event"], json.loads(event["data"])
            event = {}
        elif not line.startswith(":"):
            key, _, value = line.partition(": ")
            event[key] = value


def test_the_event_stream_replays_the_log_and_goes_on_live(server: Server) -> None:
    register(server)
    post(server, report(1), report(2))
    with server.http.stream("GET", "/api/v1/runs/run/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response.iter_lines())
        kinds = [next(events) for _ in range(3)]
        assert [kind for _, kind, _ in kinds] == ["registered", "measurement", "measurement"]
        with httpx.Client(base_url=server.url, trust_env=False) as other:
            other.post("/api/v1/runs/run/measurements", json={"measurements": [report(3)]})
        sequence, kind, data = next(events)
    assert kind == "measurement"
    assert sequence == data["sequence"] > kinds[-1][0]
    assert data["measurement"]["optimizer_step"] == 3
    assert data["decision"]["optimizer_step"] == 3
    assert data["received_at"].endswith("Z")

    for resume in ({"headers": {"Last-Event-ID": str(sequence - 1)}}, {"params": {"after": str(sequence - 1)}}):
        with server.http.stream("GET", "/api/v1/runs/run/events", **resume) as response:
            assert next(events_of(response.iter_lines()))[0] == sequence


def test_an_operators_word_is_an_event_of_its_own(server: Server) -> None:
    register(server)
    with server.http.stream("GET", "/api/v1/runs/run/events") as response:
        events = events_of(response.iter_lines())
        assert next(events)[1] == "registered"
        body = {"kind": "hold", "note": "a line\nand another\r\n\nevent: forged"}
        url = f"{server.url}/api/v1/runs/run/override"
        httpx.post(url, json=body, headers={"If-Match": '"0"'}, trust_env=False).raise_for_status()
        sequence, kind, data = next(events)
        assert (sequence, kind, data["sequence"]) == (2, "control", 2)
        assert (data["action"], data["policy_revision"], data["override"]) == (
            "override",
            1,
            {**body, "global_batch_size": None},
        )
        assert data["policy"]["policy"] == "noise_scale"
        assert data["note"] == body["note"]
        assert {"received_at", "sequence"} <= set(data)
        post(server, report(1))
        assert next(events)[1] == "measurement"


def test_idle_streams_hold_no_database_connection(tmp_path: Path) -> None:
    """Three times as many streams as the read pool has connections, and reads still answer."""
    server = Server(tmp_path).start()
    register(server)
    streams = [httpx.Client(base_url=server.url, trust_env=False, timeout=20) for _ in range(24)]
    opened = []
    try:
        for client in streams:
            request = client.build_request("GET", "/api/v1/runs/run/events")
            opened.append(client.send(request, stream=True))
        assert server.http.get("/api/v1/runs/run").status_code == 200
        assert "gns_event_streams 24.0" in server.http.get("/metrics").text
    finally:
        for response, client in zip(opened, streams, strict=True):
            response.close()
            client.close()
    server.kill()


def test_a_full_disk_is_answered_503_and_forgotten_when_there_is_room_again(server: Server) -> None:
    register(server)
    post(server, report(1))
    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, hard))
    refused = post(server, *(report(step) for step in range(2, 102)))
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "2"
    assert refused.json()["type"] == "urn:gns-controller:problem:store-unavailable"
    assert not any(
        word in refused.text.lower() for word in ("sql", "disk i/o", "insert", str(server.directory).lower())
    )
    assert server.http.get("/readyz").status_code == 503
    assert server.http.get("/livez").status_code == 200
    assert server.http.get("/api/v1/runs/run").json()["optimizer_step"] == 1

    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert post(server, *(report(step) for step in range(2, 102))).json()["accepted"] == 100
    assert server.http.get("/readyz").status_code == 200


def test_a_second_process_on_the_same_database_is_refused_in_one_sentence(server: Server) -> None:
    code, output, errors = run_cli("serve", "--port", "0", folder=server.directory)
    assert (code, output) == (4, "")
    assert "another gns-controller process uses this database" in errors
    assert "Traceback" not in errors


def test_a_port_in_use_is_refused_in_one_sentence(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    code, _, errors = run_cli("serve", "--port", port, folder=tmp_path, GNS_DATABASE_URL="sqlite:///other.db")
    assert code == 3
    assert f"port {port} is in use" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("damage", ["corrupt", "newer"])
def test_a_database_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    assert run_cli("db", "upgrade", folder=tmp_path)[0] == 0
    if damage == "corrupt":
        (tmp_path / "gns.db").write_bytes(b"no database" * 1000)
    else:
        with sqlite3.connect(tmp_path / "gns.db") as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.close()
    code, _, errors = run_cli("serve", "--port", "0", folder=tmp_path)
    assert code == 4
    assert errors.startswith("gns-controller: the database")
    assert errors.count("\n") == 1


def test_serving_others_without_tokens_is_refused(tmp_path: Path) -> None:
    code, _, errors = run_cli("serve", "--host", "0.0.0.0", "--port", "0", folder=tmp_path)
    assert code == 2
    assert "GNS_TOKEN_HASHES" in errors
    assert not (tmp_path / "gns.db").exists()

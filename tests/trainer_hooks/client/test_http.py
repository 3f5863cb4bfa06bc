"""The client against the real application, through an injected transport."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError, RunConflictError
from gns_controller.core.policies import NoiseScalePolicyConfig, initial_state
from gns_controller.core.runs import Control, Registration, RunSpecification
from tests.gns_controller.core.measurements import measurement, reading
from tests.gns_controller.running_service import Service
from trainer_hooks.client import HttpController


class Wire(httpx.BaseTransport):
    """Carries requests to the application, unless told what to do instead."""

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self.inner = inner
        self.instead: Callable[[httpx.Request], httpx.Response] | None = None
        self.requests: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(f"{request.method} {request.url.path}")
        return self.instead(request) if self.instead else self.inner.handle_request(request)


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def specification(**changes: Any) -> RunSpecification:
    policy = NoiseScalePolicyConfig.published(noise_tolerance=0.5, noise_beta=0.0, signal_beta=0.0)
    rules = BatchRules(global_batch_size=16, micro_batch_size=32)
    return RunSpecification(
        **{"batch": rules, "data_parallel_size": 2, "budget_samples": 1_000_000, "policy": policy, **changes}
    )


@pytest.fixture
def service(tmp_path: Path) -> Any:
    service = Service(f"sqlite:///{tmp_path / 'gns.db'}")
    yield service
    service.close()


def client_for(wire: Wire, tmp_path: Path, *, incarnation: str = "first-incarnation", **changes: Any) -> HttpController:
    asked = changes.pop("specification", specification())
    return HttpController(
        url="http://127.0.0.1:8000",
        run_id="run",
        registration=Registration(specification=asked, incarnation=incarnation),
        state=initial_state(asked.batch, data_parallel_size=2),
        spool_directory=tmp_path / "spool",
        transport=wire,
        **changes,
    )


def steps_stored(service: Any) -> list[tuple[int, int]]:
    items = service.client.get("/api/v1/runs/run/measurements").json()["items"]
    return [(item["measurement"]["attempt"], item["measurement"]["optimizer_step"]) for item in items]


def test_the_service_decides_while_it_answers_and_agrees_with_the_local_policy(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    for step, noise_scale in ((100, 8.0), (200, 16.0)):
        client.report(measurement(step, reading(noise_scale=noise_scale)))
        verdict = client.verdict(optimizer_step=step, deadline_seconds=10)
        assert verdict.source == "controller"
        assert verdict.plan == client.state.plan
        assert verdict.plan.global_batch_size == 4 * noise_scale
    client.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100), (0, 200)]
    assert not list((tmp_path / "spool" / "run").iterdir())


def test_an_outage_is_decided_locally_without_waiting_and_told_later_in_order(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)
    wire.instead = refuse
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    for step in (100, 200, 300):
        client.report(measurement(step, reading(noise_scale=step / 10)))
        # A deadline of an hour: coming back at all shows that nobody waits during an outage.
        assert client.verdict(optimizer_step=step, deadline_seconds=3600).source == "local"
    wire.instead = None
    client.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100), (0, 200), (0, 300)]


def test_measurements_that_nobody_took_are_handed_over_by_the_next_incarnation(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)
    wire.instead = refuse
    first = client_for(wire, tmp_path)
    first.report(measurement(100, reading(noise_scale=8.0)))
    first.close(deadline_seconds=10)
    wire.instead = None
    second = client_for(wire, tmp_path, incarnation="second-incarnation")
    second.report(measurement(100, reading(noise_scale=8.0)))
    second.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100), (1, 100)]


def test_a_slow_controller_is_waited_for_once_and_again_after_it_answers_in_time(service: Any, tmp_path: Path) -> None:
    wire, release = Wire(service.transport), threading.Event()
    client = client_for(wire, tmp_path, decision_deadline_seconds=0.05)
    client.wait_registered(deadline_seconds=10)

    def slowly(request: httpx.Request) -> httpx.Response:
        release.wait(30)
        return service.transport.handle_request(request)

    wire.instead = slowly
    client.report(measurement(100, reading(noise_scale=8.0)))
    assert client.verdict(optimizer_step=100, deadline_seconds=0.05).source == "local"
    client.report(measurement(200, reading(noise_scale=8.0)))
    assert client.verdict(optimizer_step=200, deadline_seconds=3600).source == "local"
    wire.instead = None
    release.set()
    sources = set()
    for step in range(300, 3000, 100):
        client.report(measurement(step, reading(noise_scale=8.0)))
        sources.add(client.verdict(optimizer_step=step, deadline_seconds=2.0).source)
        threading.Event().wait(0.02)
        if "controller" in sources:
            break
    assert "controller" in sources
    client.close(deadline_seconds=10)
    assert [step for _, step in steps_stored(service)][:2] == [100, 200]


@pytest.mark.parametrize("status", [500, 502, 503, 429, 200, 400, 401, 403, 404, 409, 413, 422])
def test_any_answer_that_is_not_ours_counts_as_an_outage(service: Any, tmp_path: Path, status: int) -> None:
    wire = Wire(service.transport)
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    wire.instead = lambda request: httpx.Response(status, text="<html>proxy</html>", request=request)
    client.report(measurement(100, reading(noise_scale=8.0)))
    assert client.verdict(optimizer_step=100, deadline_seconds=3600).source == "local"
    wire.instead = None
    client.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100)]


def test_another_specification_under_the_same_name_is_refused_with_the_difference(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)
    client_for(wire, tmp_path).close(deadline_seconds=10)
    other = client_for(
        wire, tmp_path, incarnation="second-incarnation", specification=specification(budget_samples=5000)
    )
    with pytest.raises(RunConflictError, match="budget_samples: registered 1000000, requested 5000"):
        other.wait_registered(deadline_seconds=10)
    other.close(deadline_seconds=10)


def test_a_missing_token_is_an_error_at_attach(tmp_path: Path) -> None:
    guarded = Service(f"sqlite:///{tmp_path / 'gns.db'}", token_hashes="0" * 64)
    try:
        client = client_for(Wire(guarded.transport), tmp_path)
        with pytest.raises(InvalidInputError, match="HTTP 401"):
            client.wait_registered(deadline_seconds=10)
        client.close(deadline_seconds=10)
    finally:
        guarded.close()


def test_one_measurement_that_the_service_cannot_take_does_not_hold_up_the_others(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)

    def picky(request: httpx.Request) -> httpx.Response:
        if b'"optimizer_step":200' in request.content:
            problem = {"type": "urn:gns-controller:problem:invalid-input", "title": "no", "detail": "no"}
            headers = {"content-type": "application/problem+json"}
            return httpx.Response(422, content=json.dumps(problem), headers=headers, request=request)
        return service.transport.handle_request(request)

    wire.instead = refuse
    client = client_for(wire, tmp_path)
    for step in (100, 200, 300):
        client.report(measurement(step, reading(noise_scale=8.0)))
    wire.instead = picky
    client.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100), (0, 300)]
    [rejected] = (tmp_path / "spool" / "run").iterdir()
    assert rejected.suffix == ".rejected"
    assert json.loads(rejected.read_text())["optimizer_step"] == 200


def test_a_measurement_that_the_local_policy_cannot_decide_is_reported_all_the_same(
    service: Any, tmp_path: Path
) -> None:
    client = client_for(Wire(service.transport), tmp_path)
    client.wait_registered(deadline_seconds=10)
    # theta^2 is 0 in float64: an operator's word that this process has learnt and the controller has taken back since
    extreme = NoiseScalePolicyConfig.published().model_copy(update={"noise_tolerance": 1e-200})
    client._local.control = Control(policy=extreme, policy_revision=1, override=None)
    client.report(measurement(100, reading(noise_scale=8.0)))
    client.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100)]


def test_a_disk_that_cannot_be_written_costs_durability_not_training(service: Any, tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    client = client_for(Wire(service.transport), tmp_path)
    client.report(measurement(100, reading(noise_scale=8.0)))
    client.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100)]


def test_a_torn_line_in_an_old_spool_is_left_out(service: Any, tmp_path: Path) -> None:
    folder = tmp_path / "spool" / "run"
    folder.mkdir(parents=True)
    old = Registration(specification=specification(), incarnation="an-older-incarnation")
    whole: NoiseScaleMeasurement = measurement(50, reading(noise_scale=8.0))
    torn = measurement(60).model_dump_json()[:40]
    (folder / "an-older-incarnation.jsonl").write_text(f"{old.model_dump_json()}\n{whole.model_dump_json()}\n{torn}")
    (folder / "nonsense.jsonl").write_text("{}")
    client_for(Wire(service.transport), tmp_path).close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 50)]
    assert [path.name for path in folder.iterdir()] == ["nonsense.unreadable"]


def test_the_spool_of_a_job_that_still_runs_is_not_taken_for_a_leftover(service: Any, tmp_path: Path) -> None:
    wire = Wire(service.transport)
    wire.instead = refuse
    living = client_for(wire, tmp_path)
    living.report(measurement(100, reading(noise_scale=8.0)))
    spool = tmp_path / "spool" / "run" / "first-incarnation.jsonl"
    for _ in range(500):
        if spool.exists() and len(spool.read_text().splitlines()) == 2:
            break
        threading.Event().wait(0.01)
    client_for(Wire(service.transport), tmp_path, incarnation="second-incarnation").close(deadline_seconds=10)
    assert len(spool.read_text().splitlines()) == 2
    assert steps_stored(service) == []
    living.close(deadline_seconds=10)


def test_a_missing_token_leaves_an_old_spool_for_the_next_attempt(tmp_path: Path) -> None:
    wire = Wire(httpx.MockTransport(refuse))
    first = client_for(wire, tmp_path)
    first.report(measurement(100, reading(noise_scale=8.0)))
    first.close(deadline_seconds=10)
    guarded = Service(f"sqlite:///{tmp_path / 'gns.db'}", token_hashes="0" * 64)
    try:
        client_for(Wire(guarded.transport), tmp_path, incarnation="second-incarnation").close(deadline_seconds=10)
    finally:
        guarded.close()
    names = {path.name for path in (tmp_path / "spool" / "run").iterdir()}
    assert "first-incarnation.jsonl" in names
    assert not any(name.endswith(".refused") for name in names)


def test_a_controller_restored_from_a_backup_gets_the_run_registered_again(service: Any, tmp_path: Path) -> None:
    """The database knows the first incarnation only; the second one had registered before the backup came back."""
    wire = Wire(service.transport)
    client_for(wire, tmp_path).close(deadline_seconds=10)
    second = client_for(wire, tmp_path, incarnation="second-incarnation")
    second.wait_registered(deadline_seconds=10)
    second._attempt = 7
    second.report(measurement(100, reading(noise_scale=8.0)))
    for _ in range(1000):
        if steps_stored(service):
            break
        threading.Event().wait(0.01)
    second.close(deadline_seconds=10)
    assert steps_stored(service) == [(1, 100)]


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"type": 3, "errors": 5}'])
def test_a_malformed_problem_does_not_end_the_sender(service: Any, tmp_path: Path, body: bytes) -> None:
    wire = Wire(service.transport)
    client = client_for(wire, tmp_path)
    client.wait_registered(deadline_seconds=10)
    headers = {"content-type": "application/problem+json"}
    wire.instead = lambda request: httpx.Response(400, content=body, headers=headers, request=request)
    client.report(measurement(100, reading(noise_scale=8.0)))
    assert client.verdict(optimizer_step=100, deadline_seconds=3600).source == "local"
    wire.instead = None
    client.close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 100)]


def test_a_line_of_an_old_spool_that_cannot_be_read_keeps_the_file(service: Any, tmp_path: Path) -> None:
    folder = tmp_path / "spool" / "run"
    folder.mkdir(parents=True)
    old = Registration(specification=specification(), incarnation="an-older-incarnation")
    lines = [old.model_dump_json(), '{"renamed": 1}', measurement(60, reading(noise_scale=8.0)).model_dump_json()]
    (folder / "an-older-incarnation.jsonl").write_text("\n".join(lines) + "\n")
    client_for(Wire(service.transport), tmp_path).close(deadline_seconds=10)
    assert steps_stored(service) == [(0, 60)]
    assert [path.name for path in folder.iterdir()] == ["an-older-incarnation.unreadable"]


@pytest.mark.parametrize(("before", "after"), [(logging.NOTSET, logging.WARNING), (logging.INFO, logging.INFO)])
def test_requests_are_no_lines_of_the_jobs_log_unless_somebody_wants_them(
    service: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, before: int, after: int
) -> None:
    """httpx logs every request at INFO, which the root logger of most jobs lets through."""
    requests = logging.getLogger("httpx")
    kept = requests.level
    requests.setLevel(before)
    try:
        with caplog.at_level(logging.INFO):
            client = client_for(Wire(service.transport), tmp_path)
            client.wait_registered(deadline_seconds=10)
            client.close(deadline_seconds=10)
        assert requests.level == after
        assert ("HTTP Request: PUT" in caplog.text) == (after == logging.INFO)
    finally:
        requests.setLevel(kept)

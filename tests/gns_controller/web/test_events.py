from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.gns_controller.running_service import Service, report

URL = "/api/v1/runs/run/schedule"
GROWS = 400.0
"""A noise scale whose rule asks for far more than 16 samples."""


def test_a_schedule_lists_the_plans_so_far(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=1.0), report(2, noise_scale=GROWS))
    schedule = service.client.get(URL).json()
    assert [plan["version"] for plan in schedule["plans"]] == [0, 1]
    assert schedule["plans"][-1] == service.client.get("/api/v1/runs/run").json()["plan"]
    assert schedule["projection"]["stages"][0]["global_batch_size"] == schedule["plans"][-1]["global_batch_size"]


def test_a_restart_takes_the_plans_beyond_its_checkpoint_out_of_the_schedule(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=1.0), report(2, noise_scale=GROWS), report(3, noise_scale=50 * GROWS))
    assert len(service.client.get(URL).json()["plans"]) == 3
    service.register(incarnation="incarnation-1", resume_step=1)
    assert [plan["version"] for plan in service.client.get(URL).json()["plans"]] == [0]


def test_the_stages_ahead_of_an_open_loop_ramp_are_projected(service: Service) -> None:
    """Two ranks and 32 per rank: 100 samples are not reachable, 64 are. sqrt coupling: (64 / 16)^(1/2) = 2.

    128 points from 600 to 100 000 samples: the first beyond 5000 is the sixth, at 600 + 99 400 * 6 // 128.
    """
    stages = [{"from_samples": 500, "global_batch_size": 32}, {"from_samples": 5000, "global_batch_size": 100}]
    service.register(policy={"policy": "stages", "stages": stages})
    service.report(report(1, samples=600))
    projection = service.client.get(URL).json()["projection"]
    assert [stage["global_batch_size"] for stage in projection["stages"]] == [32, 64]
    assert projection["stages"][1] == {
        "samples_seen": 5259,
        "global_batch_size": 64,
        "low": 64,
        "high": 64,
        "learning_rate_factor": 2.0,
    }
    # One step of 600 is already taken; the batch at the time of the report was 16.
    expected = (5259 - 600) / 32 + (100_000 - 5259) / 64
    assert projection["steps_left"]["expected"] == pytest.approx(expected, abs=1)


def test_a_schedule_says_what_the_ramp_so_far_was_worth(service: Service) -> None:
    """16 samples a step would have taken 40 steps for 640 samples; this run took 25."""
    service.register()
    assert service.client.get(URL).json()["savings"] is None
    service.report(report(20, samples=320, step_seconds=0.5))
    service.report(report(25, samples=640, batch=64, micro_batch_size=32, step_seconds=1.0))
    savings = service.client.get(URL).json()["savings"]
    assert (savings["constant_batch_size"], savings["constant_steps"], savings["steps_saved"]) == (16, 40, 15)
    # 40 steps of 0.5 s, less 20 of 0.5 s and 5 of 1 s.
    assert savings["seconds_saved"] == pytest.approx(40 * 0.5 - (20 * 0.5 + 5 * 1.0))
    assert savings == service.client.get("/api/v1/runs/run").json()["savings"]
    assert service.client.get("/api/v1/runs").json()["items"][0]["savings"] == savings


def test_the_advised_ranks_are_those_the_batch_fills_with_whole_micro_batches(service: Service) -> None:
    service.register(batch={"global_batch_size": 16, "micro_batch_size": 4})
    assert service.client.get(URL).json()["advised_data_parallel_size"] == 4
    service.report(report(1, noise_scale=GROWS, micro_batch_size=4, gradient_accumulation_steps=2))
    view = service.client.get("/api/v1/runs/run").json()
    assert view["advised_data_parallel_size"] == view["plan"]["global_batch_size"] // 4 > 4


def test_a_schedule_changes_its_etag_with_the_projection_and_the_policy(service: Service) -> None:
    """The same plans throughout: what is expected differs."""
    service.register(policy={"policy": "hold", "estimator": "rank_variance"})
    known = set()

    def look() -> dict[str, Any]:
        response = service.client.get(URL)
        known.add(response.headers["ETag"])
        assert service.client.get(URL).headers["ETag"] == response.headers["ETag"]
        return dict(response.json())

    assert look()["projection"] is None
    service.report(report(1, noise_scale=GROWS))
    assert len(look()["projection"]["stages"]) == 1
    stages = [{"from_samples": 5000, "global_batch_size": 64}]
    everybody = {"If-Match": "*"}
    service.client.patch("/api/v1/runs/run/policy", json={"policy": "stages", "stages": stages}, headers=everybody)
    assert len(look()["projection"]["stages"]) == 2
    pin = {"kind": "pin", "global_batch_size": 32}
    service.client.post("/api/v1/runs/run/override", json=pin, headers=everybody)
    schedule = look()
    assert [stage["global_batch_size"] for stage in schedule["projection"]["stages"]] == [16, 32]
    assert [plan["version"] for plan in schedule["plans"]] == [0]
    assert len(known) == 4


def test_a_run_whose_numbers_leave_no_room_for_a_plan_ahead_is_shown_without_a_projection(service: Service) -> None:
    service.register(budget_samples=2**62)
    huge = report(1, noise_scale=1.0, optimizer_step=2**62, plan_version=2**62, step_seconds=1.7e308)
    assert service.report(huge).status_code == 200
    service.client.patch(
        "/api/v1/runs/run/policy",
        json={"policy": "stages", "stages": [{"from_samples": 5000, "global_batch_size": 64}]},
        headers={"If-Match": "*"},
    )
    schedule = service.client.get(URL)
    assert schedule.status_code == 200
    assert schedule.json()["projection"] is None
    assert service.client.get("/api/v1/runs/run").status_code == 200
    assert "gns_runs" in service.exposition()


def test_a_schedule_that_is_known_is_304_until_it_changes(service: Service) -> None:
    service.register()
    first = service.client.get(URL)
    etag = first.headers["ETag"]
    assert etag.startswith('"0-0-')
    known = service.client.get(URL, headers={"If-None-Match": f'"other", {etag}'})
    assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", etag)
    service.report(report(1, noise_scale=GROWS))
    changed = service.client.get(URL, headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["ETag"].startswith('"0-1-')


def test_a_waiting_request_is_answered_when_the_plan_changes_and_not_before(service: Service) -> None:
    service.register()
    answers: list[tuple[int, float]] = []

    def wait() -> None:
        response = service.client.get(URL, params={"after": 0, "wait": 20})
        answers.append((response.json()["plans"][-1]["version"], time.monotonic()))

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.2)
    service.report(report(1, noise_scale=1.0))
    time.sleep(0.2)
    assert answers == []
    before = time.monotonic()
    service.report(report(2, noise_scale=GROWS))
    waiter.join(10)
    version, at = answers[0]
    assert version == 1
    assert at - before < 5


def test_a_waiting_request_is_answered_with_what_there_is_when_its_time_is_up(service: Service) -> None:
    service.register()
    began = time.monotonic()
    response = service.client.get(URL, params={"after": 0, "wait": 0.3})
    assert 0.3 <= time.monotonic() - began < 5
    assert response.json()["plans"][-1]["version"] == 0


def test_waiting_requests_beyond_the_limit_are_told_to_come_back(make_service: Callable[..., Service]) -> None:
    service = make_service(max_event_streams=1)
    service.register()
    waiter = threading.Thread(target=service.client.get, args=(URL,), kwargs={"params": {"after": 0, "wait": 2}})
    waiter.start()
    time.sleep(0.3)
    for refused in (
        service.client.get(URL, params={"after": 0, "wait": 5}),
        service.client.get("/api/v1/runs/run/events"),
    ):
        assert refused.status_code == 503
        assert refused.json()["type"] == "urn:gns-controller:problem:too-many-streams"
        assert refused.headers["Retry-After"] == "2"
    waiter.join(10)
    assert service.client.get(URL, params={"after": 0, "wait": 0.01}).status_code == 200


def test_streams_of_unknown_runs_and_odd_event_ids_are_refused(service: Service) -> None:
    assert service.client.get("/api/v1/runs/nobody/events").status_code == 404
    service.register()
    for odd in ("x", "-1", "9" * 30):
        response = service.client.get("/api/v1/runs/run/events", headers={"Last-Event-ID": odd})
        assert response.status_code == 422
        assert response.json()["errors"][0]["parameter"] == "Last-Event-ID"

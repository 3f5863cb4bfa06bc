from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.running_service import Service, registration, report

URL = "/api/v1/runs/run"


def test_the_first_registration_creates_and_the_same_one_again_changes_nothing(service: Service) -> None:
    first, second = service.register(), service.register()
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert first.json()["attempt"] == 0
    assert first.json()["plan"]["global_batch_size"] == 16


def test_a_new_incarnation_begins_the_next_attempt_and_fences_the_old_one_off(service: Service) -> None:
    service.register()
    assert service.register(incarnation="incarnation-1").json()["attempt"] == 1
    stale = service.report(report(1))
    assert stale.status_code == 409
    assert stale.json()["type"] == "urn:gns-controller:problem:stale-attempt"
    assert stale.json()["current_attempt"] == 1
    assert service.register().status_code == 409, "the old incarnation may not take its run back"
    assert service.report(report(1, attempt=1)).status_code == 200


def test_an_attempt_that_was_never_registered_is_refused(service: Service) -> None:
    service.register()
    response = service.report(report(1, attempt=1))
    assert response.status_code == 404
    assert "attempt 1 of run 'run' is not registered here, 0 is the last" in response.json()["detail"]


def test_a_restart_goes_on_from_the_state_at_its_checkpoint_and_keeps_both_histories(service: Service) -> None:
    """Noise scale 64 and theta 0.5 ask for 256 samples: the batch grows at the first measurement after step 2."""
    service.register()
    service.report(report(1, noise_scale=1.0), report(2, noise_scale=1.0))
    before = service.client.get(URL).json()["plan"]
    service.report(*(report(step, noise_scale=64.0 * step) for step in range(3, 8)))
    grown = service.client.get(URL).json()["plan"]
    assert grown["global_batch_size"] > before["global_batch_size"] == 16

    resumed = service.register(incarnation="incarnation-1", resume_step=2).json()
    assert resumed["plan"] == before
    service.report(report(3, attempt=1))
    steps = [
        (item["measurement"]["attempt"], item["measurement"]["optimizer_step"])
        for item in service.client.get(f"{URL}/measurements").json()["items"]
    ]
    assert steps == [(0, step) for step in range(1, 8)] + [(1, 3)]

    late = service.register(incarnation="incarnation-2", resume_step=100).json()
    assert late["plan"] == service.client.get(URL).json()["plan"]


def test_another_world_size_is_the_same_run_and_any_other_difference_is_a_conflict(service: Service) -> None:
    service.register()
    assert service.register(incarnation="incarnation-1", data_parallel_size=4).status_code == 200
    conflict = service.register(incarnation="incarnation-2", budget_samples=7)
    assert conflict.status_code == 409
    problem = conflict.json()
    assert problem["type"] == "urn:gns-controller:problem:run-conflict"
    assert problem["registered"]["budget_samples"] == 100_000
    assert problem["requested"]["budget_samples"] == 7


def test_a_batch_sent_again_is_skipped_and_answered_with_the_same_plan_and_decision(service: Service) -> None:
    service.register()
    batch = [report(step, noise_scale=40.0) for step in range(1, 6)]
    first, again = service.report(*batch).json(), service.report(*batch).json()
    assert (first["accepted"], first["duplicates"]) == (5, 0)
    assert (again["accepted"], again["duplicates"]) == (0, 5)
    for key in ("plan", "decision", "policy_revision"):
        assert first[key] == again[key]
    mixed = service.report(*batch[3:], report(6), report(6)).json()
    assert (mixed["accepted"], mixed["duplicates"]) == (1, 3)
    assert len(service.client.get(f"{URL}/measurements").json()["items"]) == 6


def test_a_measurement_out_of_order_is_refused_by_its_step_and_nothing_of_its_request_is_kept(service: Service) -> None:
    service.register()
    service.report(report(1), report(5))
    response = service.report(report(6), report(3))
    assert response.status_code == 422
    assert "optimizer_step 3" in response.json()["detail"]
    assert service.client.get(URL).json()["optimizer_step"] == 5


def test_a_measurement_of_another_run_than_the_address_is_refused(service: Service) -> None:
    service.register("other")
    assert service.report(report(1), run_id="other").status_code == 422


def test_measurements_of_a_run_nobody_registered_are_refused(service: Service) -> None:
    response = service.report(report(1))
    assert (response.status_code, response.json()["type"]) == (404, "urn:gns-controller:problem:unknown-run")


def test_concurrent_posters_of_many_runs_lose_and_double_nothing(service: Service) -> None:
    runs = [f"run-{number}" for number in range(8)]

    def work(run_id: str) -> int:
        service.register(run_id)
        accepted = 0
        for step in range(1, 11):
            for _ in range(2):
                accepted += service.report(report(step, run_id=run_id), run_id=run_id).json()["accepted"]
        return accepted

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, runs)) == [10] * 8
    for run_id in runs:
        view = service.client.get(f"/api/v1/runs/{run_id}").json()
        assert (view["num_measurements"], view["optimizer_step"]) == (10, 10)


def test_two_posters_of_the_same_measurements_store_them_once(service: Service) -> None:
    service.register()
    batch = [report(step) for step in range(1, 21)]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: service.report(*batch).json(), range(6)))
    assert sorted(reply["accepted"] for reply in replies) == [0, 0, 0, 0, 0, 20]
    assert all(reply["plan"] == replies[0]["plan"] for reply in replies)


@pytest.mark.parametrize("mode", ["active", "shadow"])
def test_decisions_are_those_of_replay_on_the_stored_measurements(service: Service, mode: str) -> None:
    service.register(mode=mode)
    for step in range(1, 31):
        service.report(report(step, noise_scale=2.0 * step, loss=1.0 / 3.0))
    stored = service.client.get(f"{URL}/measurements?limit=1000").json()["items"]
    measurements = [NoiseScaleMeasurement.model_validate(item["measurement"]) for item in stored]
    specification = RunSpecification.model_validate(registration(mode=mode)["specification"])
    folded = replay(specification, measurements, follow_trainer=mode == "active")
    decisions = service.client.get(f"{URL}/decisions?limit=1000").json()["items"]
    assert [item["decision"] for item in decisions] == [decision.model_dump(mode="json") for decision in folded]
    assert [item["sequence"] for item in decisions] == [item["sequence"] for item in stored]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_not_finite_comes_back_as_it_was_sent_and_leaves_the_averages_alone(
    service: Service, value: str
) -> None:
    service.register()
    service.report(report(1, noise_scale=8.0))
    odd = report(2)
    odd["readings"][0]["noise"] = value
    odd["loss"] = value
    decision = service.report(odd).json()["decision"]
    assert decision["reason"] == "hold_not_finite"
    assert decision["noise_sq"] == pytest.approx(8.0)
    stored = service.client.get(f"{URL}/measurements?order=desc&limit=1").json()["items"][0]["measurement"]
    assert (stored["readings"][0]["noise"], stored["loss"]) == (value, value)
    assert service.sample("gns_measurements_not_finite_total") == 1
    assert service.report(report(3)).status_code == 200


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_readings_too_large_to_square_do_not_break_the_run(service: Service, beta: float) -> None:
    policy = {"policy": "noise_scale", "estimator": "split", "noise_beta": beta, "signal_beta": beta}
    service.register(policy=policy)
    for step, noise in enumerate((1e3, 1e76, 1e100, 1e153, 1e200, 1e308, 1e-300, 0.0), start=1):
        changes = {"estimator": "split", "progress": -1e154, "noise": noise, "ceiling_samples": None}
        assert service.report(report(step, reading_changes=changes)).status_code == 200
    assert service.client.get(URL).json()["num_measurements"] == 8


def test_counts_that_no_plan_can_hold_are_refused_and_the_run_goes_on(service: Service) -> None:
    service.register()
    response = service.report(report(1, noise_scale=400.0, plan_version=2**62, optimizer_step=2**62))
    assert response.status_code == 422
    assert service.report(report(1)).status_code == 200


def test_pages_follow_their_cursors_in_both_directions(service: Service) -> None:
    service.register()
    service.report(*(report(step) for step in range(1, 8)))
    for order, expected in (("asc", [1, 2, 3, 4, 5, 6, 7]), ("desc", [7, 6, 5, 4, 3, 2, 1])):
        steps: list[int] = []
        parameters: dict[str, Any] = {"limit": 3, "order": order}
        sizes = []
        while True:
            page = service.client.get(f"{URL}/decisions", params=parameters).json()
            sizes.append(len(page["items"]))
            steps += [item["decision"]["optimizer_step"] for item in page["items"]]
            if page["next_cursor"] is None:
                break
            parameters["cursor"] = page["next_cursor"]
        assert steps == expected
        assert sizes == [3, 3, 1]


def test_runs_are_listed_newest_first_and_paged(service: Service) -> None:
    for number in range(5):
        service.register(f"run-{number}")
    first = service.client.get("/api/v1/runs?limit=3").json()
    second = service.client.get("/api/v1/runs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [item["run_id"] for item in first["items"]] == ["run-4", "run-3", "run-2"]
    assert [item["run_id"] for item in second["items"]] == ["run-1", "run-0"]
    assert second["next_cursor"] is None


@pytest.mark.parametrize("cursor", ["x", "czE=extra", "bTE", "ffff", "c" * 60, "é"])
def test_a_cursor_of_somebody_else_is_refused(service: Service, cursor: str) -> None:
    response = service.client.get("/api/v1/runs", params={"cursor": cursor})
    assert response.status_code == 422
    assert response.json()["errors"][0]["parameter"] == "cursor"


def test_a_run_is_registered_then_running_then_silent_then_finished(service: Service) -> None:
    def state() -> str:
        return str(service.client.get(URL).json()["state"])

    service.register()
    assert state() == "registered"
    service.report(report(1))
    assert state() == "running"
    service.clock.pass_seconds(299)
    assert state() == "running"
    service.clock.pass_seconds(2)
    assert state() == "silent"
    service.report(report(2))
    assert state() == "running"
    service.report(report(3, samples=100_000))
    assert state() == "finished"


def test_a_run_that_reports_rarely_is_given_ten_of_its_gaps(service: Service) -> None:
    service.register()
    for step in range(1, 5):
        service.report(report(step))
        service.clock.pass_seconds(200)
    service.clock.pass_seconds(1700)
    assert service.client.get(URL).json()["state"] == "running"
    service.clock.pass_seconds(200)
    assert service.client.get(URL).json()["state"] == "silent"


def test_a_report_of_progress_alone_is_stored(service: Service) -> None:
    service.register()
    bare = report(1)
    bare["readings"] = []
    assert service.report(bare).json()["decision"]["reason"] == "hold_no_reading"


def test_json_numbers_come_back_exactly(service: Service) -> None:
    service.register()
    service.report(report(1, loss=0.1 + 0.2, step_seconds=5e-324, samples_per_second=1.7976931348623157e308))
    raw = service.client.get(f"{URL}/measurements").text
    stored = json.loads(raw)["items"][0]["measurement"]
    assert (stored["loss"], stored["step_seconds"], stored["samples_per_second"]) == (
        0.30000000000000004,
        5e-324,
        1.7976931348623157e308,
    )


def test_another_schedule_is_the_same_run_and_the_newest_is_projected(make_service: Callable[..., Service]) -> None:
    service = make_service()
    service.register(schedule=[1.0, 0.5])
    assert service.register(incarnation="incarnation-1", schedule=[1.0, 0.25, 0.0]).status_code == 200
    service.close()
    assert make_service().client.get(URL).json()["specification"]["schedule"] == [1.0, 0.25, 0.0]

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.gns_controller.histories import live_through
from tests.gns_controller.running_service import Service, report

URL = "/api/v1/runs/run/replay"


def replayed(service: Service, **body: Any) -> httpx.Response:
    return service.client.post(URL, json=body)


@pytest.mark.parametrize("mode", ["active", "shadow"])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_happened_to_a_run_is_repeated_bit_for_bit(
    make_service: Callable[..., Service], mode: str, seed: int
) -> None:
    """Also by another process, from the disk."""
    service = make_service()
    num_measurements = live_through(service, seed=seed, mode=mode)
    answers = [replayed(service).json()]
    service.close()
    again = make_service()
    answers.append(replayed(again).json())
    assert answers[0] == answers[1]
    for answer in answers:
        assert answer["num_compared"] == answer["num_equal"] == num_measurements > 20
        assert all(row["equal"] for row in answer["rows"])


def test_an_operators_words_are_part_of_what_ran_and_not_of_what_if(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=1.0))
    service.client.post(
        "/api/v1/runs/run/override", json={"kind": "pin", "global_batch_size": 32}, headers={"If-Match": "*"}
    )
    batch = {"batch": 32, "micro_batch_size": 16}
    service.report(report(10, noise_scale=1.0), report(20, samples=464, noise_scale=1.0, **batch))
    happened = replayed(service).json()
    assert [row["replayed_batch_size"] for row in happened["rows"]] == [16, 32, 32]
    assert happened["steps_saved"] == 0
    what_if = replayed(service, policy={"policy": "hold"}).json()
    assert [row["happened_batch_size"] for row in what_if["rows"]] == [16, 32, 32]
    assert [row["replayed_batch_size"] for row in what_if["rows"]] == [16, 16, 16]
    # 464 samples are 29 steps of 16, and 20 were taken: 11 of 16 and 9 of 32.
    assert (what_if["happened_steps"], what_if["replayed_steps"], what_if["steps_saved"]) == (20, 29, -9)
    assert what_if["policy"]["policy"] == "hold"


def test_a_replay_can_be_told_to_follow_the_trainer_or_not(service: Service) -> None:
    """The job kept its batch of 16 and never took the plan."""
    service.register()
    service.report(*(report(step, noise_scale=30.0) for step in (1, 2, 3)))
    assert replayed(service).json()["num_equal"] == 3
    alone = replayed(service, follow_trainer=False).json()
    assert alone["num_equal"] < 3
    following = replayed(service, policy={"policy": "hold"}, follow_trainer=True)
    assert following.status_code == 200


def test_a_replay_writes_nothing(service: Service) -> None:
    service.register()
    service.report(report(1), report(2))
    before = [service.client.get(f"/api/v1/runs/run{path}").json() for path in ("", "/controls", "/decisions")]
    replayed(service)
    replayed(service, policy={"policy": "noise_scale", "noise_tolerance": 0.1})
    assert before == [service.client.get(f"/api/v1/runs/run{path}").json() for path in ("", "/controls", "/decisions")]


def test_a_run_without_measurements_replays_to_nothing(service: Service) -> None:
    service.register()
    answer = replayed(service).json()
    assert (answer["rows"], answer["num_compared"], answer["happened_steps"]) == ([], 0, 0)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"policy": {"policy": "noise_scale", "noise_tolerance": -7}}, "/policy/noise_tolerance"),
        ({"policy": {"policy": "'; --"}}, "/policy"),
        ({"policy": "hold"}, "/policy"),
        ({"follow_trainer": "perhaps"}, "/follow_trainer"),
        ({"steps": 1}, "/steps"),
        ({"policy": {"policy": "linear_ramp", "ramp_tokens": 10, "global_batch_size": 64}}, ""),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_pointer(service: Service, body: Any, pointer: str) -> None:
    service.register()
    service.report(report(1))
    response = replayed(service, **body)
    assert response.status_code == 422
    assert pointer in [error["pointer"] for error in response.json()["errors"]]


def test_a_run_beyond_the_limit_is_told_where_it_can_be_replayed(make_service: Callable[..., Service]) -> None:
    service = make_service(replay_max_measurements=2)
    service.register()
    service.report(report(1), report(2))
    assert replayed(service).status_code == 200
    service.report(report(3))
    response = replayed(service)
    assert (response.status_code, response.json()["type"]) == (413, "urn:gns-controller:problem:replay-too-long")
    assert "gns-controller replay" in response.json()["detail"]


def test_one_replay_at_a_time_and_reports_go_on_meanwhile(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.register()
    service.report(report(1))
    begun, finish = threading.Event(), threading.Event()
    entries = service.store.entries

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert finish.wait(20)
        return entries(*arguments, **options)

    monkeypatch.setattr(service.store, "entries", slow)
    first: list[httpx.Response] = []
    worker = threading.Thread(target=lambda: first.append(replayed(service)))
    worker.start()
    assert begun.wait(10)
    busy = replayed(service)
    assert (busy.status_code, busy.json()["type"]) == (429, "urn:gns-controller:problem:replay-busy")
    assert int(busy.headers["Retry-After"]) >= 1
    assert service.report(report(2)).status_code == 200
    finish.set()
    worker.join(20)
    assert first[0].json()["num_compared"] == 1, "as the run was when it was asked"
    assert replayed(service).json()["num_compared"] == 2


def test_operators_who_speak_while_measurements_arrive_leave_a_log_that_repeats(service: Service) -> None:
    service.register(policy={"policy": "noise_scale", "estimator": "rank_variance", "monotone": False})
    done = threading.Event()
    num_words = 0

    def operate() -> None:
        nonlocal num_words
        anybody = {"If-Match": "*"}
        while not done.is_set():
            body = {"kind": "pin", "global_batch_size": 32 + 2 * (num_words % 8)}
            service.client.post("/api/v1/runs/run/override", json=body, headers=anybody)
            service.client.patch("/api/v1/runs/run/policy", json={"deadband": num_words % 9 / 10}, headers=anybody)
            service.client.delete("/api/v1/runs/run/override", headers=anybody)
            num_words += 3

    operator = threading.Thread(target=operate)
    operator.start()
    for first in range(1, 121, 4):
        service.report(*(report(step, noise_scale=float(step % 13 + 1)) for step in range(first, first + 4)))
    done.set()
    operator.join(20)
    answer = replayed(service).json()
    assert answer["num_equal"] == answer["num_compared"] == 120
    assert service.client.get("/api/v1/runs/run/policy").json()["policy_revision"] == num_words > 10
    reasons = {row["replayed_reason"] for row in answer["rows"]}
    assert "override" in reasons


def test_a_line_of_the_log_that_cannot_be_read_is_not_blamed_on_the_policy(
    make_service: Callable[..., Service],
) -> None:
    service = make_service()
    service.register()
    service.report(report(1), report(2))
    service.close()
    with sqlite3.connect(service.settings.database_url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE log SET body = '{}' WHERE optimizer_step = 1")
    database.close()
    response = replayed(make_service(), policy={"policy": "hold"})
    assert response.status_code == 503
    assert "of the log is damaged" in response.json()["detail"]

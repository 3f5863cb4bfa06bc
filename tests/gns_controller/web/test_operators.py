from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.gns_controller.running_service import Service, report

URL = "/api/v1/runs/run"
GROWS = 400.0
"""A noise scale whose rule asks for far more than 16 samples."""
PIN = {"kind": "pin", "global_batch_size": 32, "note": "the other job needs the memory"}


def slug_of(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["type"]).rpartition(":")[2]


def change(service: Service, patch: Any, *, revision: int | str = "*", **options: Any) -> httpx.Response:
    return service.client.patch(f"{URL}/policy", json=patch, headers={"If-Match": tag(revision)}, **options)


def override(service: Service, body: Any, *, revision: int | str = "*") -> httpx.Response:
    return service.client.post(f"{URL}/override", json=body, headers={"If-Match": tag(revision)})


def release(service: Service, *, revision: int | str = "*", **options: Any) -> httpx.Response:
    return service.client.delete(f"{URL}/override", headers={"If-Match": tag(revision)}, **options)


def tag(revision: int | str) -> str:
    return revision if isinstance(revision, str) else f'"{revision}"'


def policy_of(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = service.client.get(f"{URL}/policy").json()
    return found


def test_the_policy_of_a_run_is_that_of_its_registration_until_somebody_speaks(service: Service) -> None:
    service.register()
    response = service.client.get(f"{URL}/policy")
    view = response.json()
    assert response.headers["ETag"] == '"0"'
    assert set(view) == {"run_id", "state", "policy", "policy_revision", "override", "changed_at"}
    assert (view["policy"]["policy"], view["override"], view["changed_at"]) == ("noise_scale", None, None)
    assert view["state"] == "registered"


def test_a_merge_patch_changes_what_it_names_and_null_takes_a_field_back_to_its_default(service: Service) -> None:
    service.register()
    before = policy_of(service)["policy"]
    response = change(service, {"noise_tolerance": 0.25, "maximum_batch_size": 64, "dwell": {"steps": 5}}, revision=0)
    assert response.status_code == 200
    assert response.headers["ETag"] == '"1"'
    view = response.json()
    assert view["policy"] == {
        **before,
        "noise_tolerance": 0.25,
        "maximum_batch_size": 64,
        "dwell": {"steps": 5, "samples": None},
    }
    assert (view["policy_revision"], view["changed_at"]) == (1, "2026-01-02T03:04:05Z")
    again = change(service, {"maximum_batch_size": None, "dwell": {"steps": None, "samples": 7}}, revision=1).json()
    assert again["policy"]["maximum_batch_size"] is None
    assert again["policy"]["dwell"] == {"steps": None, "samples": 7}
    assert again == policy_of(service)
    change(service, {"growth_cap": 9, "deadband": 0.3}, revision=2)
    default = change(service, {"growth_cap": None, "deadband": None}, revision=3).json()["policy"]
    assert (default["growth_cap"], default["deadband"]) == (4.0, 0.0)


def test_another_policy_replaces_the_document_and_decides_the_next_measurement(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=1.0))
    view = change(service, {"policy": "stages", "stages": [{"from_samples": 0, "global_batch_size": 64}]}).json()
    assert "noise_tolerance" not in view["policy"]
    decision = service.report(report(2, noise_scale=1.0)).json()["decision"]
    assert (decision["policy"], decision["policy_revision"], decision["reason"]) == ("stages", 1, "stage")


def test_averages_are_kept_over_a_change_of_policy(service: Service) -> None:
    """beta = 0.9: 0.9 * 16 + 0.1 * 36 = 18, although the second measurement was decided by another policy."""
    service.register()
    service.report(report(1, noise_scale=16.0))
    change(service, {"policy": "hold", "estimator": "rank_variance"})
    decision = service.report(report(2, noise_scale=36.0, batch=64)).json()["decision"]
    assert decision["policy"] == "hold"
    assert decision["noise_sq"] == pytest.approx(18.0)


@pytest.mark.parametrize("content_type", ["application/merge-patch+json", "application/json; charset=utf-8"])
def test_a_patch_comes_under_either_type(service: Service, content_type: str) -> None:
    service.register()
    response = service.client.patch(
        f"{URL}/policy", content=b'{"deadband": 0.5}', headers={"Content-Type": content_type, "If-Match": '"0"'}
    )
    assert response.json()["policy"]["deadband"] == 0.5


@pytest.mark.parametrize(
    ("patch", "pointer"),
    [
        ({"noise_tolerance": -1}, "/noise_tolerance"),
        ({"nothing/~": 1}, "/nothing~1~0"),
        ({"dwell": {"steps": 1, "samples": 2}}, "/dwell"),
        ({"policy": "'; DROP TABLE runs; --"}, ""),
        ({"policy": None}, ""),
        ({"policy": ["noise_scale"]}, ""),
        ({"policy": "stages", "stages": [{"from_samples": -1, "global_batch_size": 64}]}, "/stages/0/from_samples"),
        ({"policy": "stages", "stages": [], "deadband": 7}, "/deadband"),
        ({"minimum_batch_size": 64, "maximum_batch_size": 32}, ""),
        ({"policy": "decay_to_ramp", "noise_tolerance": 1}, "/noise_tolerance"),
        ([], ""),
        ("noise_scale", ""),
    ],
)
def test_a_policy_that_cannot_steer_the_run_is_refused_with_a_pointer(
    service: Service, patch: Any, pointer: str
) -> None:
    service.register()
    response = change(service, patch)
    assert (response.status_code, slug_of(response)) == (422, "invalid-input")
    assert pointer in [error["pointer"] for error in response.json()["errors"]]
    assert "DROP" not in response.text
    assert policy_of(service)["policy_revision"] == 0


def test_a_policy_that_the_runs_specification_forbids_is_refused_with_the_reason(service: Service) -> None:
    group = {"name": "all", "geometry": "sign", "optimizer": "Signum", "num_tensors": 1, "num_parameters": 1}
    service.register(parameter_groups=[group], batch={"global_batch_size": 16, "micro_batch_size": 32})
    response = change(service, {"geometry": "spectral"})
    assert response.status_code == 422
    assert "no parameter group has it; groups have sign" in response.json()["detail"]
    tokens = change(service, {"policy": "linear_ramp", "ramp_tokens": 10_000, "global_batch_size": 64})
    assert "tokens_per_sample" in tokens.json()["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/json-patch+json", ""])
def test_a_patch_of_another_type_is_415(service: Service, content_type: str) -> None:
    service.register()
    headers = {"Content-Type": content_type, "If-Match": "*"}
    response = service.client.patch(f"{URL}/policy", content=b"{}", headers=headers)
    assert slug_of(response) == "unsupported-media-type"


@pytest.mark.parametrize("content", [b"", b"{", b'{"deadband": NaN}', b"[" * 100_000])
def test_a_patch_that_is_not_json_is_400(service: Service, content: bytes) -> None:
    service.register()
    headers = {"Content-Type": "application/merge-patch+json", "If-Match": "*"}
    assert slug_of(service.client.patch(f"{URL}/policy", content=content, headers=headers)) == "malformed-json"


def words(service: Service, headers: dict[str, str]) -> list[httpx.Response]:
    return [
        service.client.patch(f"{URL}/policy", json={"deadband": 0.1}, headers=headers),
        service.client.put(f"{URL}/policy", json={"policy": "hold"}, headers=headers),
        service.client.post(f"{URL}/override", json={"kind": "hold"}, headers=headers),
        service.client.delete(f"{URL}/override", headers=headers),
    ]


def test_nobody_speaks_without_the_revision_they_have_seen(service: Service) -> None:
    service.register()
    for response in words(service, {}):
        assert (response.status_code, slug_of(response)) == (428, "revision-required")
    for etag in ('"1"', 'W/"0"', "1", "00", '"00"', "", '"0', '"x", "7"', '"99999999999999999999"'):
        for response in words(service, {"If-Match": etag}):
            assert (response.status_code, slug_of(response)) == (412, "revision-conflict"), etag
            assert response.json()["policy_revision"] == 0
    assert change(service, {}, revision='"7", "0"').status_code == 200
    bare = change(service, {}, revision=str(policy_of(service)["policy_revision"]))
    assert bare.status_code == 200


def test_words_about_a_run_that_nobody_registered_are_404(service: Service) -> None:
    for response in (
        *words(service, {"If-Match": "*"}),
        service.client.get(f"{URL}/policy"),
        service.client.get(f"{URL}/controls"),
        service.client.post(f"{URL}/replay", json={}),
    ):
        assert slug_of(response) == "unknown-run"


def test_of_two_who_speak_about_the_same_revision_one_is_heard(service: Service) -> None:
    service.register()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: change(service, {"deadband": n / 100}, revision=0), range(8)))
    assert sorted(response.status_code for response in found) == [200] + [412] * 7
    winner = next(response for response in found if response.status_code == 200)
    assert policy_of(service) == winner.json()
    assert policy_of(service)["policy_revision"] == 1


def test_a_pin_decides_until_it_is_released_and_the_policy_goes_on(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=1.0))
    view = override(service, PIN, revision=0).json()
    assert (view["override"], view["policy_revision"]) == (PIN, 1)
    assert service.client.get(URL).json()["override"] == PIN
    assert service.client.get(URL).json()["plan"]["global_batch_size"] == 16, "in force from the next measurement on"

    pinned = service.report(report(2, noise_scale=GROWS)).json()
    assert (pinned["decision"]["reason"], pinned["plan"]["global_batch_size"]) == ("override", 32)
    assert (pinned["override"], pinned["policy_revision"]) == (PIN, 1)
    batch = {"batch": 32, "micro_batch_size": 16}
    assert service.report(report(4, noise_scale=GROWS, **batch)).json()["decision"]["reason"] == "override"

    view = release(service, revision=1, params={"note": "done"}).json()
    assert (view["override"], view["policy_revision"]) == (None, 2)
    grown = service.report(report(5, noise_scale=GROWS, **batch)).json()
    assert grown["decision"]["reason"] in ("grow", "capped_growth")
    assert grown["plan"]["global_batch_size"] > 32


def test_a_hold_keeps_whatever_batch_is_in_force(service: Service) -> None:
    service.register()
    override(service, {"kind": "hold"})
    held = service.report(report(1, noise_scale=GROWS)).json()
    assert (held["decision"]["reason"], held["plan"]["global_batch_size"]) == ("override", 16)
    assert held["decision"]["noise_scale"] == pytest.approx(GROWS), "measured all the same"


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"kind": "pin", "global_batch_size": 17}, "/global_batch_size", "Nearest reachable: 16 or 18"),
        ({"kind": "pin", "global_batch_size": 100}, "/global_batch_size", "Nearest reachable: 64 or 128"),
        ({"kind": "pin", "global_batch_size": 1}, "/global_batch_size", "Nearest reachable: 2"),
        ({"kind": "pin", "global_batch_size": 2**62}, "/global_batch_size", "2^40"),
        ({"kind": "pin", "global_batch_size": 0}, "/global_batch_size", "greater than or equal to 1"),
        ({"kind": "pin"}, "", "names a global_batch_size"),
        ({"kind": "hold", "global_batch_size": 16}, "", "names a global_batch_size"),
        ({"kind": "stop"}, "/kind", "'pin' or 'hold'"),
        ({"kind": "hold", "note": "x" * 501}, "/note", "500"),
        ({"kind": "hold", "sql": "' OR 1=1; --"}, "/sql", "Unknown field"),
    ],
)
def test_an_override_that_cannot_be_is_refused_with_what_can(
    service: Service, body: Any, pointer: str, words: str
) -> None:
    service.register()
    response = override(service, body)
    assert (response.status_code, slug_of(response)) == (422, "invalid-input")
    [error] = response.json()["errors"]
    assert error["pointer"] == pointer
    assert words in error["detail"]
    assert policy_of(service)["policy_revision"] == 0


def test_a_pin_beyond_what_is_left_of_the_budget_is_refused_with_both_numbers(service: Service) -> None:
    service.register(budget_samples=12_000)
    mistyped = {"kind": "pin", "global_batch_size": 102_400}
    response = override(service, mistyped)
    assert (response.status_code, slug_of(response)) == (422, "invalid-input")
    [error] = response.json()["errors"]
    assert error["pointer"] == "/global_batch_size"
    assert "102400" in error["detail"]
    assert "12000" in error["detail"]
    assert override(service, {"kind": "pin", "global_batch_size": 11_968}).status_code == 200
    release(service)
    service.report(report(1, samples=11_900))
    refused = override(service, {"kind": "pin", "global_batch_size": 128}).json()["detail"]
    assert "128" in refused
    assert "100 of the 12000" in refused
    assert override(service, {"kind": "pin", "global_batch_size": 64}).status_code == 200
    service.report(report(2, samples=11_990, batch=64))
    assert override(service, {"kind": "pin", "global_batch_size": 64}).status_code == 200, "in force already"
    service.register(incarnation="incarnation-1", budget_samples=12_000)
    assert override(service, {"kind": "pin", "global_batch_size": 128}).status_code == 200, "from the start again"


def test_a_word_about_a_finished_run_is_kept_for_its_next_attempt_and_says_so(service: Service) -> None:
    service.register(budget_samples=1600)
    assert override(service, {"kind": "hold"}).json()["state"] == "registered"
    service.report(report(100, samples=1600))
    for response in (
        override(service, PIN),
        change(service, {"deadband": 0.3}),
        service.client.put(f"{URL}/policy", json={"policy": "hold"}, headers={"If-Match": "*"}),
        release(service),
        service.client.get(f"{URL}/policy"),
    ):
        assert (response.status_code, response.json()["state"]) == (200, "finished")
    override(service, PIN)
    service.register(incarnation="incarnation-1", budget_samples=1600)
    decision = service.report(report(1, attempt=1)).json()["decision"]
    assert (decision["reason"], decision["plan"]["global_batch_size"]) == ("override", 32)


def test_a_pin_is_checked_against_the_ranks_of_the_present_attempt(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=1.0))
    assert override(service, {"kind": "pin", "global_batch_size": 18}).status_code == 200
    service.register(incarnation="incarnation-1", data_parallel_size=4, resume_step=1)
    refused = override(service, {"kind": "pin", "global_batch_size": 18})
    assert "Nearest reachable: 16 or 20" in refused.json()["detail"]


def test_there_is_nothing_to_release_without_an_override(service: Service) -> None:
    service.register()
    assert slug_of(release(service)) == "no-override"
    override(service, {"kind": "hold"})
    assert release(service).status_code == 200
    assert slug_of(release(service)) == "no-override"
    assert policy_of(service)["policy_revision"] == 2


def test_a_restart_keeps_policy_and_override(service: Service) -> None:
    service.register()
    change(service, {"deadband": 0.3})
    override(service, PIN)
    reply = service.register(incarnation="incarnation-1").json()
    assert (reply["policy"]["deadband"], reply["override"], reply["policy_revision"]) == (0.3, PIN, 2)
    assert service.report(report(1, attempt=1)).json()["decision"]["reason"] == "override"


def test_notes_are_kept_as_they_were_written(service: Service) -> None:
    odd = "'); DROP TABLE log; -- \" \\ </script> \u2028 \U0001f40d \x00"
    service.register()
    assert override(service, {"kind": "hold", "note": odd}).status_code == 200
    release(service, params={"note": "r" * 500})
    change(service, {}, params={"note": "p"})
    items = service.client.get(f"{URL}/controls").json()["items"]
    assert [item["action"] for item in items] == ["registered", "override", "release", "policy"]
    assert [item.get("note") for item in items] == [None, odd, "r" * 500, "p"]
    assert service.client.get("/api/v1/runs").status_code == 200
    too_long = release(service, params={"note": "r" * 501})
    assert (too_long.status_code, too_long.json()["errors"][0]["parameter"]) == (422, "note")


def test_controls_are_what_happened_between_measurements_in_pages(service: Service) -> None:
    service.register()
    service.report(report(1))
    change(service, {"deadband": 0.3})
    service.report(report(2))
    override(service, {"kind": "hold"})
    service.register(incarnation="incarnation-1", resume_step=1, data_parallel_size=4)
    items = service.client.get(f"{URL}/controls").json()["items"]
    assert [item["sequence"] for item in items] == [1, 3, 5, 6]
    assert items[-1] == {
        "action": "registered",
        "sequence": 6,
        "received_at": "2026-01-02T03:04:05Z",
        "attempt": 1,
        "resume_step": 1,
        "data_parallel_size": 4,
    }
    assert [item["policy_revision"] for item in items[1:3]] == [1, 2]
    newest = service.client.get(f"{URL}/controls", params={"order": "desc", "limit": 3}).json()
    rest = service.client.get(f"{URL}/controls", params={"order": "desc", "cursor": newest["next_cursor"]}).json()
    assert [item["sequence"] for item in (*newest["items"], *rest["items"])] == [6, 5, 3, 1]
    assert rest["next_cursor"] is None


def test_a_word_is_on_disk_when_it_is_answered(make_service: Callable[..., Service]) -> None:
    service = make_service()
    service.register()
    override(service, PIN)
    change(service, {"deadband": 0.3})
    before = policy_of(service)
    service.close()
    again = make_service()
    assert policy_of(again) == before
    assert again.report(report(1, noise_scale=GROWS)).json()["decision"]["reason"] == "override"


def test_somebody_who_waits_for_a_plan_is_not_woken_by_words(service: Service) -> None:
    service.register()
    answers: list[int] = []

    def wait() -> None:
        response = service.client.get(f"{URL}/schedule", params={"after": 0, "wait": 20})
        answers.append(response.json()["plans"][-1]["version"])

    waiter = threading.Thread(target=wait)
    waiter.start()
    override(service, PIN)
    waiter.join(0.3)
    assert answers == []
    service.report(report(1))
    waiter.join(10)
    assert answers == [1]


def test_nobody_speaks_or_replays_without_a_token_where_there_are_tokens(make_service: Callable[..., Service]) -> None:
    service = make_service(token_hashes=hashlib.sha256(b"secret").hexdigest())
    refused = [*words(service, {"If-Match": "*"}), service.client.post(f"{URL}/replay", json={})]
    assert [slug_of(response) for response in refused] == ["unauthorized"] * 5
    service.client.headers["Authorization"] = "Bearer secret"
    service.register()
    assert change(service, {}).status_code == 200

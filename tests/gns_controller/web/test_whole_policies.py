"""PUT /runs/{run_id}/policy: a document and no patch."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.gns_controller.running_service import Service, report
from tests.gns_controller.web.test_operators import GROWS, URL, change, policy_of, slug_of, tag


def replace(service: Service, document: Any, *, revision: int | str = "*", **options: Any) -> httpx.Response:
    return service.client.put(f"{URL}/policy", json=document, headers={"If-Match": tag(revision)}, **options)


def test_a_whole_policy_takes_the_place_of_the_one_before_and_null_in_it_is_null(service: Service) -> None:
    """The published rule as closed-loop-policies.md prints it: without a cap, where the default is one of 4."""
    published = {"policy": "noise_scale", "estimator": "rank_variance", "growth_cap": None, "act_on_unresolved": True}
    service.register()
    change(service, {"deadband": 0.3, "dwell": {"steps": 5}})
    response = replace(service, published, revision=1, params={"note": "as printed"})
    assert (response.status_code, response.headers["ETag"]) == (200, '"2"')
    policy = response.json()["policy"]
    assert (policy["growth_cap"], policy["act_on_unresolved"]) == (None, True)
    assert (policy["deadband"], policy["dwell"]) == (0.0, None), "nothing of the policy before is left"
    assert response.json() == policy_of(service)
    control = service.client.get(f"{URL}/controls").json()["items"][-1]
    assert (control["action"], control["note"]) == ("policy", "as printed")
    # 400 / 0.6^2 = 1111 samples, floored to whole passes of 2 * 32.
    grown = service.report(report(1, noise_scale=GROWS)).json()
    assert grown["plan"]["global_batch_size"] == 1111 // 64 * 64


@pytest.mark.parametrize(
    ("document", "pointer"),
    [
        ({}, ""),
        ({"noise_tolerance": 0.5}, ""),
        ({"policy": "noise_scale", "deadband": None}, "/deadband"),
        ({"policy": "stages", "stages": [], "deadband": 7}, "/deadband"),
        ({"policy": "linear_ramp", "ramp_tokens": 10_000, "global_batch_size": 64}, ""),
        ([], ""),
        ("noise_scale", ""),
    ],
)
def test_a_whole_policy_that_cannot_steer_the_run_is_refused_with_a_pointer(
    service: Service, document: Any, pointer: str
) -> None:
    service.register()
    response = replace(service, document)
    assert (response.status_code, slug_of(response)) == (422, "invalid-input")
    assert pointer in [error["pointer"] for error in response.json()["errors"]]
    assert policy_of(service)["policy_revision"] == 0


def test_a_whole_policy_is_json_and_no_patch(service: Service) -> None:
    service.register()
    headers = {"Content-Type": "application/merge-patch+json", "If-Match": "*"}
    response = service.client.put(f"{URL}/policy", content=b'{"policy": "hold"}', headers=headers)
    assert slug_of(response) == "unsupported-media-type"

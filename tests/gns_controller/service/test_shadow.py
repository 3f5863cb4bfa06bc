"""Shadow mode: what is said of the run as it is, and what of the ramp that nobody follows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.gns_controller.running_service import Server, Service, registration, report, run_cli

URL = "/api/v1/runs/run"
BUDGET = 100_000


def test_what_a_run_in_shadow_mode_does_is_not_what_it_is_told(service: Service) -> None:
    """16 samples a step on two ranks with micro-batches of 4, while the policy asks for 512."""
    stages = [{"from_samples": 100, "global_batch_size": 512}, {"from_samples": 50_000, "global_batch_size": 1024}]
    service.register(
        mode="shadow",
        batch={"global_batch_size": 16, "micro_batch_size": 4},
        policy={"policy": "stages", "stages": stages},
    )
    cut = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    for step in (50, 100, 150):
        service.report(report(step, **cut))
    view, schedule = service.client.get(URL).json(), service.client.get(f"{URL}/schedule").json()
    left = math.ceil((BUDGET - 16 * 150) / 16)
    assert schedule["projection"]["steps_left"] == {"expected": left, "least": left, "most": left}
    assert view["advised_data_parallel_size"] == schedule["advised_data_parallel_size"] == 16 // 4
    assert service.sample("gns_projected_steps_left", run_id="run") == left
    assert service.sample("gns_advised_data_parallel_size", run_id="run") == 16 // 4
    # The ramp that it would have: as in active mode.
    assert [stage["global_batch_size"] for stage in schedule["projection"]["stages"]] == [512, 1024]
    assert view["savings"]["steps_saved"] == 0
    replayed = service.client.post(f"{URL}/replay", json={}).json()
    assert [row["happened_batch_size"] for row in replayed["rows"]] == [16, 16, 16]
    assert [row["replayed_batch_size"] for row in replayed["rows"]] == [512, 512, 512]
    assert replayed["num_equal"] == replayed["num_compared"] == 3


def test_before_the_first_report_of_a_run_in_shadow_mode_the_first_batch_stands(service: Service) -> None:
    service.register(mode="shadow", batch={"global_batch_size": 16, "micro_batch_size": 4})
    view = service.client.get(URL).json()
    assert view["advised_data_parallel_size"] == 4


def test_steps_left_follow_a_trainer_that_changes_its_batch_by_itself(service: Service) -> None:
    service.register(mode="shadow", policy={"policy": "hold"})
    service.report(report(10, samples=160))
    assert service.sample("gns_projected_steps_left", run_id="run") == (BUDGET - 160) / 16
    service.report(report(11, samples=160 + 256, batch=256, gradient_accumulation_steps=4))
    assert service.sample("gns_projected_steps_left", run_id="run") == math.ceil((BUDGET - 416) / 256)


@pytest.mark.slow
def test_the_command_line_tells_the_batch_that_the_trainer_runs(server: Server, tmp_path: Path) -> None:
    stages = {"policy": "stages", "stages": [{"from_samples": 0, "global_batch_size": 512}]}
    body = registration(mode="shadow", policy=stages)
    server.http.put(URL, json=body).raise_for_status()

    def told(*words: str) -> str:
        return run_cli("run", *words, "--url", server.url, folder=tmp_path)[1]

    assert "batch            16 samples (plan 0)" in told("show", "run")
    server.http.post(f"{URL}/measurements", json={"measurements": [report(10)]}).raise_for_status()
    assert server.http.get(URL).json()["plan"]["global_batch_size"] == 512
    assert "batch            16 samples (plan 1)" in told("show", "run")
    assert told("ls").splitlines()[1].split()[4] == "16"

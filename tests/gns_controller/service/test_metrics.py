from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gns_controller.running_service import Service, report

READING = {"run_id": "run", "geometry": "spectral", "estimator": "rank_variance"}


def test_run_series_equal_a_fold_done_by_hand(service: Service) -> None:
    """noise^2 = 16 then 36, signal^2 = 1, beta = 0.9: 0.9 * 16 + 0.1 * 36 = 18. theta = 0.5 asks for 4 * 18 = 72
    samples, floored to 64 = one full pass of 2 ranks of 32. sqrt coupling: (64 / 16)^(1/2) = 2.
    """
    service.register(mode="active")
    changes = {"ceiling": 90.0}
    service.report(report(1, noise_scale=16.0, reading_changes=changes))
    service.report(
        report(
            2,
            noise_scale=36.0,
            reading_changes=changes,
            batch=64,
            micro_batch_size=32,
            samples=80,
            loss=3.25,
            validation_loss=3.5,
            step_seconds=0.25,
            samples_per_second=256.0,
        )
    )
    expected = {
        "gns_noise_scale_samples": 18.0,
        "gns_noise_scale_ceiling_samples": 90.0,
        "gns_resolution_ratio": 0.2,
        "gns_unresolved": 0.0,
    }
    for name, value in expected.items():
        assert service.sample(name, **READING) == pytest.approx(value, rel=1e-12), name
    expected = {
        "gns_global_batch_size_samples": 64.0,
        "gns_learning_rate_factor": 2.0,
        "gns_loss": 3.25,
        "gns_validation_loss": 3.5,
        "gns_run_optimizer_step": 2.0,
        "gns_run_samples_seen": 80.0,
        "gns_run_budget_samples": 100_000.0,
        "gns_step_seconds": 0.25,
        "gns_samples_per_second": 256.0,
        "gns_run_last_report_timestamp_seconds": service.clock.now.timestamp(),
        "gns_run_silent": 0.0,
    }
    for name, value in expected.items():
        assert service.sample(name, run_id="run") == pytest.approx(value, rel=1e-12), name


def test_the_interval_of_the_noise_scale_equals_one_done_by_hand(service: Service) -> None:
    """noise^2 = 16 four times, then 36: mean 18, spread 0.9 * 2^2 + 0.1 * 18^2 = 36. signal^2 = 1 has no spread."""
    service.register()
    for step in range(1, 5):
        service.report(report(step, noise_scale=16.0))
    assert service.sample("gns_noise_scale_low_samples", **READING) is None
    assert service.sample("gns_noise_scale_high_samples", **READING) is None
    service.report(report(5, noise_scale=36.0))
    weights = [0.9**4, 0.1 * 0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    squares = sum(weight * weight for weight in weights)
    standard_error = math.sqrt(36 * squares / (1 - squares))
    assert service.sample("gns_noise_scale_low_samples", **READING) == pytest.approx(max(18 - 2 * standard_error, 0))
    assert service.sample("gns_noise_scale_high_samples", **READING) == pytest.approx(18 + 2 * standard_error)


def test_counters_count_what_was_stored_skipped_and_refused(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=1.0), report(2, noise_scale=1.0))
    service.report(report(2), report(3, noise_scale=1.0))
    service.report(report(4, attempt=7))
    service.report(report(1), run_id="nobody")
    service.report({})
    service.client.post("/api/v1/runs/run/measurements", content=b"{")
    assert service.sample("gns_measurements_total") == 3
    assert service.sample("gns_measurements_duplicate_total") == 1
    assert service.sample("gns_measurements_rejected_total", reason="invalid-input") == 1
    assert service.sample("gns_measurements_rejected_total", reason="unknown-run") == 2
    assert service.sample("gns_measurements_rejected_total", reason="unsupported-media-type") == 1
    assert service.sample("gns_decisions_total", reason="hold_monotone") == 3
    assert service.sample("gns_decision_duration_seconds_count") == 3
    assert service.sample("gns_store_commit_duration_seconds_count") == 5
    labels = {"route": "/api/v1/runs/{run_id}/measurements", "method": "POST", "status": "200"}
    assert service.sample("gns_http_request_duration_seconds_count", **labels) == 2


def test_a_report_without_readings_keeps_the_noise_scale_in_sight(service: Service) -> None:
    service.register()
    service.report(report(1, noise_scale=16.0))
    before = service.sample("gns_noise_scale_samples", **READING)
    service.report(report(2, readings=[]))
    assert before == service.sample("gns_noise_scale_samples", **READING) == pytest.approx(16.0)


def test_a_value_that_is_not_finite_is_left_out(service: Service) -> None:
    service.register()
    service.report(report(1, loss=float("nan"), step_seconds=float("inf")))
    assert service.sample("gns_loss", run_id="run") is None
    assert service.sample("gns_step_seconds", run_id="run") is None
    assert service.sample("gns_run_optimizer_step", run_id="run") == 1


@pytest.mark.parametrize(("samples", "state"), [(16, "silent"), (100_000, "finished")])
def test_series_of_a_run_that_is_over_vanish_after_the_retention(service: Service, samples: int, state: str) -> None:
    service.register()
    service.report(report(1, samples=samples))
    service.clock.pass_seconds(3599)
    assert service.sample("gns_run_optimizer_step", run_id="run") == 1
    assert service.sample("gns_runs", state=state) == 1
    assert service.sample("gns_run_silent", run_id="run") == float(state == "silent")
    service.clock.pass_seconds(2)
    assert service.sample("gns_run_optimizer_step", run_id="run") is None
    assert service.sample("gns_runs", state=state) == 1


def test_only_so_many_runs_have_series_and_they_are_those_that_reported_last(
    make_service: Callable[..., Service],
) -> None:
    service = make_service(metrics_max_runs=2)
    for number in range(4):
        service.register(f"run-{number}")
        service.clock.pass_seconds(1)
    service.report(report(1, run_id="run-0"), run_id="run-0")
    shown = [number for number in range(4) if service.sample("gns_run_budget_samples", run_id=f"run-{number}")]
    assert shown == [0, 3]


def test_the_exposition_parses_and_every_family_is_ours_with_a_help_text(service: Service) -> None:
    service.register()
    service.report(report(1))
    response = service.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(response.text))
    assert len(families) > 20
    for family in families:
        assert family.name.startswith("gns_")
        assert family.documentation


def test_what_the_ramp_was_worth_and_what_is_left_equal_sums_done_by_hand(service: Service) -> None:
    """100 000 samples of budget. 640 of them took 25 steps, 20 of 16 and 5 of 64 samples: 16 throughout takes 40."""
    service.register(policy={"policy": "hold"}, batch={"global_batch_size": 16, "micro_batch_size": 4})
    names = ("optimizer_steps_saved", "seconds_saved", "projected_steps_left")
    assert [service.sample(f"gns_{name}", run_id="run") for name in names] == [None] * 3
    assert service.sample("gns_policy_revision", run_id="run") == 0
    assert service.sample("gns_override_active", run_id="run") == 0
    assert service.sample("gns_advised_data_parallel_size", run_id="run") == 4
    service.report(report(20, samples=320, step_seconds=0.5, micro_batch_size=4, gradient_accumulation_steps=2))
    assert service.sample("gns_projected_steps_left", run_id="run") == (100_000 - 320) / 16
    batch = {"batch": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 8}
    service.report(report(25, samples=640, step_seconds=1.0, **batch))
    assert service.sample("gns_optimizer_steps_saved", run_id="run") == 40 - 25
    assert service.sample("gns_seconds_saved", run_id="run") == pytest.approx(40 * 0.5 - (20 * 0.5 + 5 * 1.0))
    assert service.sample("gns_advised_data_parallel_size", run_id="run") == 64 / 4
    assert service.sample("gns_projected_steps_left", run_id="run") == pytest.approx((100_000 - 640) / 64, abs=1)
    service.client.post("/api/v1/runs/run/override", json={"kind": "hold"}, headers={"If-Match": '"0"'})
    assert service.sample("gns_policy_revision", run_id="run") == 1
    assert service.sample("gns_override_active", run_id="run") == 1


def test_steps_left_count_down_between_projections(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 % of the budget is 1000 samples: up to there the steps since are subtracted, and nothing is folded."""
    service.register(policy={"policy": "hold"})
    service.report(report(1, samples=16))
    first = service.sample("gns_projected_steps_left", run_id="run")
    assert first == pytest.approx((100_000 - 16) / 16, abs=1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("folded again")

    with monkeypatch.context() as patched:
        patched.setattr("gns_controller.service.projection_cache.project", refuse)
        service.report(report(11, samples=176))
        assert service.sample("gns_projected_steps_left", run_id="run") == first - 10
    service.report(report(101, samples=1616))
    assert service.sample("gns_projected_steps_left", run_id="run") == pytest.approx((100_000 - 1616) / 16, abs=1)


def test_a_finished_run_has_no_steps_left(service: Service) -> None:
    """The end of the series is a zero, and not a gap that looks like a fault."""
    service.register(policy={"policy": "hold"})
    service.report(report(1, samples=16))
    service.report(report(6250, samples=100_000))
    assert service.sample("gns_projected_steps_left", run_id="run") == 0

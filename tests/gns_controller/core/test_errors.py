from __future__ import annotations

from gns_controller.core.errors import RunConflictError


def test_a_conflict_names_what_differs_and_no_lists() -> None:
    policy = {"policy": "noise_scale", "noise_tolerance": 0.5, "deadband": 0.0}
    registered = {"data_parallel_size": 1, "budget_samples": 9, "schedule": [0.125, 1.0], "policy": policy}
    requested = {
        "data_parallel_size": 2,
        "budget_samples": 9,
        "schedule": [0.125, 0.5],
        "policy": {**policy, "noise_tolerance": 1.0},
    }
    said = str(RunConflictError("run", registered=dict(registered), requested=dict(requested)))
    assert "(policy.noise_tolerance: registered 0.5, requested 1.0; schedule: differs)" in said
    requested["policy"] = {"policy": "stages", "stages": []}
    said = str(RunConflictError("run", registered=dict(registered), requested=dict(requested)))
    assert "(policy.policy: registered noise_scale, requested stages; schedule: differs)" in said

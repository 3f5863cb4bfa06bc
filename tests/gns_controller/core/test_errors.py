from __future__ import annotations

from gns_controller.core.errors import RunConflictError


def test_a_conflict_names_what_differs_and_no_lists() -> None:
    policy = {"policy": "noise_scale", "noise_tolerance": 0.5, "deadband": 0.0}
    registered = {
        "data_parallel_size": 1,
        "schedule": [0.125, 1.0],
        "parameter_groups": [{"name": "matrices"}],
        "policy": policy,
    }
    requested = {
        "data_parallel_size": 2,
        "schedule": [0.125, 0.5],
        "parameter_groups": [],
        "policy": {**policy, "noise_tolerance": 1.0},
    }
    said = str(RunConflictError("run", registered=dict(registered), requested=dict(requested)))
    assert "(parameter_groups: differs; policy.noise_tolerance: registered 0.5, requested 1.0)" in said
    requested["policy"] = {"policy": "stages", "stages": []}
    said = str(RunConflictError("run", registered=dict(registered), requested=dict(requested)))
    assert "(parameter_groups: differs; policy.policy: registered noise_scale, requested stages)" in said

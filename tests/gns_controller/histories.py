"""Runs with everything in them that a log can hold: operators, restarts, duplicates, deliveries out of order."""

from __future__ import annotations

import random
from typing import Any

from tests.gns_controller.running_service import Service, report

POLICIES: list[dict[str, Any]] = [
    {"policy": "hold", "estimator": "rank_variance"},
    {"policy": "noise_scale", "estimator": "rank_variance", "noise_tolerance": 0.7, "monotone": False},
    {"policy": "noise_scale", "estimator": "rank_variance", "growth_cap": 1.5, "dwell": {"samples": 300}},
    {"policy": "stages", "stages": [{"from_samples": 400, "global_batch_size": 48}]},
    {"policy": "linear_ramp", "global_batch_size": 128, "ramp_samples": 2000},
    {"policy": "norm_test", "estimator": "rank_variance"},
]
OVERRIDES: list[dict[str, Any]] = [
    {"kind": "hold"},
    {"kind": "pin", "global_batch_size": 64, "note": "as large as it gets"},
    {"kind": "pin", "global_batch_size": 16},
]


def live_through(service: Service, *, seed: int, num_turns: int = 60, **specification: Any) -> int:
    """A run that goes through a random history; returns how many measurements it has."""
    chance = random.Random(seed)
    specification = {"policy": POLICIES[1], **specification}
    service.register(incarnation=f"incarnation-{seed}-0", **specification)
    attempt, step, samples, stored = 0, 0, 0, 0
    anybody = {"If-Match": "*"}
    url = "/api/v1/runs/run"
    passed: dict[int, int] = {0: 0}
    sent: list[dict[str, Any]] = []
    for turn in range(1, num_turns + 1):
        kind = chance.choices(("report", "policy", "override", "release", "restart", "odd"), (10, 2, 2, 1, 1, 2))[0]
        if kind == "policy":
            assert service.client.patch(f"{url}/policy", json=chance.choice(POLICIES), headers=anybody).is_success
        elif kind == "override":
            assert service.client.post(f"{url}/override", json=chance.choice(OVERRIDES), headers=anybody).is_success
        elif kind == "release":
            service.client.delete(f"{url}/override", headers=anybody)
        elif kind == "restart":
            step = chance.choice([known for known in passed if known <= step])
            samples = passed[step]
            body = {"incarnation": f"incarnation-{seed}-{turn}", "resume_step": step}
            ranks = chance.choice((2, 4))
            attempt = service.register(**body, **specification, data_parallel_size=ranks).json()["attempt"]
            sent = []
        elif kind == "odd" and len(sent) > 1:
            again = service.report(*sent[-3:]).json()
            assert again["accepted"] == 0
            late, later = report(step + 1, attempt=attempt, samples=samples), report(step + 2, attempt=attempt)
            assert service.report(later, late).status_code == 422
        else:
            plan = service.client.get(url).json()["plan"]
            batch = []
            for _ in range(chance.randint(1, 4)):
                steps = chance.randint(1, 5)
                step, samples = step + steps, samples + steps * plan["global_batch_size"]
                one = report(
                    step,
                    noise_scale=chance.lognormvariate(2, 1),
                    reading_changes={"signal": chance.choice((1.0, 1.0, 0.5, float("nan")))},
                    attempt=attempt,
                    samples=samples,
                    batch=plan["global_batch_size"] if chance.random() < 0.9 else 16,
                    micro_batch_size=plan["micro_batch_size"],
                    gradient_accumulation_steps=plan["gradient_accumulation_steps"],
                    plan_version=plan["version"],
                    schedule_factor=chance.random(),
                    step_seconds=chance.random(),
                )
                batch.append(one)
                passed[step] = samples
            reply = service.report(*batch)
            assert reply.status_code == 200, reply.text
            stored += reply.json()["accepted"]
            sent += batch
    return stored

"""A resume on ranks that cannot make the old batch: the service and the trainer remember the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import BatchPlan, NoiseScaleMeasurement, Span
from gns_controller.core.policies import LinearRampPolicyConfig, PolicyState, initial_state
from gns_controller.core.runs import Registration, RunSpecification
from tests.gns_controller.core.measurements import measurement
from tests.gns_controller.running_service import Service
from tests.trainer_hooks.client.test_http import Wire, refuse
from trainer_hooks.client import HttpController
from trainer_hooks.session.checkpoint import first_state
from trainer_hooks.session.plan_agreement import reachable_plan

RULES = BatchRules(global_batch_size=8, micro_batch_size=8)
POLICY = LinearRampPolicyConfig(global_batch_size=320, ramp_samples=20_000, dwell=Span(samples=2000))
INTERVAL = 10


@pytest.fixture
def service(tmp_path: Path) -> Any:
    service = Service(f"sqlite:///{tmp_path / 'gns.db'}")
    yield service
    service.close()


def client_for(wire: Wire, tmp_path: Path, state: PolicyState, *, incarnation: str, resume_step: int) -> HttpController:
    specification = RunSpecification(batch=RULES, data_parallel_size=2, budget_samples=1_000_000, policy=POLICY)
    client = HttpController(
        url="http://127.0.0.1:8000",
        run_id="run",
        registration=Registration(specification=specification, incarnation=incarnation, resume_step=resume_step),
        state=state,
        spool_directory=tmp_path / "spool",
        transport=wire,
    )
    client.wait_registered(deadline_seconds=10)
    return client


def report_of(plan: BatchPlan, *, step: int, samples: int, ranks: int) -> NoiseScaleMeasurement:
    return measurement(
        step,
        batch=plan.global_batch_size,
        ranks=ranks,
        samples=samples,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        plan_version=plan.version,
    )


@pytest.mark.parametrize("answers", [True, False])
def test_both_sides_remember_the_same_after_the_first_report_on_other_ranks(
    service: Any, tmp_path: Path, answers: bool
) -> None:
    """With the dwell and the ramp, which go by when and from where the batch last changed."""
    wire = Wire(service.transport)
    state = initial_state(RULES, data_parallel_size=2)
    client = client_for(wire, tmp_path, state, incarnation="two-ranks", resume_step=0)
    step = samples = 0
    plan = client.state.plan
    while plan.global_batch_size < 40 and step < 1000:
        step, samples = step + INTERVAL, samples + INTERVAL * plan.global_batch_size
        client.report(report_of(plan, step=step, samples=samples, ranks=2))
        plan = client.verdict(optimizer_step=step, deadline_seconds=10).plan
    assert plan.global_batch_size % (2 * 8) == 0
    assert plan.global_batch_size % (3 * 8) != 0
    saved = {"policy_state": client.state.model_dump(mode="json")}
    client.close(deadline_seconds=10)

    resumed_at, changed_at = step, client.state.changed_at_samples
    state = first_state(saved, RULES, data_parallel_size=3)
    client = client_for(wire, tmp_path, state, incarnation="three-ranks", resume_step=step)
    plan = reachable_plan(state.plan, RULES, state, data_parallel_size=3)
    assert plan.global_batch_size % (3 * 8) == 0
    local: list[PolicyState] = []
    sizes = []
    for _ in range(12):
        step, samples = step + INTERVAL, samples + INTERVAL * plan.global_batch_size
        wire.instead = None if answers else refuse
        client.report(report_of(plan, step=step, samples=samples, ranks=3))
        local.append(client.state)
        plan = client.verdict(optimizer_step=step, deadline_seconds=10 if answers else 0).plan
        sizes.append(plan.global_batch_size)
    wire.instead = None
    client.close(deadline_seconds=10)
    assert all(size % (3 * 8) == 0 for size in sizes), "every plan can be made on three ranks"
    assert local[0].changed_at_samples > changed_at, "the cut is a change"
    assert len(set(sizes)) > 1, "the ramp goes on"
    steps = range(resumed_at + INTERVAL, step + 1, INTERVAL)
    stored = [
        service.store.submit(lambda transaction, at=at: transaction.state_at("run", optimizer_step=at)).result(10)
        for at in steps
    ]
    assert stored == local

"""What holds for every policy behind every set of guards, whatever is measured."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gns_controller.core.contract import Decision, NoiseScaleMeasurement, Reason
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import POLICIES, AnyPolicyConfig, PolicyState, decide, initial_state
from gns_controller.core.replay import replay
from gns_controller.core.runs import Registration, RunSpecification
from gns_controller.store import MeasurementBody
from tests.gns_controller.core.strategies import ROOMS, Report, Trainer, runs, sequences
from tests.gns_controller.running_service import Service

POLICY: TypeAdapter[AnyPolicyConfig] = TypeAdapter(AnyPolicyConfig)
NOT_A_NUMBER = re.compile(r"\b(nan|inf)\b", re.IGNORECASE)
NUMBERS = itertools.count()
KEEPS = {reason for reason in get_args(Reason) if reason.startswith("hold")} | {"warmup"}


class Step(tuple[PolicyState, NoiseScaleMeasurement, PolicyState, Decision]):
    """State before, measurement, state after, decision."""


def folded(run: RunSpecification, sequence: list[Report], *, follow_trainer: bool) -> Iterator[Step]:
    """One step after another, of a trainer that hears of each decision at once."""
    trainer, state = Trainer(run), initial_state(run.batch, data_parallel_size=run.data_parallel_size)
    for report in sequence:
        found = trainer.next_report(report, state.plan)
        before = state
        state, decision = decide(run.policy, state, found, facts=run.facts, follow_trainer=follow_trainer)
        yield Step((before, found, state, decision))


def check_change(run: RunSpecification, before: PolicyState, found: NoiseScaleMeasurement, decision: Decision) -> None:
    policy, rules = run.policy, run.batch
    old, new = decision.previous_batch_size, decision.plan.global_batch_size
    shape = rules.grid(data_parallel_size=found.data_parallel_size).factor(new)
    assert shape.micro_batch_size == decision.plan.micro_batch_size
    assert shape.gradient_accumulation_steps == decision.plan.gradient_accumulation_steps
    assert decision.reason not in KEEPS
    assert (policy.minimum_batch_size or 0) <= new <= (policy.maximum_batch_size or math.inf)
    assert abs(new - old) >= policy.deadband * old
    assert not policy.integer_factors or new % old == 0 or old % new == 0
    assert policy.warmup is None or policy.warmup.passed(steps=found.optimizer_step, samples=found.samples_seen)
    adopted = old != before.plan.global_batch_size  # the trainer's batch was believed: changed just now
    changed_at = found.samples_seen if adopted else before.changed_at_samples
    if policy.dwell is not None:
        steps = 0 if adopted else found.optimizer_step - before.changed_at_step
        assert policy.dwell.passed(steps=steps, samples=found.samples_seen - changed_at)
    earliest = found.optimizer_step + rules.decision_delay_steps
    assert decision.plan.effective_step == next(
        s for s in itertools.count(earliest) if s % rules.plan_interval_steps == 0
    )
    assert decision.plan.version > before.plan.version
    if new < old:
        assert not policy.monotone
        assert decision.reason != "grow"
        return
    assert decision.reason != "shrink"
    assert policy.growth_cap is None or new <= policy.growth_cap * old
    if policy.samples_per_doubling is not None:
        doublings = (found.samples_seen - changed_at) / policy.samples_per_doubling
        assert new <= old * 2 ** min(doublings, 1000) * (1 + 1e-12)  # 2^1000: a number, and above every batch
    if policy.min_steps_left is not None:
        seen_there = found.samples_seen + (decision.plan.effective_step - found.optimizer_step) * old
        assert (run.budget_samples - seen_there) // new >= policy.min_steps_left
    peak = max(before.peak_schedule_factor, found.schedule_factor if math.isfinite(found.schedule_factor) else 0.0)
    if policy.decay == "freeze" and peak > 0:
        assert found.schedule_factor / peak >= policy.decay_below


def check_maximum(run: RunSpecification, found: NoiseScaleMeasurement, decision: Decision) -> None:
    """Where nothing may stand in between, and the ranks can make such a batch."""
    policy, rules = run.policy, run.batch
    most = policy.maximum_batch_size
    waits = policy.monotone or policy.warmup or policy.dwell or policy.deadband or policy.integer_factors
    if most is None or waits or policy.minimum_batch_size is not None:
        return
    below = rules.grid(data_parallel_size=found.data_parallel_size).floor(most)
    assert decision.plan.global_batch_size <= most or below > most


def check_plan(run: RunSpecification, decision: Decision) -> None:
    plan, ratio = decision.plan, decision.plan.global_batch_size / run.batch.global_batch_size
    for factor in (plan.learning_rate_factor, *plan.optimizer_factors.values()):
        assert min(ratio, 1.0) <= factor <= max(ratio, 1.0)
    assert plan.beta_exponent == (ratio if run.batch.beta_coupling == "half_life" else 1.0)


def check_words(decision: Decision) -> None:
    assert not NOT_A_NUMBER.search(decision.explanation), decision.explanation
    document = decision.model_dump_json()
    assert "NaN" not in document
    assert "Infinity" not in document
    assert Decision.model_validate_json(document) == decision
    if decision.noise_scale_high is not None:
        assert decision.noise_scale is not None
        assert decision.noise_scale_low is not None
        assert decision.noise_scale_low <= decision.noise_scale <= decision.noise_scale_high


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs(), sequence=sequences, follow_trainer=st.booleans())
def test_every_change_respects_every_guard_and_says_so_in_finite_words(
    run: RunSpecification, sequence: list[Report], follow_trainer: bool
) -> None:
    for before, found, after, decision in folded(run, sequence, follow_trainer=follow_trainer):
        if decision.plan.global_batch_size != decision.previous_batch_size:
            check_change(run, before, found, decision)
        assert decision.plan == after.plan
        check_maximum(run, found, decision)
        check_plan(run, decision)
        check_words(decision)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs(), sequence=sequences, follow_trainer=st.booleans(), cut=st.integers(0, 16))
def test_the_fold_is_repeatable_from_any_written_state_and_replay_is_the_fold(
    run: RunSpecification, sequence: list[Report], follow_trainer: bool, cut: int
) -> None:
    policy = POLICY.validate_json(POLICY.dump_json(run.policy))
    assert policy == run.policy
    stored = RunSpecification.model_validate_json(run.model_dump_json())
    assert stored == run
    measurements, decisions = [], []
    for before, found, after, decision in folded(run, sequence, follow_trainer=follow_trainer):
        again = decide(
            policy,
            PolicyState.model_validate_json(before.model_dump_json()),
            NoiseScaleMeasurement.model_validate_json(found.model_dump_json()),
            facts=stored.facts,
            follow_trainer=follow_trainer,
        )
        # Compared as written: NaN in a measurement equals nothing, not even itself.
        assert again[0].model_dump_json() == after.model_dump_json()
        assert again[1] == decision
        measurements.append(found)
        decisions.append(decision)
    if measurements[0].data_parallel_size != run.data_parallel_size:
        return  # replay of measurements alone starts on the first one's ranks
    assert replay(run, measurements, follow_trainer=follow_trainer) == decisions
    assert replay(run, measurements[:cut], follow_trainer=follow_trainer) == decisions[:cut]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs(), sequence=sequences)
def test_policies_that_measure_nothing_do_not_care_what_is_measured(
    run: RunSpecification, sequence: list[Report]
) -> None:
    if run.policy.policy not in ("hold", "stages", "linear_ramp", "grow_once", "critical_batch_table"):
        return
    rules = run.batch.model_copy(update={"learning_rate_coupling": "sqrt", "optimizer_couplings": {}})
    run = run.model_copy(update={"batch": rules})
    silent = [report._replace(readings=()) for report in sequence]
    with_readings = [step[3] for step in folded(run, sequence, follow_trainer=True)]
    without = [step[3] for step in folded(run, silent, follow_trainer=True)]
    assert [(d.plan, d.reason) for d in with_readings] == [(d.plan, d.reason) for d in without]


def test_every_policy_takes_part() -> None:
    assert set(ROOMS) == set(POLICIES)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("delivery")
    with closing(Service(f"sqlite:///{folder / 'gns.db'}")) as made:
        yield made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs(), sequence=sequences, seed=st.integers(0, 2**32))
def test_decisions_do_not_depend_on_how_reports_arrive(
    service: Service, run: RunSpecification, sequence: list[Report], seed: int
) -> None:
    """Batches of old and new reports in any order: what is refused is sent again, in order, as the spool does."""
    rng = random.Random(seed)
    run_id = f"run-{next(NUMBERS)}"
    steps = list(folded(run, sequence, follow_trainer=True))
    reports = [step[1].model_copy(update={"run_id": run_id}) for step in steps]
    controller = service.controller
    controller.register(run_id, Registration(specification=run, incarnation="incarnation-0")).result(30)
    stored = 0
    while stored < len(reports):
        until = rng.randint(stored + 1, len(reports))
        batch = reports[rng.randint(0, stored) : until]
        batch += [rng.choice(batch) for _ in range(rng.randint(0, 3))]
        rng.shuffle(batch)
        try:
            reply = controller.ingest(run_id, batch).result(30)
        except InvalidInputError:  # not ascending: none of it was taken
            reply = controller.ingest(run_id, reports[stored:until]).result(30)
        stored += reply.accepted
    entries = [e for e in controller.entries(run_id, limit=1000) if e.kind == "measurement"]
    bodies = [MeasurementBody.model_validate_json(entry.body) for entry in entries]
    assert [body.measurement.optimizer_step for body in bodies] == [report.optimizer_step for report in reports]
    head = controller.view(run_id)
    assert head.num_measurements == len(reports)
    assert head.last_decision == steps[-1][3]
    assert head.plan == steps[-1][2].plan
    assert [body.decision for body in bodies] == [step[3] for step in steps]

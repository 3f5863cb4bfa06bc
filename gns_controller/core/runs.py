"""A run as it is specified, who decides about it, and the views of it in the REST API."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import (
    BatchPlan,
    Count,
    Decision,
    FiniteFloat,
    FrozenModel,
    Label,
    NoiseScaleMeasurement,
    Override,
    ParameterGroup,
    PositiveCount,
    RunId,
    Span,
)
from gns_controller.core.policies import (
    AnyPolicyConfig,
    HoldPolicyConfig,
    RunFacts,
    check_gains,
    check_policy,
    initial_plan,
)
from gns_controller.core.projection import Projection, Savings

RunState = Literal["registered", "running", "silent", "finished"]
"""registered: nothing reported yet. silent: no report for longer than expected. finished: the budget is used up."""


ControlAction = Literal["policy", "override", "release"]
"""The command of an operator: another policy, an override, or its release."""


class Control(FrozenModel):
    """The policy in charge of a run, and the override that an operator may have put above it.

    Immutable, so that a thread that reads one while another thread replaces it sees all of it or none of it.
    """

    policy: AnyPolicyConfig
    policy_revision: Count
    """Grows by one with every operator command."""
    override: Override | None
    """Above the policy until it is released."""

    @classmethod
    def initial(cls, policy: AnyPolicyConfig) -> Control:
        """Return the control of a run that no operator has changed."""
        return Control(policy=policy, policy_revision=0, override=None)


class RunSpecification(FrozenModel):
    """What a run is: fixed for all attempts, but for ranks and schedule. The same name with another is a conflict."""

    batch: BatchRules
    data_parallel_size: PositiveCount
    """Ranks that see different samples, at the first registration. Measurements carry the present one."""
    budget_samples: PositiveCount
    """Samples after which the run ends."""
    tokens_per_sample: PositiveCount | None = None
    """For axes and tables in tokens."""
    optimizer: Label = "unknown"
    parameter_groups: Annotated[tuple[ParameterGroup, ...], Field(max_length=256)] = ()
    measurement_interval: Span | None = Span(steps=25)
    """Shortest distance between two measured steps; None: as the budget allows."""
    measurement_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest share of the run's time that measuring may take; None: the interval alone decides."""
    policy: AnyPolicyConfig = HoldPolicyConfig()
    mode: Literal["active", "shadow"] = "active"
    """shadow: decide and record, change nothing."""
    description: Annotated[str, Field(max_length=2000)] = ""
    schedule: Annotated[tuple[FiniteFloat, ...], Field(max_length=1024)] = ()
    """For projections: learning-rate factors at evenly spaced points of the budget, its two ends included. May differ
    between attempts; the newest one's stands."""

    @model_validator(mode="after")
    def _reachable_and_measurable(self) -> Self:
        initial_plan(self.batch, data_parallel_size=self.data_parallel_size)
        check_policy(self.policy, self.facts)
        geometries = [group.geometry for group in self.parameter_groups]
        followed = self.policy.geometry
        # The l2 norm can be measured of any group, whatever its own geometry is.
        if followed not in (None, "euclidean") and geometries and followed not in geometries:
            raise ValueError(
                f"the policy follows geometry {followed!r}, and no parameter group has it; groups have "
                f"{', '.join(sorted(set(geometries)))}. Name one of these, or 'euclidean', or set geometry to null."
            )
        check_gains(self.policy, self.facts, geometries)
        return self

    @property
    def facts(self) -> RunFacts:
        """The facts that policies may use."""
        return RunFacts(rules=self.batch, budget_samples=self.budget_samples, tokens_per_sample=self.tokens_per_sample)


class Registration(FrozenModel):
    """Body of PUT /runs/{run_id}: one incarnation of a run announces itself. Sending it again changes nothing."""

    specification: RunSpecification
    incarnation: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
    """Random name of this process tree: the same incarnation keeps its attempt, a new one begins the next."""
    resume_step: Count = 0
    """Completed optimizer steps in the checkpoint this incarnation started from. Decisions go on from the last
    measurement up to that step."""


class RegistrationReply(Control):
    """The controller's answer to a registration."""

    run_id: RunId
    attempt: Count
    plan: BatchPlan
    override: Override | None = None
    """Above the policy until it is released."""


class IngestReply(FrozenModel):
    """The controller's answer to measurements, after they are on disk."""

    accepted: Count
    duplicates: Count
    plan: BatchPlan
    """The plan that the run should follow."""
    decision: Decision | None
    """The decision about the last measurement of this attempt."""
    policy_revision: Count
    """Grows by one with every operator command."""
    policy: AnyPolicyConfig | None = None
    """The policy in force, sent once an operator has changed something: the trainer's own fold follows it through an
    outage. None: that of the specification."""
    override: Override | None = None
    """Above the policy until it is released."""


class RunView(Control):
    """One run as the list and the page show it."""

    run_id: RunId
    state: RunState
    specification: RunSpecification
    attempt: Count
    optimizer_step: Count
    samples_seen: Count
    plan: BatchPlan
    last_measurement: NoiseScaleMeasurement | None
    last_decision: Decision | None
    num_measurements: Count
    registered_at: datetime
    last_report_at: datetime | None
    savings: Savings | None
    """The run so far beside one that kept the batch of the start; None before the first measurement."""
    advised_data_parallel_size: PositiveCount
    """The most ranks that the present batch keeps busy with whole micro-batches."""


class PolicyView(Control):
    """The control of a run: GET /runs/{run_id}/policy, and the answer to every operator command.

    `policy_revision` is also the ETag.
    """

    run_id: RunId
    changed_at: datetime | None
    """Time of the last operator command; None: there was none."""
    state: RunState
    """A finished run keeps its control for the next attempt."""


class RecordedMeasurement(FrozenModel):
    """A stored measurement; `sequence` orders the whole log of all runs."""

    sequence: Count
    received_at: datetime
    measurement: NoiseScaleMeasurement


class RecordedDecision(FrozenModel):
    """A stored decision; `sequence` is that of its measurement."""

    sequence: Count
    decided_at: datetime
    decision: Decision


class RecordedAttempt(FrozenModel):
    """An incarnation that registered."""

    action: Literal["registered"] = "registered"
    sequence: Count
    received_at: datetime
    attempt: Count
    resume_step: Count
    """Completed steps in the checkpoint it started from."""
    data_parallel_size: PositiveCount


class RecordedControl(Control):
    """An operator command, and the control that holds from then on."""

    action: ControlAction
    sequence: Count
    received_at: datetime
    note: str = ""


RecordedEvent = Annotated[RecordedAttempt | RecordedControl, Field(discriminator="action")]
"""An event between measurements. With them, in the order of `sequence`, these are all that replay needs."""


class ControlPage(FrozenModel):
    """GET /runs/{run_id}/controls."""

    items: tuple[RecordedEvent, ...]
    next_cursor: str | None


class RunPage(FrozenModel):
    """GET /runs."""

    items: tuple[RunView, ...]
    next_cursor: str | None


class MeasurementPage(FrozenModel):
    """GET /runs/{run_id}/measurements."""

    items: tuple[RecordedMeasurement, ...]
    next_cursor: str | None


class DecisionPage(FrozenModel):
    """GET /runs/{run_id}/decisions."""

    items: tuple[RecordedDecision, ...]
    next_cursor: str | None


class ScheduleView(FrozenModel):
    """GET /runs/{run_id}/schedule: the plans so far, oldest first, and what is known to come."""

    run_id: RunId
    attempt: Count
    plans: tuple[BatchPlan, ...]
    projection: Projection | None
    """What is expected to come; None before the first measurement and after the last."""
    savings: Savings | None
    """None before the first measurement."""
    advised_data_parallel_size: PositiveCount
    """The most ranks that the present batch keeps busy with whole micro-batches."""

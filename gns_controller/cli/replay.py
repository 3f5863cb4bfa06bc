"""Replay of recordings: what they do not hold comes from options, and the report becomes a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter, ValidationError

from gns_controller.cli.api_client import ControllerClient, read_as, run_path
from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Estimator, Geometry, NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import KEEP_UNKNOWN, AnyPolicyConfig
from gns_controller.core.policies.parsing import faults_of
from gns_controller.core.policies.state_update import followed_readings
from gns_controller.core.replay import Event, ReplayReport, Resumed, compare
from gns_controller.core.runs import RecordedEvent, RunSpecification
from gns_controller.recordings import Format, ImportDefaults, Recording, read_recording
from gns_controller.service.log_replay import replay_event

_CONTROL: TypeAdapter[RecordedEvent] = TypeAdapter(RecordedEvent)
_BETAS = ("noise_beta", "signal_beta")


class BatchOptions(NamedTuple):
    """Options for a recording without a specification; None: as its first measurement has it."""

    batch_size: int | None = None
    micro_batch_size: int | None = None
    data_parallel_size: int | None = None
    budget_samples: int | None = None
    tokens_per_sample: int | None = None
    geometry: Geometry | None = None
    """This and the next two: of imported readings, see `ImportDefaults`."""
    estimator: Estimator | None = None
    num_groups: int | None = None


class Replayed(NamedTuple):
    """The report of a replay, and the assumptions behind it, one sentence each."""

    report: ReplayReport
    notes: list[str]
    num_commands: int = 0
    """Operator commands before the last measurement; 0 where another policy was replayed."""


def is_recording(name: str) -> bool:
    """Return whether a name is that of a file or folder, not of a run: it exists, or is written as only a path is."""
    if "/" in name or Path(name).suffix in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".wandb"):
        return True
    try:
        return Path(name).exists()
    except OSError:  # longer than a file's name can be
        return False


def replay_file(
    name: str,
    *,
    format: str | None,
    columns: Mapping[str, str] | None,
    policy: AnyPolicyConfig | None,
    options: BatchOptions,
    follow_trainer: bool | None,
) -> Replayed:
    """Read a recording and replay it; see `read_recording` and `replay_recording`."""
    defaults = ImportDefaults(
        data_parallel_size=options.data_parallel_size or 1,
        micro_batch_size=options.micro_batch_size,
        tokens_per_sample=options.tokens_per_sample,
        global_batch_size=options.batch_size,
        geometry=options.geometry,
        estimator=options.estimator,
        num_groups=options.num_groups,
    )
    recording = read_recording(name, format=cast(Format | None, format), columns=columns, defaults=defaults)
    return replay_recording(recording, policy=policy, options=options, follow_trainer=follow_trainer)


def replay_run(
    run_id: str, *, url: str, token: str, policy: AnyPolicyConfig | None, follow_trainer: bool | None
) -> Replayed:
    """Let the controller of a run replay it."""
    body = {"policy": policy and policy.model_dump(mode="json"), "follow_trainer": follow_trainer}
    with ControllerClient(url, token) as client:
        report = read_as(ReplayReport, client.replay(run_id, body))
        last = client.get(run_path(run_id))["last_decision"] if policy is None else None
    return Replayed(report, [], last["policy_revision"] if last else 0)


def replay_recording(
    recording: Recording,
    *,
    policy: AnyPolicyConfig | None,
    options: BatchOptions,
    follow_trainer: bool | None = None,
) -> Replayed:
    """Fold a policy over a recording; without one, repeat what ran.

    Args:
        recording: what to fold over.
        policy: the policy to replay. Where its document leaves out which readings to follow, they are taken from a
            recording without a specification.
        options: for a recording without a specification, and only for those.
        follow_trainer: see `core.replay.replay`; None: as the service did it for what ran, not at all otherwise.

    Raises:
        InvalidInputError: no policy is given or recorded, it cannot steer this run or use its readings, or options
            repeat what the recording holds.
    """
    is_what_ran = policy is None
    notes = list(recording.notes)
    specification = recording.specification
    if specification is None:
        if policy is None:
            raise InvalidInputError(
                "this recording does not say what ran: give --policy, a file or JSON like "
                '\'{"policy": "noise_scale"}\'.'
            )
        policy, adapted = _adapted(recording, policy)
        notes += adapted
        specification = _specification(recording, policy, options)
    elif any(value is not None for value in options):
        raise InvalidInputError(
            "this recording has a specification of its own: leave out the options that describe its batches."
        )
    elif policy is not None:
        _ = _valid({**dict(specification), "policy": policy})
    if follow_trainer is None:
        follow_trainer = policy is None and specification.mode == "active"
    complete = len(recording.decisions) == len(recording.measurements)
    if recording.decisions and not complete:
        notes.append("some measurements have no decision, so decisions are not compared.")
    try:
        report = compare(
            specification,
            list(events_of(recording)),
            recorded=recording.decisions if complete else (),
            follow_trainer=follow_trainer,
            policy=policy,
        )
    except (ValidationError, ArithmeticError):
        raise InvalidInputError(
            "this policy leads to a plan that cannot be written down: the recording's counts are too large for it, or "
            "its numbers are extreme."
        ) from None
    return Replayed(report, notes, _num_commands(recording) if is_what_ran else 0)


def events_of(recording: Recording) -> Iterator[Event]:
    """Yield measurements, and what happened between them.

    Where that was not recorded, each attempt goes on from the last step before its first.

    Raises:
        InvalidInputError: an event between the measurements is not one of this version.
    """
    controls = [_control(control) for control in recording.controls]
    says_attempts = any(isinstance(event, Resumed) for event in controls)
    waiting = list(zip(recording.control_positions, controls, strict=True))[::-1]
    attempt = recording.measurements[0].attempt if recording.measurements else 0
    for position, measurement in enumerate(recording.measurements):
        while waiting and waiting[-1][0] <= position:
            yield waiting.pop()[1]
        if measurement.attempt != attempt and not says_attempts:
            yield Resumed(max(measurement.optimizer_step - 1, 0))
        attempt = measurement.attempt
        yield measurement


def unread(report: ReplayReport) -> str | None:
    """Return the sentence that replaces all sums where no measurement holds anything that the policy reads."""
    if not report.rows or any(row.replayed_reason != "hold_no_reading" for row in report.rows):
        return None
    return (
        f"none of {len(report.rows)} measurements holds a {report.policy.estimator} reading that the policy follows: "
        "this says nothing about the policy."
    )


def table_of(report: ReplayReport, *, compared: bool = True, num_commands: int = 0) -> Iterator[str]:
    """Yield the report as lines of text: where a batch changes, then the sums.

    Args:
        report: of the replay.
        compared: count the decisions that are as recorded; another policy is not expected to make any.
        num_commands: operator commands in what ran.
    """
    yield f"{'samples':>14} {'happened':>9} {'replayed':>9}  reason"
    before: tuple[int, int] | None = None
    for row in report.rows:
        batches = row.happened_batch_size, row.replayed_batch_size
        if batches != before:
            yield f"{row.samples_seen:>14} {batches[0]:>9} {batches[1]:>9}  {row.replayed_reason}"
        before = batches
    yield ""
    share = f" ({report.steps_saved / report.happened_steps:.1%})" if report.happened_steps else ""
    commands = f", as it ran, {num_commands} operator command{'s' * (num_commands > 1)}" if num_commands else ""
    yield f"{report.samples} samples, policy {report.policy.policy}{commands}"
    nothing = unread(report)
    saved = f", saved {report.steps_saved}{share}" if nothing is None else ""
    yield f"optimizer steps  happened {report.happened_steps}, replayed {report.replayed_steps}{saved}"
    if nothing is not None:
        yield nothing
    if report.num_compared and compared:
        yield f"decisions        {report.num_equal} of {report.num_compared} as recorded, bit for bit"
    elif not report.num_compared:
        yield "decisions        none were recorded to compare with"


def _control(control: dict[str, Any]) -> Event:
    try:
        recorded = _CONTROL.validate_python({k: v for k, v in control.items() if k != "kind"}, context=KEEP_UNKNOWN)
        return replay_event(recorded)
    except ValidationError:
        raise InvalidInputError(
            "the recording holds a control that this version does not know; was it exported by another version?"
        ) from None


def _num_commands(recording: Recording) -> int:
    """Count the operator commands that some measurement was decided under."""
    placed = zip(recording.controls, recording.control_positions, strict=True)
    return sum(
        control.get("action") != "registered" and position < len(recording.measurements) for control, position in placed
    )


def _adapted(recording: Recording, policy: AnyPolicyConfig) -> tuple[AnyPolicyConfig, list[str]]:
    """Return the policy, following the readings of the recording where its document leaves them open.

    Raises:
        InvalidInputError: the policy can use none of them.
    """
    changes: dict[str, Any] = {}
    notes = []
    given = policy.model_fields_set
    readings = [reading for measurement in recording.measurements for reading in measurement.readings]
    estimators = {reading.estimator for reading in readings}
    geometries = {reading.geometry for reading in readings}
    if "estimator" not in given and len(estimators) == 1 and policy.estimator not in estimators:
        changes["estimator"] = estimators.pop()
        notes.append(f"the policy follows estimator {changes['estimator']!r}, the only one in the recording.")
    if "geometry" not in given and len(geometries) == 1 and policy.geometry not in (None, *geometries):
        changes["geometry"] = None
        notes.append(
            f"the policy follows geometry {geometries.pop()}, the only one in the recording, and not its own "
            f"{policy.geometry}."
        )
    if recording.is_averaged and not given.intersection(_BETAS):
        changes |= dict.fromkeys(_BETAS, 0.0)
        notes.append("the recording holds averages, so the policy averages no more: noise_beta = signal_beta = 0.")
    try:
        adapted = type(policy).model_validate({**dict(policy), **changes})
    except ValidationError as error:
        fault = faults_of(error)[0]
        where = ".".join(map(str, fault.location))
        raise _unusable(f"{policy.policy} cannot follow {where} {changes.get(where)!r}: {fault.sentence}") from None
    if readings and not adapted.open_loop:
        _refuse_unreadable(recording, adapted)
    if recording.is_averaged and adapted.interval_use == "decision":
        notes.append("averages spread less than readings: the lower end of their interval is too high.")
    if adapted.follows_schedule and len({measurement.schedule_factor for measurement in recording.measurements}) == 1:
        notes.append("no schedule_factor column, or a constant one: decay is not seen.")
    return adapted, notes


def _refuse_unreadable(recording: Recording, policy: AnyPolicyConfig) -> None:
    followed = [reading for measurement in recording.measurements for reading in followed_readings(policy, measurement)]
    if not followed:
        present = {
            f"{reading.estimator} of the {reading.direction}, {reading.geometry}"
            for measurement in recording.measurements
            for reading in measurement.readings
        }
        needed = f"{policy.estimator} of the {policy.direction}, {policy.geometry or 'any geometry'}"
        raise _unusable(f"it needs {needed}; there is {'; '.join(sorted(present))}")
    if policy.needs.progress_curve and all(len(reading.progress_curve) < 2 for reading in followed):
        raise _unusable("it needs progress at two sub-batches, which only our own export holds")
    if policy.needs.inner_products and all(reading.inner_product_variance is None for reading in followed):
        raise _unusable("it needs the variance of inner products, which only our own export holds")
    if recording.is_averaged and policy.signal_beta == 0 and policy.interval_use != "nothing":
        raise _unusable(
            "averages that are not averaged again have no interval, and without one nothing is resolved. Give "
            "noise_beta and signal_beta, or a policy with bound 'estimate' on rank_variance readings"
        )


def _unusable(why: str) -> InvalidInputError:
    return InvalidInputError(f"this recording has no readings this policy can use: {why}.")


def _specification(recording: Recording, policy: AnyPolicyConfig, options: BatchOptions) -> RunSpecification:
    if not recording.measurements:
        raise InvalidInputError("the recording holds no measurement.")
    first: NoiseScaleMeasurement = recording.measurements[0]
    last = max(measurement.samples_seen for measurement in recording.measurements)
    try:
        rules = BatchRules(
            global_batch_size=options.batch_size or first.global_batch_size,
            micro_batch_size=options.micro_batch_size or first.micro_batch_size,
        )
    except ValidationError as error:
        raise InvalidInputError(error.errors(include_input=False)[0]["msg"]) from None
    return _valid(
        {
            "batch": rules,
            "data_parallel_size": options.data_parallel_size or first.data_parallel_size,
            "budget_samples": options.budget_samples or max(last, 1),
            "tokens_per_sample": options.tokens_per_sample,
            "policy": policy,
        }
    )


def _valid(fields: dict[str, Any]) -> RunSpecification:
    try:
        return RunSpecification.model_validate(fields)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise InvalidInputError(str(fault.get("ctx", {}).get("error", fault["msg"]))) from None

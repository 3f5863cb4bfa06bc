"""Replay of recordings: what they do not say comes from options, and the report becomes a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter, ValidationError

from gns_controller.controls import replay_event
from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.replay import Event, ReplayReport, Resumed, compare
from gns_controller.core.runs import RecordedEvent, RunSpecification
from gns_controller.recordings import Format, ImportDefaults, Recording, read_recording
from gns_controller.remote import Remote, read_as

_CONTROL: TypeAdapter[RecordedEvent] = TypeAdapter(RecordedEvent)
_BETAS = ("noise_beta", "signal_beta")


class BatchOptions(NamedTuple):
    """What a recording without a specification does not say; None: as its first measurement has it."""

    batch_size: int | None = None
    micro_batch_size: int | None = None
    data_parallel_size: int | None = None
    budget_samples: int | None = None
    tokens_per_sample: int | None = None


class Replayed(NamedTuple):
    """What came out, and what was assumed, one sentence each."""

    report: ReplayReport
    notes: list[str]


def is_recording(name: str) -> bool:
    """Whether this names something to read, and not a run: it exists, or is written as only a path is."""
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
    )
    recording = read_recording(name, format=cast(Format | None, format), columns=columns, defaults=defaults)
    return replay_recording(recording, policy=policy, options=options, follow_trainer=follow_trainer)


def replay_run(
    run_id: str, *, url: str, token: str, policy: AnyPolicyConfig | None, follow_trainer: bool | None
) -> Replayed:
    """Let the controller of a run replay it."""
    body = {"policy": policy and policy.model_dump(mode="json"), "follow_trainer": follow_trainer}
    with Remote(url, token) as remote:
        return Replayed(read_as(ReplayReport, remote.replay(run_id, body)), [])


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
        policy: what to ask.
        options: for a recording without a specification, and only for those.
        follow_trainer: see `core.replay.replay`; None: as the service did it for what ran, not at all otherwise.

    Raises:
        InvalidInputError: there is no policy to ask, it cannot steer this run, or options say what the recording says.
    """
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
    return Replayed(report, notes)


def events_of(recording: Recording) -> Iterator[Event]:
    """Measurements, and what happened between them.

    Where that was not recorded, each attempt goes on from the last step before its first.

    Raises:
        InvalidInputError: something between the measurements is nothing that we know.
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


def table_of(report: ReplayReport, *, compared: bool = True) -> Iterator[str]:
    """The report for people: where a batch changes, then the sums.

    Args:
        report: what came out.
        compared: say how many decisions are as recorded; of another policy nobody expects it.
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
    yield f"{report.samples} samples, policy {report.policy.policy}"
    yield (
        f"optimizer steps  happened {report.happened_steps}, replayed {report.replayed_steps}, "
        f"saved {report.steps_saved}{share}"
    )
    if report.num_compared and compared:
        yield f"decisions        {report.num_equal} of {report.num_compared} as recorded, bit for bit"
    elif not report.num_compared:
        yield "decisions        none were recorded to compare with"


def _control(control: dict[str, Any]) -> Event:
    try:
        return replay_event(_CONTROL.validate_python({k: v for k, v in control.items() if k != "kind"}))
    except ValidationError:
        raise InvalidInputError(
            "the recording holds a control that this version does not know; was it exported by another version?"
        ) from None


def _adapted(recording: Recording, policy: AnyPolicyConfig) -> tuple[AnyPolicyConfig, list[str]]:
    """The policy, reading what the recording has, where it was not told what to read."""
    changes: dict[str, Any] = {}
    notes = []
    told = policy.model_fields_set
    found = {reading.estimator for measurement in recording.measurements for reading in measurement.readings}
    if "estimator" not in told and len(found) == 1 and policy.estimator not in found:
        changes["estimator"] = found.pop()
        notes.append(f"the policy follows estimator {changes['estimator']!r}, the only one in the recording.")
    if recording.is_averaged and not told.intersection(_BETAS):
        changes |= dict.fromkeys(_BETAS, 0.0)
        notes.append("the recording holds averages, so the policy averages no more: noise_beta = signal_beta = 0.")
    return policy.model_copy(update=changes), notes


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

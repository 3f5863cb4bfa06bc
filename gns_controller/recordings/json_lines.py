"""JSON lines: our own export, read and written, and histories that other tools exported.

Ours begins with {"kind": "run", ...}; then come {"kind": "measurement", ...} and {"kind": "control", ...} in the
order of the log. Any other file of JSON objects is a table with their keys as columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from gns_controller.core.contract import Count, Decision, FrozenModel, NoiseScaleMeasurement, RunId
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import KEEP_UNKNOWN, AnyPolicyConfig
from gns_controller.core.runs import RunSpecification
from gns_controller.recordings.recording import ImportDefaults, Limits, Recording, lines_of, shown
from gns_controller.recordings.tables import Row, Table, table_recording


class ExportedRun(FrozenModel):
    """First line of an export."""

    kind: Literal["run"] = "run"
    run_id: RunId
    specification: RunSpecification
    policy: AnyPolicyConfig
    """In force when the export was made."""
    policy_revision: Count = 0


class ExportedMeasurement(FrozenModel):
    """One measurement of the log, and what was decided on it."""

    kind: Literal["measurement"] = "measurement"
    sequence: Count
    received_at: datetime
    measurement: NoiseScaleMeasurement
    decision: Decision | None = None


Entry = ExportedMeasurement | dict[str, Any]
"""A measurement, or a control: a JSON object with kind "control", kept as it is."""

_Model = TypeVar("_Model", bound=FrozenModel)


def export_lines(run: ExportedRun, entries: Iterable[ExportedMeasurement | Mapping[str, Any]]) -> Iterator[str]:
    """The lines of an export, each with its line feed. `read_export` gives back what went in.

    Raises:
        InvalidInputError: a control is not a JSON object with kind "control".
    """
    yield run.model_dump_json() + "\n"
    for entry in entries:
        if isinstance(entry, ExportedMeasurement):
            yield entry.model_dump_json() + "\n"
            continue
        if entry.get("kind") != "control":
            raise InvalidInputError(f"an exported entry has kind {shown(entry.get('kind'))}, expected 'control'.")
        try:
            yield json.dumps(dict(entry), allow_nan=False, separators=(",", ":")) + "\n"
        except (TypeError, ValueError, RecursionError):
            raise InvalidInputError("a control holds something that JSON cannot say; use its string forms.") from None


def read_export(
    lines: Iterable[tuple[int, str]], *, source: str = "export", limits: Limits | None = None
) -> tuple[ExportedRun, list[Entry]]:
    """What `export_lines` wrote.

    Raises:
        InvalidInputError: a line is not of an export; the message names line and field.
    """
    limits = limits or Limits()
    run: ExportedRun | None = None
    entries: list[Entry] = []
    last: dict[int, int] = {}
    for number, line in lines:
        where = f"{source}, line {number}"
        value = _object(line, where)
        if value is None:
            continue
        kind = value.get("kind")
        if run is None:
            if kind != "run":
                raise InvalidInputError(f"{where}: kind {shown(kind)} where an export begins with kind 'run'.")
            run = _model(ExportedRun, value, where)
            continue
        limits.check_rows(len(entries) + 1, source=source)
        if kind == "control":
            entries.append(value)
        elif kind == "measurement":
            entry = _model(ExportedMeasurement, value, where)
            _check(entry, run, last, where)
            entries.append(entry)
        else:
            raise InvalidInputError(f"{where}: kind {shown(kind)}, expected 'measurement' or 'control'.")
    if run is None:
        raise InvalidInputError(f"{source} is empty: an export begins with kind 'run'.")
    return run, entries


def export_recording(run: ExportedRun, entries: Iterable[Entry], *, source: str = "export") -> Recording:
    """An export as a recording."""
    measurements: list[NoiseScaleMeasurement] = []
    decisions: list[Decision] = []
    controls: list[dict[str, Any]] = []
    positions: list[int] = []
    for entry in entries:
        if isinstance(entry, ExportedMeasurement):
            measurements.append(entry.measurement)
            if entry.decision is not None:
                decisions.append(entry.decision)
        else:
            controls.append(entry)
            positions.append(len(measurements))
    return Recording(
        source=source,
        run_id=run.run_id,
        measurements=tuple(measurements),
        specification=run.specification,
        policy=run.policy,
        policy_revision=run.policy_revision,
        decisions=tuple(decisions),
        controls=tuple(controls),
        control_positions=tuple(positions),
    )


def read_json_lines(
    path: Path, *, columns: Mapping[str, str] | None, defaults: ImportDefaults, limits: Limits
) -> Recording:
    """A file of JSON lines as a recording: our export, or a history of somebody's.

    Raises:
        InvalidInputError: a line cannot be read; the message names it.
    """
    source = shown(path.name)
    first = next((v for n, line in lines_of(path, limits=limits) if (v := _object(line, f"{source}, line {n}"))), None)
    if first is None:
        raise InvalidInputError(f"{source} is empty: expected one JSON object a line.")
    if first.get("kind") == "start" and "attached" in first and not columns:
        raise InvalidInputError(f"{source}: this is the example job's own output; use gns-controller run export.")
    if "kind" in first and not columns:
        run, entries = read_export(lines_of(path, limits=limits), source=source, limits=limits)
        return export_recording(run, entries, source=source)

    def rows() -> Iterator[Row]:
        for number, line in lines_of(path, limits=limits):
            value = _object(line, f"{source}, line {number}")
            if value is not None:
                yield Row(number, value)

    # Twice through the file: a key may appear for the first time on the last line.
    names: dict[str, None] = {}
    for row in rows():
        names.update(dict.fromkeys(row.cells))
        limits.check_columns(len(names), source=source)
        limits.check_rows(row.number, source=source)
    table = Table(rows(), names=names, source=source, name=path.stem, unit="line")
    return table_recording(table, columns=columns, defaults=defaults, limits=limits)


def _object(line: str, where: str) -> dict[str, Any] | None:
    """The JSON object of a line; None for an empty line."""
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidInputError(
            f"{where}: {shown(line.strip())} is not JSON; one object a line, nothing else."
        ) from None
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where}: {shown(line.strip())} is not a JSON object.")
    return value


def _model(model: type[_Model], value: dict[str, Any], where: str) -> _Model:
    try:
        return model.model_validate(value, context=KEEP_UNKNOWN)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = "/".join(str(part) for part in fault["loc"])
        raise InvalidInputError(
            f"{where}, field {shown(field)}: {shown(fault['msg'])}. Was it exported by another version?"
        ) from None
    except RecursionError:
        raise InvalidInputError(f"{where}: nested too deeply.") from None


def _check(entry: ExportedMeasurement, run: ExportedRun, last: dict[int, int], where: str) -> None:
    """One run, steps ascending within an attempt, each decision beside its own measurement."""
    measurement, decision = entry.measurement, entry.decision
    if measurement.run_id != run.run_id:
        raise InvalidInputError(
            f"{where}: a measurement of {shown(measurement.run_id)} in an export of {shown(run.run_id)}."
        )
    before = last.get(measurement.attempt)
    if before is not None and measurement.optimizer_step <= before:
        raise InvalidInputError(
            f"{where}: optimizer_step {measurement.optimizer_step} after {before} of the same attempt; "
            "an export is in the order of the log."
        )
    last[measurement.attempt] = measurement.optimizer_step
    if decision is not None and (decision.attempt, decision.optimizer_step) != (
        measurement.attempt,
        measurement.optimizer_step,
    ):
        raise InvalidInputError(
            f"{where}: the decision is about attempt {decision.attempt}, optimizer_step {decision.optimizer_step}, "
            f"its measurement about {measurement.attempt}, {measurement.optimizer_step}."
        )

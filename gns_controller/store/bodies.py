"""Bodies of log lines, and how they are read back.

A policy whose package is no longer installed is kept as it was written, so that its runs can still be looked at.
"""

from __future__ import annotations

from gns_controller.core.contract import Decision, FrozenModel, NoiseScaleMeasurement
from gns_controller.core.policies import KEEP_UNKNOWN
from gns_controller.core.runs import Control, ControlAction, Registration
from gns_controller.store.protocol import LogEntry


class MeasurementBody(FrozenModel):
    """Body of a log line of kind "measurement"."""

    measurement: NoiseScaleMeasurement
    decision: Decision


class ControlBody(Control):
    """Body of a log line of kind "control": the control that holds from then on, and the operator command behind it."""

    action: ControlAction
    note: str = ""


def measurement_of(entry: LogEntry) -> MeasurementBody:
    """Read a log line of kind "measurement"."""
    return MeasurementBody.model_validate_json(entry.body)


def registration_of(entry: LogEntry) -> Registration:
    """Read a log line of kind "registered"."""
    return Registration.model_validate_json(entry.body, context=KEEP_UNKNOWN)


def control_of(entry: LogEntry) -> ControlBody:
    """Read a log line of kind "control"."""
    return ControlBody.model_validate_json(entry.body, context=KEEP_UNKNOWN)

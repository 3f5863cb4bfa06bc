"""Every exception this project raises.

GnsError
├── InvalidInputError (ValueError)      what was asked for cannot be done; the message says what can
│   ├── BatchShapeError                 a batch that these ranks cannot make
│   ├── CouplingError                   no sound rule for what a batch change does to this optimizer
│   ├── GeometryError                   a geometry that no parameter group has, or that a tensor cannot have
│   └── TooFewGroupsError               one gradient has no spread
├── SelfTestError                       gradients are not what measuring relies on; parameters are named
├── PlanDivergedError                   two ranks hold different plans: training must stop
├── MissingDependencyError (ImportError)  the message carries the `pip install` line
├── PolicyPlugInError                   a policy of another package is not installed here, cannot be loaded, or failed
├── PortTakenError                      another program listens where the service should
├── JobError                            a training job of a calibration failed; the message names its log
├── DemoError                           a process of the demonstration failed; the message names its log
├── RunError                            a request about a run that cannot be served
│   ├── UnknownRunError
│   │   └── UnknownAttemptError         the database was restored from before its registration
│   ├── RunConflictError                the run exists with another specification
│   ├── StaleAttemptError               a newer incarnation of the run has registered
│   ├── RevisionConflictError           another command has changed the policy or the override
│   ├── NoOverrideError                 there is nothing to release
│   ├── ReplayTooLongError              more measurements than the service replays
│   └── ReplayBusyError                 another replay is running: try again later
└── StoreError
    ├── StoreUnavailableError           disk full, database gone: try again later, nothing was recorded
    ├── StoreBusyError                  too much is queued: try again later, nothing was recorded
    ├── DatabaseCorruptError
    └── DatabaseTooNewError             written by a newer version of this program
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class GnsError(Exception):
    """Root of every exception raised by gns_controller and trainer_hooks."""


class InvalidInputError(GnsError, ValueError):
    """What was asked for cannot be done."""


class BatchShapeError(InvalidInputError):
    """No micro-batch and accumulation make this global batch on these ranks."""


class CouplingError(InvalidInputError):
    """No sound rule for what a batch change does to this optimizer."""


class GeometryError(InvalidInputError):
    """A geometry that no parameter group has, or that a tensor cannot have."""


class TooFewGroupsError(InvalidInputError):
    """Noise needs at least two groups of samples."""


class SelfTestError(GnsError):
    """Known gradients did not come out as their mean over ranks."""


class PlanDivergedError(GnsError):
    """Ranks hold different batch plans."""


class MissingDependencyError(GnsError, ImportError):
    """An optional dependency is not installed."""


class PolicyPlugInError(GnsError):
    """A policy of another package is not installed here, cannot be loaded, or failed."""

    def __init__(self, sentence: str, *, cause: Exception | None = None) -> None:
        explained = "" if cause is None else f" {type(cause).__name__}: {cause}"
        super().__init__(sentence + explained)
        self.sentence = sentence
        """The message without the text of the cause, which may hold a path of this machine."""


class PortTakenError(GnsError):
    """Another program listens on the port already."""


class JobError(GnsError):
    """A training job of a calibration failed; the message names its log."""


class DemoError(GnsError):
    """A process of the demonstration failed; the message names its log."""


class RunError(GnsError):
    """A request about a run that cannot be served."""


class UnknownRunError(RunError):
    """No run has this name."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"run {run_id!r} is not registered; PUT /api/v1/runs/{run_id} first.")
        self.run_id = run_id


class UnknownAttemptError(UnknownRunError):
    """The run is known, this attempt is not: the database was restored from before its registration."""

    def __init__(self, run_id: str, *, attempt: int, current_attempt: int) -> None:
        super().__init__(run_id)
        self.args = (
            f"attempt {attempt} of run {run_id!r} is not registered here, {current_attempt} is the last; "
            f"PUT /api/v1/runs/{run_id} again.",
        )


class RunConflictError(RunError):
    """The run exists with another specification; both are kept for the caller to see."""

    def __init__(self, run_id: str, *, registered: dict[str, object], requested: dict[str, object]) -> None:
        shown = "; ".join(_differences(registered, requested))
        super().__init__(
            f"run {run_id!r} exists with another specification ({shown}). "
            "Choose another name or send the registered specification."
        )
        self.run_id = run_id
        self.registered = registered
        self.requested = requested


def _differences(registered: dict[str, Any], requested: dict[str, Any], within: str = "") -> Iterator[str]:
    """Field by field, but for those that may differ. Of two policies only the names, of lists only that they differ."""
    names = {*registered, *requested} - {"data_parallel_size", "schedule"}
    if within and registered.get("policy") != requested.get("policy"):
        names = {"policy"}
    for name in sorted(names):
        ours, theirs = registered.get(name), requested.get(name)
        if ours == theirs:
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(ours, theirs, f"{within}{name}.")
        elif isinstance(ours, list | tuple) or isinstance(theirs, list | tuple):
            yield f"{within}{name}: differs"
        else:
            yield f"{within}{name}: registered {ours}, requested {theirs}"


class StaleAttemptError(RunError):
    """A newer incarnation of this run has registered; the old one may not report any more."""

    def __init__(self, run_id: str, *, attempt: int, current_attempt: int) -> None:
        super().__init__(
            f"attempt {attempt} of run {run_id!r} is over: attempt {current_attempt} has registered since. "
            "Stop this job, or register again to begin a new attempt."
        )
        self.run_id = run_id
        self.attempt = attempt
        self.current_attempt = current_attempt


class RevisionConflictError(RunError):
    """An operator command names another revision of the control than the present one."""

    def __init__(self, run_id: str, *, policy_revision: int) -> None:
        super().__init__(
            f"policy and override of run {run_id!r} are at revision {policy_revision} now, which is not the one that "
            "was asked for. Read them again, and decide again."
        )
        self.run_id = run_id
        self.policy_revision = policy_revision


class NoOverrideError(RunError):
    """There is nothing to release."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"run {run_id!r} has no override: its policy decides already.")
        self.run_id = run_id


class ReplayTooLongError(RunError):
    """More measurements than the service replays."""

    def __init__(self, run_id: str, *, num_measurements: int, limit: int) -> None:
        super().__init__(
            f"run {run_id!r} has {num_measurements} measurements, and this controller replays at most {limit}. Export "
            "it and replay it where you are: `gns-controller run export`, `gns-controller replay`."
        )
        self.run_id = run_id


class ReplayBusyError(RunError):
    """Another replay is running."""

    def __init__(self) -> None:
        super().__init__("another replay is running, and this controller does one at a time.")


class StoreError(GnsError):
    """The store could not do its work."""


class StoreUnavailableError(StoreError):
    """The database cannot be written or read now; nothing of this request was recorded."""


class StoreBusyError(StoreError):
    """The write queue is full; nothing of this request was recorded."""


class DatabaseCorruptError(StoreError):
    """The file is not a database of this program, or it is damaged."""


class DatabaseTooNewError(StoreError):
    """A newer version of this program wrote the database."""

"""TensorBoard's event files: scalars become columns, steps become rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from gns_controller.core.errors import InvalidInputError, MissingDependencyError
from gns_controller.recordings.recording import ImportDefaults, Limits, Recording, names_shown, shown
from gns_controller.recordings.tables import Row, Table, table_recording

STEP_COLUMN = "_step"
"""Steps are no tag of their own; this is what `columns` may call them."""


def event_folder(folder: Path) -> Path | None:
    """The folder with the event files of one run: this one, or the only one below it; None where there are none.

    Raises:
        InvalidInputError: several folders below have event files.
    """
    if any(folder.glob("*tfevents*")):
        return folder
    found = sorted({path.parent for path in folder.rglob("*tfevents*")})
    if len(found) > 1:
        below = [str(path.relative_to(folder)) for path in found]
        raise InvalidInputError(
            f"{shown(folder.name)} holds event files of several runs: name one of {names_shown(below)}."
        )
    return found[0] if found else None


def read_tensorboard(
    path: Path, *, columns: Mapping[str, str] | None, defaults: ImportDefaults, limits: Limits
) -> Recording:
    """An event file, or a folder of one run's event files, as a recording.

    Raises:
        InvalidInputError: no scalars, or a tag is missing.
        MissingDependencyError: tensorboard is not installed.
    """
    source = shown(path.name)
    folder = event_folder(path) if path.is_dir() else path
    if folder is None:
        raise InvalidInputError(f"{source} holds no event files (their names contain 'tfevents').")
    scalars, num_replaced = _scalars(folder, source=source, limits=limits)
    if not scalars:
        raise InvalidInputError(f"{source} holds no scalars: it is no event file, or nothing was logged.")
    by_step: dict[int, dict[str, object]] = {}
    for tag, values in scalars.items():
        for step, value in values.items():
            by_step.setdefault(step, {STEP_COLUMN: step})[tag] = value
    again = f"{num_replaced} scalars were logged again for a step that had them: the later ones stand."
    table = Table(
        (Row(number, by_step[step]) for number, step in enumerate(sorted(by_step), start=1)),
        names=[STEP_COLUMN, *scalars],
        source=source,
        name=folder.name if folder.is_dir() else folder.parent.name,
        notes=[again] if num_replaced else [],
    )
    columns = {"optimizer_step": STEP_COLUMN, **(columns or {})}
    return table_recording(table, columns=columns, defaults=defaults, limits=limits)


def _scalars(path: Path, *, source: str, limits: Limits) -> tuple[dict[str, dict[int, float]], int]:
    """tag -> step -> value, and how many values a later one for the same step replaced."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
            STORE_EVERYTHING_SIZE_GUIDANCE,
            EventAccumulator,
        )
        from tensorboard.util import tensor_util  # type: ignore[import-untyped]
    except ImportError:
        raise MissingDependencyError("event files need tensorboard: pip install 'gns-controller[importers]'.") from None
    # 0 keeps everything, so that no scalar is subsampled; pictures and the like are not wanted.
    guidance = dict.fromkeys(STORE_EVERYTHING_SIZE_GUIDANCE, 1) | {"scalars": 0, "tensors": 0}
    accumulator = EventAccumulator(str(path), size_guidance=guidance)
    try:
        accumulator.Reload()
    except Exception as error:  # whatever a damaged file makes protobuf or its readers say
        raise InvalidInputError(f"{source} cannot be read as event files: {type(error).__name__}.") from None
    tags = accumulator.Tags()
    num_events = sum(len(accumulator.Scalars(tag)) for tag in tags["scalars"])
    limits.check_rows(num_events, source=source)

    def events() -> Iterator[tuple[str, int, float]]:
        for tag in tags["scalars"]:
            for event in accumulator.Scalars(tag):
                yield tag, event.step, event.value
        for tag in tags["tensors"]:  # how TensorFlow 2 writes scalars
            for event in accumulator.Tensors(tag):
                value = _scalar(tensor_util, event.tensor_proto)
                if value is not None:
                    yield tag, event.step, value

    found: dict[str, dict[int, float]] = {}
    num_replaced = 0
    for tag, step, value in events():
        values = found.setdefault(tag, {})
        before = values.get(step)
        num_replaced += before is not None and before != value and not (math.isnan(before) and math.isnan(value))
        values[step] = value
    return found, num_replaced


def _scalar(tensor_util: object, tensor: object) -> float | None:
    try:
        array = tensor_util.make_ndarray(tensor)  # type: ignore[attr-defined]
        return float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else None
    except (TypeError, ValueError):
        return None

"""Rows of numbers, whoever wrote them, as measurements.

One row is what was recorded at one optimizer step. Cells are text or numbers as the file had them; an empty one says
nothing. NaN and infinity are numbers here: they happened.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from gns_controller.core.contract import GroupReading, NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError
from gns_controller.recordings.columns import column_map
from gns_controller.recordings.recording import ImportDefaults, Limits, Recording, run_id_of, shown

LARGEST_COUNT = 2**62
LARGEST_NUM_ATTEMPTS = 100
"""A table that goes back more often is not in order."""

_COUNTS = frozenset({"optimizer_step", "attempt", "samples_seen", "tokens_seen", "global_batch_size"})
_GROWING = ("samples_seen", "tokens_seen")

Number = int | float


class Row(NamedTuple):
    """Cells under their columns' names; `number` is the line or row to name in an error."""

    number: int
    cells: Mapping[str, object]


class Table(NamedTuple):
    """A table of another tool, whatever its format."""

    rows: Iterable[Row]
    """The rows, in order of optimizer_step; where it goes back, another attempt begins."""
    names: Iterable[str]
    """Names of the columns."""
    source: str
    """Name of the table in errors."""
    name: str
    """The run id is made of it, unless the defaults have one."""
    unit: str = "row"
    """Unit that `Row.number` counts, for errors."""
    notes: Iterable[str] = ()
    """Sentences that the recording begins its notes with."""


class Step(NamedTuple):
    """The numbers of one optimizer step, under our names; absent where the cell is empty."""

    attempt: int
    optimizer_step: int
    numbers: dict[str, Number]


def table_recording(
    table: Table, *, columns: Mapping[str, str] | None, defaults: ImportDefaults, limits: Limits
) -> Recording:
    """Return a table as a recording.

    Args:
        table: rows and names.
        columns: our names -> the table's; see `column_map`.
        defaults: what the table does not hold.
        limits: most rows and columns.

    Raises:
        InvalidInputError: a column is missing, a cell is not a number, or the rows are not in order.
    """
    names = list(dict.fromkeys(table.names))
    limits.check_columns(len(names), source=table.source)
    column_of = column_map(names, columns=columns, defaults=defaults, source=table.source)
    builder = _Steps(column_of, source=table.source, unit=table.unit, limits=limits)
    for row in table.rows:
        builder.add(row)
    return _Measurements(builder, defaults=defaults, name=table.name).recording(table.notes)


class _Steps:
    """Reads cells, merges rows of one step, and tells attempts apart."""

    def __init__(self, found: dict[str, str], *, source: str, unit: str, limits: Limits) -> None:
        self.found, self.source, self.unit, self.limits = found, source, unit, limits
        self.steps: list[Step] = []
        self.num_rows = 0
        self.counts: Counter[str] = Counter()
        self.largest: dict[str, Number] = {}
        """Samples or tokens at the steps of this attempt before the last one."""

    def add(self, row: Row) -> None:
        self.num_rows += 1
        self.limits.check_rows(self.num_rows, source=self.source)
        numbers: dict[str, Number] = {}
        for ours, theirs in self.found.items():
            value = self._number(row, ours, theirs)
            if value is not None:
                numbers[ours] = value
        step = numbers.pop("optimizer_step", None)
        if step is None:
            self.counts["without a step"] += 1
            return
        last = self.steps[-1] if self.steps else None
        attempt = numbers.pop("attempt", None)
        if attempt is None:
            attempt = 0 if last is None else last.attempt + (step < last.optimizer_step)
        if last is not None and (attempt, step) < (last.attempt, last.optimizer_step):
            raise InvalidInputError(
                f"{self.source}, {self.unit} {row.number}: attempt {attempt}, optimizer_step {step} comes after "
                f"attempt {last.attempt}, optimizer_step {last.optimizer_step}. Sort the rows by both."
            )
        if "attempt" not in self.found and attempt > LARGEST_NUM_ATTEMPTS:
            raise InvalidInputError(
                f"{self.source}, {self.unit} {row.number}: optimizer_step goes back for the {attempt}th time. Sort the "
                "rows by it, or map optimizer_step to another column."
            )
        if last is not None and attempt != last.attempt:
            self.largest = {}
        elif last is not None and step != last.optimizer_step:
            self.largest |= {ours: last.numbers[ours] for ours in _GROWING if ours in last.numbers}
        for ours, before in self.largest.items():
            if numbers.get(ours, before) < before:
                raise InvalidInputError(
                    f"{self.source}, {self.unit} {row.number}: {ours} goes back from {before} to {numbers[ours]} "
                    "within an attempt. Map it to another column, or to none."
                )
        if last is not None and (attempt, step) == (last.attempt, last.optimizer_step):
            if any(not _same(last.numbers[ours], value) for ours, value in numbers.items() if ours in last.numbers):
                self.counts["repeated"] += 1
            last.numbers.update(numbers)
        else:
            self.steps.append(Step(int(attempt), int(step), numbers))

    def _number(self, row: Row, ours: str, theirs: str) -> Number | None:
        cell = row.cells.get(theirs)
        if isinstance(cell, str):
            cell = cell.strip()
        if cell is None or cell == "":
            return None
        value = _parsed(cell)
        if value is None:
            raise self._unreadable(row, theirs, cell, "a number, or nothing")
        if ours not in _COUNTS:
            return value
        if math.isnan(value):
            return None  # how some tools write an empty cell
        least = 1 if ours == "global_batch_size" else 0
        if value != value // 1 or not least <= value <= LARGEST_COUNT:
            raise self._unreadable(row, theirs, cell, f"{ours}: a whole number from {least} on")
        return int(value)

    def _unreadable(self, row: Row, theirs: str, cell: object, wanted: str) -> InvalidInputError:
        return InvalidInputError(
            f"{self.source}, {self.unit} {row.number}, column {shown(theirs)}: {shown(cell)} is not {wanted}."
        )


def _parsed(cell: object) -> Number | None:
    """A number from text or JSON; None for anything else."""
    if isinstance(cell, bool):
        return None
    if isinstance(cell, int):
        return cell if abs(cell) <= LARGEST_COUNT else None
    if isinstance(cell, float):
        return cell
    if not isinstance(cell, str) or not cell.isascii() or "_" in cell:
        return None
    if cell.isdigit() and len(cell) < 20:
        return int(cell)
    try:
        return float(cell)
    except ValueError:
        return None


def _same(one: Number, other: Number) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


class _Measurements:
    """Fills in what the table left out, and builds the recording."""

    def __init__(self, table: _Steps, *, defaults: ImportDefaults, name: str) -> None:
        self.table, self.found, self.defaults = table, table.found, defaults
        self.run_id = defaults.run_id or run_id_of(name)
        self.estimator = defaults.estimator or ("split" if "progress" in self.found else "rank_variance")
        self.geometry = defaults.geometry or "spectral"
        self.num_groups = defaults.num_groups or max(2, defaults.data_parallel_size)
        self.counts = table.counts
        self.measurements: list[NoiseScaleMeasurement] = []
        self.steps: list[int] = []
        """optimizer_step of this attempt's measurements so far, or of what it resumed from."""
        self.samples: list[int] = []

    def recording(self, notes: Iterable[str]) -> Recording:
        steps = self.table.steps
        if not steps:
            raise InvalidInputError(f"{self.table.source} holds no row with an optimizer_step.")
        batch: Number | None = next(
            (s.numbers["global_batch_size"] for s in steps if "global_batch_size" in s.numbers), None
        )
        attempt = steps[0].attempt
        for step in steps:
            if step.attempt != attempt:
                attempt = step.attempt
                self._rewind(step.optimizer_step)
            batch = step.numbers.get("global_batch_size", batch)
            self._add(step, None if batch is None else int(batch))
        return Recording(
            source=self.table.source,
            run_id=self.run_id,
            measurements=tuple(self.measurements),
            is_averaged="noise_scale" in self.found,
            notes=(*notes, *self._notes()),
        )

    def _rewind(self, optimizer_step: int) -> None:
        """Go on from the last row that is not ahead of this step."""
        kept = bisect_right(self.steps, optimizer_step)
        if kept and self.steps[kept - 1] == optimizer_step:
            kept -= 1
        del self.steps[kept:], self.samples[kept:]

    def _add(self, step: Step, batch: int | None) -> None:
        numbers, defaults = step.numbers, self.defaults
        before_step = self.steps[-1] if self.steps else 0
        before = self.samples[-1] if self.samples else 0
        samples = self._samples(numbers)
        batch = batch or defaults.global_batch_size
        num_steps = step.optimizer_step - before_step
        if batch is None:
            batch = self._mean_batch(num_steps, None if samples is None else samples - before)
            if batch is None:
                raise InvalidInputError(
                    f"{self.table.source}, optimizer_step {step.optimizer_step}: no batch, and no samples that grow. "
                    "Give global_batch_size with the defaults (--batch-size), or map it."
                )
            self.counts["mean batch"] += 1
        if samples is None:
            samples = before + num_steps * batch
            self.counts["integrated"] += 1
            if samples > LARGEST_COUNT:
                raise InvalidInputError(
                    f"{self.table.source}, optimizer_step {step.optimizer_step}: the samples up to here exceed 2^62."
                )
        self.steps.append(step.optimizer_step)
        self.samples.append(samples)
        per_rank = max(1, batch // defaults.data_parallel_size)
        micro_batch_size = min(defaults.micro_batch_size or per_rank, per_rank)
        reading = self._reading(numbers, batch)
        self.measurements.append(
            NoiseScaleMeasurement(
                run_id=self.run_id,
                attempt=step.attempt,
                optimizer_step=step.optimizer_step,
                samples_seen=samples,
                plan_version=0,
                global_batch_size=batch,
                micro_batch_size=micro_batch_size,
                gradient_accumulation_steps=per_rank // micro_batch_size,
                data_parallel_size=defaults.data_parallel_size,
                schedule_factor=numbers.get("schedule_factor", 1.0),
                step_seconds=numbers.get("step_seconds"),
                samples_per_second=numbers.get("samples_per_second"),
                loss=numbers.get("loss"),
                validation_loss=numbers.get("validation_loss"),
                readings=() if reading is None else (reading,),
            )
        )

    def _mean_batch(self, num_steps: int, num_samples: int | None) -> int | None:
        """Samples per step since the row before; before the first step, those of the first steps."""
        if num_steps == 0:
            later = (s for s in self.table.steps if s.optimizer_step > 0)
            first = next(later, None)
            num_steps, num_samples = (
                (0, None) if first is None else (first.optimizer_step, self._samples(first.numbers))
            )
        return max(1, round(num_samples / num_steps)) if num_steps and num_samples and num_samples > 0 else None

    def _samples(self, numbers: Mapping[str, Number]) -> int | None:
        if "samples_seen" in numbers:
            return int(numbers["samples_seen"])
        tokens = numbers.get("tokens_seen")
        if tokens is None:
            return None
        samples, rest = divmod(int(tokens), self.defaults.tokens_per_sample or 1)
        self.counts["cut tokens"] += rest > 0
        return samples

    def _reading(self, numbers: Mapping[str, Number], batch: int) -> GroupReading | None:
        parts = self._parts(numbers)
        if parts is None:
            return None
        noise, signal, progress = parts
        return GroupReading(
            group=self.defaults.group,
            geometry=self.geometry,
            estimator=self.estimator,
            noise=noise,
            signal=signal,
            progress=progress,
            num_groups=self.num_groups,
            samples_per_group=batch / self.num_groups,
            learning_rate=numbers.get("learning_rate", math.nan),
        )

    def _parts(self, numbers: Mapping[str, Number]) -> tuple[float, float, float | None] | None:
        """Noise, signal and progress of a row; None where a cell of them is empty."""
        is_split = self.estimator == "split"
        if "noise_scale" in numbers:
            return self._root(numbers["noise_scale"]), 1.0, 1.0 if is_split else None
        if "noise_sq" in numbers and "signal_sq" in numbers:
            noise, signal_sq = self._root(numbers["noise_sq"]), float(numbers["signal_sq"])
            if not is_split:
                return noise, self._root(signal_sq), None
            root = math.sqrt(abs(signal_sq))
            return noise, root, math.copysign(root, signal_sq)
        if "noise" in numbers and "signal" in numbers and (not is_split or "progress" in numbers):
            return float(numbers["noise"]), float(numbers["signal"]), numbers["progress"] if is_split else None
        return None

    def _root(self, square: Number) -> float:
        """Square root; NaN of what no norm squares to, which policies leave out."""
        if square < 0:
            self.counts["negative"] += 1
            return math.nan
        return math.sqrt(square)

    def _assumed(self) -> Iterator[str]:
        """What holds for every reading because nobody said anything else."""
        if self.defaults.geometry is None:
            yield f"geometry {self.geometry}"
        if self.defaults.estimator is None and "progress" not in self.found:
            yield f"estimator {self.estimator}"
        if self.defaults.num_groups is None:
            yield f"num_groups {self.num_groups}"

    def _notes(self) -> list[str]:
        pairs = ", ".join(f"{ours} from {shown(theirs)}" for ours, theirs in self.found.items())
        notes = [f"{pairs}."]
        measured = sum(bool(m.readings) for m in self.measurements)
        if not measured:
            notes.append("no row holds a noise scale: policies that need one will hold.")
        elif assumed := list(self._assumed()):
            notes.append(f"assumed: {', '.join(assumed)}.")
        sentences = {
            "without a step": "{} rows have no optimizer_step and are left out.",
            "repeated": "{} rows repeat the step before them with other numbers: the later ones stand.",
            "mean batch": "{} rows have no batch: it is the mean since the row before, from samples_seen, rounded.",
            "integrated": "{} rows have no samples_seen: their batch is taken to hold since the row before.",
            "cut tokens": "{} rows count tokens that are no whole samples: rounded down.",
            "negative": "{} values are negative and no square of a norm: kept as NaN, which policies leave out. "
            "If yours are debiased, import signal_sq with estimator split.",
        }
        notes += [sentence.format(self.counts[key]) for key, sentence in sentences.items() if self.counts[key]]
        num_attempts = len({m.attempt for m in self.measurements})
        if "attempt" not in self.found and num_attempts > 1:
            notes.append(f"optimizer_step goes back {num_attempts - 1} times: each begins another attempt.")
        return notes

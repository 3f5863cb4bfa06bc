"""A recorded run as replay wants it, what to assume where a file is silent, and how much of a file we read.

Foreign text never reaches an error whole: see `shown`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gns_controller.core.contract import Decision, Estimator, Geometry, NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.runs import RunSpecification

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Recording:
    """What one run measured, and what was decided then if the file says so."""

    source: str
    """Where it came from, for people."""
    run_id: str
    measurements: tuple[NoiseScaleMeasurement, ...]
    """Ascending in optimizer_step within an attempt."""
    specification: RunSpecification | None = None
    """None: the format has none."""
    policy: AnyPolicyConfig | None = None
    """The policy in force at the end of an export; it may differ from the specification's."""
    policy_revision: int = 0
    decisions: tuple[Decision, ...] = ()
    """What was decided then, in the order of the measurements; may be empty, or fewer than they are."""
    controls: tuple[dict[str, Any], ...] = ()
    """Policy changes and overrides of an export, as they were written."""
    control_positions: tuple[int, ...] = ()
    """For each control, how many measurements came before it."""
    is_averaged: bool = False
    """Readings hold an average already: replay with noise_beta = signal_beta = 0."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out, one sentence each."""


@dataclass(frozen=True)
class ImportDefaults:
    """What holds for every row of a table, because tables of other tools do not say it."""

    run_id: str | None = None
    """None: made from the name of the file."""
    estimator: Estimator | None = None
    """None: split where progress is recorded, else rank_variance."""
    geometry: Geometry | None = None
    """None: spectral."""
    group: str = "imported"
    """Name of the one parameter group."""
    data_parallel_size: int = 1
    micro_batch_size: int | None = None
    """Samples per rank per backward pass; None: a rank's whole share in one pass."""
    num_groups: int | None = None
    """Sample groups per measurement; None: data_parallel_size, at least 2."""
    tokens_per_sample: int | None = None
    """Turns tokens_seen into samples_seen."""
    global_batch_size: int | None = None
    """Where no column has it; None: the mean since the row before, from samples_seen."""

    def __post_init__(self) -> None:
        least = {"data_parallel_size": 1, "micro_batch_size": 1, "num_groups": 2}
        for name in (*least, "tokens_per_sample", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise InvalidInputError(f"{name}={value} is too small: give {least.get(name, 1)} or more.")


@dataclass(frozen=True)
class Limits:
    """Largest input; beyond it the answer is an error, not a full memory."""

    num_rows: int = 10_000_000
    line_bytes: int = 4 * 2**20
    num_columns: int = 10_000

    def check_rows(self, num_rows: int, *, source: str) -> None:
        """Raise InvalidInputError for one row too many."""
        if num_rows > self.num_rows:
            raise InvalidInputError(
                f"{source} has more than {self.num_rows} rows: thin it out, or import a part of the run."
            )

    def check_columns(self, num_columns: int, *, source: str) -> None:
        """Raise InvalidInputError for one column too many."""
        if num_columns > self.num_columns:
            raise InvalidInputError(f"{source} has more than {self.num_columns} columns: export fewer of them.")


def shown(text: object) -> str:
    """Foreign text for an error or a note: quoted, escaped, and cut."""
    plain = str(text)
    cut = repr(plain[:SHOWN_CHARACTERS])
    return cut if len(plain) <= SHOWN_CHARACTERS else f"{cut}..."


def names_shown(names: list[str], *, most: int = 20) -> str:
    """Names of columns or files for an error, the first `most` of them."""
    listed = ", ".join(shown(name) for name in names[:most]) or "none"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def run_id_of(name: str) -> str:
    """A legal run id that resembles the name of a file, a folder or a foreign run."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).lstrip("._-")
    return kept[:128] or "imported"


def lines_of(path: Path, *, limits: Limits) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, none longer than the limit.

    Raises:
        InvalidInputError: the file cannot be read, is not UTF-8, or has a longer line.
    """
    source = shown(path.name)
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(limits.line_bytes + 1):
                number += 1
                if len(line) > limits.line_bytes:
                    raise InvalidInputError(
                        f"{source}, line {number}: longer than {limits.line_bytes} bytes, which no recording is."
                    )
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise InvalidInputError(
                        f"{source}, line {number}: not UTF-8 text. Export it as UTF-8, or name its format."
                    ) from None
    except OSError as error:
        raise InvalidInputError(f"{source} cannot be read: {error.strerror or type(error).__name__}.") from None

"""CSV, with commas, semicolons or tabs: a header, then one row per recorded step."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from gns_controller.core.errors import InvalidInputError
from gns_controller.recordings.recording import ImportDefaults, Limits, Recording, lines_of, names_shown, shown
from gns_controller.recordings.tables import Row, Table, table_recording


def read_csv(path: Path, *, columns: Mapping[str, str] | None, defaults: ImportDefaults, limits: Limits) -> Recording:
    """A CSV file as a recording.

    Raises:
        InvalidInputError: no header, a column is missing, or a row cannot be read; the message names the line.
    """
    source = shown(path.name)
    lines = lines_of(path, limits=limits)
    first = next(lines, (0, ""))[1]
    if not first.strip():
        raise InvalidInputError(f"{source} is empty, or has no header: its first line must name the columns.")
    delimiter = max(",;\t", key=first.count)

    def text() -> Iterator[str]:
        yield first
        yield from (line for _, line in lines)

    reader = csv.reader(text(), delimiter=delimiter)
    names = [name.strip() for name in _next(reader, source) or []]
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        raise InvalidInputError(f"{source} has several columns called {names_shown(twice)}: rename them.")

    def rows() -> Iterator[Row]:
        while (cells := _next(reader, source)) is not None:
            if not cells:
                continue
            if len(cells) != len(names):
                raise InvalidInputError(
                    f"{source}, line {reader.line_num}: {len(cells)} cells, and the header names {len(names)} columns."
                )
            yield Row(reader.line_num, dict(zip(names, cells, strict=True)))

    table = Table(rows(), names=[name for name in names if name], source=source, name=path.stem, unit="line")
    return table_recording(table, columns=columns, defaults=defaults, limits=limits)


def _next(reader: Iterator[list[str]], source: str) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        number = getattr(reader, "line_num", 0)
        raise InvalidInputError(f"{source}, line {number}: not readable as CSV ({shown(error)}).") from None

"""Measurements on disk until the controller has them: one file per incarnation of a run, in order.

    <directory>/<run_id>/<incarnation>.jsonl     first line the registration, then one measurement a line
    <directory>/<run_id>/<incarnation>.sent      how many of them the controller acknowledged

A measurement is on disk before it is sent. A file whose measurements are all acknowledged is removed when its
incarnation ends. Losing the count costs nothing: the controller knows duplicates.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.runs import Registration

logger = logging.getLogger(__name__)


class Spool:
    """One incarnation's file, locked while it lives. A disk that fails is logged once; it costs durability only."""

    def __init__(self, directory: Path, *, run_id: str, registration: Registration) -> None:
        self._path = directory / run_id / f"{registration.incarnation}.jsonl"
        self._sent_path = self._path.with_suffix(".sent")
        self._file: IO[str] | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")
            _try_to_lock(self._file)
        except OSError as error:
            self._give_up(error)
        self._append(registration.model_dump_json())

    def append(self, measurement: NoiseScaleMeasurement) -> None:
        """Put one measurement on disk, fsynced."""
        self._append(measurement.model_dump_json())

    def mark_sent(self, count: int) -> None:
        """Remember that the first `count` measurements are the controller's."""
        if self._file is None:
            return
        try:
            self._sent_path.write_text(str(count))
        except OSError as error:
            self._give_up(error)

    def close(self, *, everything_sent: bool) -> None:
        """Let go of the file; remove it where the controller has all of it."""
        if self._file is None:
            return
        if everything_sent:
            for path in (self._path, self._sent_path):
                path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _append(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "spool cannot be written, measurements stay in memory until sent: path=%s error=%s", self._path, error
        )
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


class LeftoverSpool:
    """What an earlier incarnation could not send."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open() as lines:
            self.registration = Registration.model_validate_json(next(lines))
            self.measurements = list(_readable(lines, path))
        sent_path = path.with_suffix(".sent")
        if sent_path.exists():
            text = sent_path.read_text().strip()
            self.measurements = self.measurements[int(text) if text.isdigit() else 0 :]

    def remove(self) -> None:
        """The controller has all of it."""
        for path in (self.path, self.path.with_suffix(".sent")):
            path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """The controller does not want it: keep it where nobody sends it again."""
        self.path.rename(self.path.with_suffix(".refused"))


def leftovers(directory: Path, *, run_id: str, except_incarnation: str) -> Iterator[LeftoverSpool]:
    """Readable files of earlier incarnations, oldest first. Unreadable ones are set aside with a log line."""
    folder = directory / run_id
    if not folder.is_dir():
        return
    for path in sorted(folder.glob("*.jsonl"), key=lambda found: found.stat().st_mtime):
        if path.stem == except_incarnation or _is_alive(path):
            continue
        try:
            yield LeftoverSpool(path)
        except (ValidationError, StopIteration, OSError, UnicodeDecodeError) as error:
            logger.warning("spool file is unreadable, set aside: path=%s error=%s", path, type(error).__name__)
            path.rename(path.with_suffix(".unreadable"))


def _try_to_lock(file: IO[str]) -> bool:
    """Whether nobody else holds the file. A file system without locks locks nothing."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_alive(path: Path) -> bool:
    """Whether another job of this name is still writing it: then it is not a leftover."""
    try:
        with path.open() as file:
            return not _try_to_lock(file)
    except OSError:
        return False


def _readable(lines: Iterator[str], path: Path) -> Iterator[NoiseScaleMeasurement]:
    for line in lines:
        try:
            yield NoiseScaleMeasurement.model_validate(json.loads(line))
        except ValueError:
            logger.warning("spool line is torn, left out: path=%s", path)

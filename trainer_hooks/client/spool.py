"""Measurements on disk until the controller has them: one file per incarnation of a run, in order.

    <directory>/<run_id>/<incarnation>.jsonl     first line the registration, then one measurement a line
    <directory>/<run_id>/<incarnation>.sent      how many of them the controller acknowledged
    ...rejected  ...refused  ...unreadable       what the controller or this program cannot take, kept for a person

A measurement is on disk before it is sent. A file whose measurements are all acknowledged is removed when its
incarnation ends. Losing the count costs nothing: the controller knows duplicates.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.policies import KEEP_UNKNOWN
from gns_controller.core.runs import Registration

logger = logging.getLogger(__name__)


class Spool:
    """One incarnation's file, locked while it lives. A disk that fails is logged once; it costs durability only.

    Two threads use it: one appends, the other marks what was sent.
    """

    def __init__(self, directory: Path, *, run_id: str, registration: Registration) -> None:
        self._path = directory / run_id / f"{registration.incarnation}.jsonl"
        self._registration = registration
        self._lock = threading.Lock()
        self._file: IO[str] | None = None

    def open(self) -> None:
        """Begin the file with the registration."""
        with self._lock:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a")
                _try_to_lock(self._file)
            except OSError as error:
                self._give_up(error)
        self._append(self._registration.model_dump_json())

    def append(self, measurement: NoiseScaleMeasurement) -> None:
        """Put one measurement on disk, fsynced."""
        self._append(measurement.model_dump_json())

    def mark_sent(self, count: int) -> None:
        """Remember that the first `count` measurements are the controller's. Losing it costs duplicates only."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                self._path.with_suffix(".sent").write_text(str(count))

    def set_aside(self, measurement: NoiseScaleMeasurement) -> None:
        """Keep a measurement that the controller cannot take, where nobody sends it again."""
        with self._lock, contextlib.suppress(OSError), self._path.with_suffix(".rejected").open("a") as file:
            file.write(measurement.model_dump_json() + "\n")

    def close(self, *, everything_sent: bool) -> None:
        """Let go of the file; remove it where the controller has all of it."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is None:
                return
            self._file.close()
            self._file = None
            if everything_sent:
                for path in (self._path, self._path.with_suffix(".sent")):
                    path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        with self._lock:
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
    """What an earlier incarnation could not send.

    A last line without its end is torn by a crash and left out. Any other line that cannot be read keeps the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first, *lines = path.read_text().split("\n")[:-1]
        self.registration = Registration.model_validate_json(first, context=KEEP_UNKNOWN)
        sent_path = path.with_suffix(".sent")
        text = sent_path.read_text().strip() if sent_path.exists() else ""
        self.measurements: list[NoiseScaleMeasurement] = []
        self._has_unreadable = False
        for line in lines[int(text) if text.isdigit() else 0 :]:
            try:
                self.measurements.append(NoiseScaleMeasurement.model_validate_json(line))
            except ValidationError:
                self._has_unreadable = True

    def dispose(self, *, refused: bool = False) -> None:
        """Nobody sends it again. The file stays where something in it did not reach the controller."""
        if refused or self._has_unreadable:
            suffix = ".refused" if refused else ".unreadable"
            logger.warning("spool file is set aside: path=%s", self.path.with_suffix(suffix))
            self.path.rename(self.path.with_suffix(suffix))
        else:
            self.path.unlink(missing_ok=True)
        self.path.with_suffix(".sent").unlink(missing_ok=True)


def leftovers(directory: Path, *, run_id: str, except_incarnation: str) -> Iterator[LeftoverSpool]:
    """Readable files of earlier incarnations that have ended, oldest first. Others are set aside with a log line."""
    try:
        paths = sorted((directory / run_id).glob("*.jsonl"), key=lambda found: found.stat().st_mtime)
    except OSError as error:
        logger.warning("spool cannot be listed: directory=%s error=%s", directory, error)
        return
    for path in paths:
        if path.stem == except_incarnation or _is_alive(path):
            continue
        try:
            yield LeftoverSpool(path)
        except (ValueError, OSError) as error:
            logger.warning("spool file is unreadable, set aside: path=%s error=%s", path, type(error).__name__)
            with contextlib.suppress(OSError):
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

"""The example job as a child process: started, followed, ended on every way out, and not run twice.

The job is another package's program and known here by its command line and its output file alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gns_controller.core.errors import GnsError, InvalidInputError, JobError
from gns_controller.experiments.subprocesses import child

JOB_MODULE = "trainer_hooks.examples.train_lm"


@dataclass(frozen=True)
class Job:
    """One run of the example job, and where its files are."""

    title: str
    output: Path
    """JSON lines; log and settings lie beside it."""
    arguments: tuple[str, ...]
    num_ranks: int
    num_samples: int
    """That it will train."""
    start_samples: int = 0
    resume_from: Path | None = None
    checkpoint: Path | None = None
    kept: tuple[Path, ...] = field(default=())
    """Checkpoints that it leaves."""

    def settings(self) -> dict[str, Any]:
        """What decides the result: equal settings, equal result. Paths are not among them, contents are."""
        return {
            "arguments": list(self.arguments),
            "num_ranks": self.num_ranks,
            "resume_from": _sha256(self.resume_from) if self.resume_from else None,
            "python": platform.python_version(),  # the text is its standard library
        }

    def finished_records(self) -> list[dict[str, Any]] | None:
        """What a finished run of these settings wrote; None if there is none."""
        try:
            if json.loads(self._settings_path.read_text()) != self.settings():
                return None
            records = read_records(self.output)
        except (OSError, ValueError):
            return None
        is_whole = bool(records) and records[-1]["kind"] == "end" and all(path.exists() for path in self.kept)
        return records if is_whole else None

    def follow(self) -> Iterator[int]:
        """Run to the end; yields samples trained so far.

        Raises:
            InvalidInputError: the job says that it cannot serve this request.
            JobError: it failed otherwise.
        """
        stale = (self.output, self._settings_path, *self.kept, *([self.checkpoint] if self.checkpoint else []))
        for path in stale:
            path.unlink(missing_ok=True)
        self._settings_path.write_text(json.dumps(self.settings(), indent=2) + "\n")
        log_path = self.output.with_suffix(".log")
        with log_path.open("w") as log, child(self._command(), stdout=log) as process:
            tail = _Tail(self.output)
            while True:
                status = process.poll()
                for record in tail.fresh():
                    yield record.get("samples_seen", record.get("samples", self.start_samples)) - self.start_samples
                if status is not None:
                    break
                time.sleep(0.2)
        if status != 0:
            raise _failure(f"the job {self.title!r} (log: {log_path})", status, log_path.read_text())

    @property
    def _settings_path(self) -> Path:
        return self.output.with_suffix(".settings.json")

    def _command(self) -> list[str]:
        launcher = [sys.executable]
        if self.num_ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.num_ranks}"]
        command = [*launcher, "-m", JOB_MODULE, *self.arguments, "--output", str(self.output)]
        command += ["--spool-directory", str(self.output.parent / "spool")]
        if self.resume_from:
            command += ["--resume-from", str(self.resume_from)]
        if self.checkpoint:
            command += ["--checkpoint", str(self.checkpoint)]
        return command


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Where the run stands and its settings, as the job itself says.

    Raises:
        InvalidInputError: there is no such file, or it is no checkpoint of the example job.
        JobError: the job failed.
    """
    command = [sys.executable, "-m", JOB_MODULE, "--describe-checkpoint", str(path)]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate()
    if process.returncode != 0:
        raise _failure(f"reading {path}", process.returncode, errors.decode(errors="replace"))
    description: dict[str, Any] = json.loads(output)
    return description


def read_records(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a job's output."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


class _Tail:
    """Whole lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def fresh(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _failure(what: str, status: int, log: str) -> GnsError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("train_lm:")]
    if said:
        return InvalidInputError(f"{what}: {said[-1].removeprefix('train_lm:').strip()}")
    raised = re.findall(r"\w*(?:Error|Exception): .+", log)
    because = [*lines[-1:], *raised][-1:] or ["it said nothing."]
    return JobError(f"{what} ended with status {status}: {because[0]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

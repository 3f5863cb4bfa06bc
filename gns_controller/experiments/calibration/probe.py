"""Make checkpoints if none are given, branch from each, and report the results.

Finished jobs of the same settings that lie in the output folder are read, not run again.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from gns_controller.core.batch_arithmetic import BatchGrid
from gns_controller.core.errors import InvalidInputError, MissingDependencyError
from gns_controller.experiments.calibration.jobs import Job, describe_checkpoint, read_records
from gns_controller.experiments.calibration.plot import plot_results
from gns_controller.experiments.calibration.results import (
    ESTIMATORS,
    CheckpointResult,
    evaluate,
    policy_document,
    typical_theta,
)
from gns_controller.experiments.calibration.tables import print_results
from gns_controller.experiments.progress import progress_bars
from gns_controller.experiments.subprocesses import end_on_signals

STEPS_BETWEEN_MEASUREMENTS = 3
SIGN_PATTERNS = 3
DEFAULT_BRANCH_SHARE = 0.1
"""Of the budget, rounded up so that every branch ends at the same sample."""


@dataclass(frozen=True)
class BaseRun:
    """The run that makes the checkpoints: the example job, with a constant batch."""

    optimizer: str = "muon"
    learning_rate: float | None = None
    """At `batch_size`; None: the example job's."""
    batch_size: int = 16
    """Global, samples."""
    budget_samples: int = 48_000
    width: int = 32
    layers: int = 2


@dataclass(frozen=True)
class CalibrationSettings:
    """What to branch from, and how. `None` is a default that depends on the rest."""

    checkpoints: tuple[Path, ...] = ()
    """Of the example job. Their runs' settings are in them."""
    at_samples: tuple[int, ...] = ()
    """Without checkpoints: train a base run, and branch at these points."""
    base: BaseRun = BaseRun()
    seeds: tuple[int, ...] = (0,)
    """Of base runs."""
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    branch_samples: int | None = None
    tolerance: float = 0.01
    num_evaluations: int = 8
    price: bool = False
    """Only the price of doubling; multiples are 1 and 2."""
    coupling: str | None = None
    num_ranks: int | None = None
    num_threads: int = 1
    measurement_interval_samples: int | None = None
    output: Path = Path("calibration-output")
    plot: bool = False

    def __post_init__(self) -> None:
        if bool(self.checkpoints) == bool(self.at_samples):
            raise InvalidInputError(
                "give --checkpoint FILE (of the example job, several times if you like), or --at-samples 4800,12000 "
                "to let this command make the checkpoints; one of the two."
            )
        for path in self.checkpoints:
            if not path.is_file():
                raise InvalidInputError(f"--checkpoint {path}: there is no such file.")
        if 1 not in self.multiples or len(self.multiples) < 2 or min(self.multiples) < 1:
            raise InvalidInputError("--multiples needs 1, the checkpoint's own batch, and at least one larger number.")


@dataclass(frozen=True)
class Probe:
    """One checkpoint and where its branches go."""

    path: Path
    description: Mapping[str, Any]
    length: int
    """Samples of every branch."""
    name: str
    """In the names of its branches' files."""


def run_calibration(settings: CalibrationSettings, console: Console) -> dict[str, Any]:
    """Everything, from the base runs to the files. Returns what --json prints.

    Raises:
        MissingDependencyError: torch is missing, or matplotlib and a plot was asked for.
        InvalidInputError: a checkpoint that is none, or branches that cannot be.
        JobError: a job failed.
    """
    for module in ("torch", *(["matplotlib"] if settings.plot else [])):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(f"this calibration needs {module}: pip install 'gns-controller[demo]'.")
    end_on_signals()
    settings.output.mkdir(parents=True, exist_ok=True)
    bases = _base_jobs(settings)
    probes = [_probe(settings, path, number) for number, path in enumerate(settings.checkpoints)]
    with progress_bars(console) as progress:
        bar = _Bar(progress, num_samples=sum(base.num_samples for base in bases))
        for base in bases:
            bar.run(base)
        kept = [path for base in bases for path in base.kept]
        probes += [_probe(settings, path, number) for number, path in enumerate(kept)]
        bar.extend(sum(probe.length for probe in probes) * len(settings.multiples))
        results = [_run_branches(settings, probe, bar) for probe in probes]
    results.sort(key=lambda result: (result.samples, result.seed))
    return _report(settings, results, console)


def _report(settings: CalibrationSettings, results: Sequence[CheckpointResult], console: Console) -> dict[str, Any]:
    policy = policy_document(results)
    report = {
        "tolerance": settings.tolerance,
        "rows": [result.as_row() for result in results],
        "theta": {estimator: typical_theta(results, estimator) for estimator in ESTIMATORS},
        "policy": policy,
    }
    (settings.output / "calibration.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print_results(results, console, tolerance=settings.tolerance)
    console.print(f"Numbers: {settings.output / 'calibration.json'}", soft_wrap=True)
    if policy is not None:
        policy_path = settings.output / "critical_batch_table.json"
        policy_path.write_text(json.dumps(policy) + "\n")
        console.print(f"Policy: {policy_path}", soft_wrap=True)
        console.print(json.dumps(policy), soft_wrap=True, markup=False, highlight=False)
    if settings.plot:
        plot_path = settings.output / "calibration.png"
        plot_results(results, plot_path, tolerance=settings.tolerance)
        console.print(f"Plot: {plot_path}", soft_wrap=True)
    return report


# ---------------------------------------------------------------- jobs


def _base_jobs(settings: CalibrationSettings) -> list[Job]:
    """Runs that make the checkpoints, one per seed; checked before hours are spent on them."""
    if not settings.at_samples:
        return []
    base, points, batch_size = settings.base, sorted(set(settings.at_samples)), settings.base.batch_size
    num_ranks = settings.num_ranks or 1
    for point in points:
        if point < 1:
            raise InvalidInputError(f"--at-samples {point}: sample counts begin at 1.")
        reached = math.ceil(point / batch_size) * batch_size
        _branch_length(
            settings,
            batch_size=batch_size,
            micro_batch_size=64,
            num_ranks=num_ranks,
            samples=reached,
            budget_samples=base.budget_samples,
        )
    jobs = []
    for seed in settings.seeds:
        checkpoint = settings.output / f"base-seed{seed}.pt"
        rate = ["--learning-rate", str(base.learning_rate)] if base.learning_rate else []
        jobs.append(
            Job(
                title=f"base, seed {seed}",
                output=checkpoint.with_suffix(".jsonl"),
                arguments=(
                    *("--run-id", f"calibrate-base-seed{seed}", "--optimizer", base.optimizer, *rate),
                    *("--batch-size", str(batch_size), "--micro-batch-size", "64"),
                    *("--budget-samples", str(base.budget_samples), "--seed", str(seed)),
                    *("--width", str(base.width), "--layers", str(base.layers)),
                    *("--coupling", settings.coupling or "sqrt", "--evaluations", "10"),
                    *("--save-at-samples", ",".join(map(str, points)), "--stop-at-samples", str(points[-1])),
                    *_measuring(settings, batch_size=batch_size, num_ranks=num_ranks),
                ),
                num_ranks=num_ranks,
                num_samples=points[-1],
                checkpoint=checkpoint,
                kept=tuple(checkpoint.with_name(f"{checkpoint.stem}-{point}.pt") for point in points),
            )
        )
    return jobs


def _measuring(settings: CalibrationSettings, *, batch_size: int, num_ranks: int) -> list[str]:
    """The same in the base run and in the branch that continues it, so that they agree bit for bit."""
    interval = settings.measurement_interval_samples or STEPS_BETWEEN_MEASUREMENTS * batch_size
    patterns = SIGN_PATTERNS if batch_size >= 4 * num_ranks else 1
    return [
        *("--estimators", ",".join(ESTIMATORS), "--measurement-interval-samples", str(interval)),
        *("--num-sign-patterns", str(patterns), "--num-threads", str(settings.num_threads)),
    ]


def _probe(settings: CalibrationSettings, path: Path, number: int) -> Probe:
    description = describe_checkpoint(path)
    job = description["job"]
    if settings.coupling not in (None, job["coupling"]) and description["global_batch_size"] != job["batch_size"]:
        raise InvalidInputError(
            f"--coupling {settings.coupling}: {path} has grown its batch from {job['batch_size']} to "
            f"{description['global_batch_size']} with coupling {job['coupling']}; its branches need the same."
        )
    length = _branch_length(
        settings,
        batch_size=description["global_batch_size"],
        micro_batch_size=job["micro_batch_size"],
        num_ranks=settings.num_ranks or job["num_ranks"],
        samples=description["samples_seen"],
        budget_samples=job["budget_samples"],
    )
    return Probe(path, description, length, f"{number}-{path.stem}")


def _branch_length(
    settings: CalibrationSettings,
    *,
    batch_size: int,
    micro_batch_size: int,
    num_ranks: int,
    samples: int,
    budget_samples: int,
) -> int:
    """Samples of every branch: a multiple of every batch, so that all end at the same sample.

    Raises:
        InvalidInputError: there is no such length within the budget, or a batch these ranks cannot make.
    """
    grid = BatchGrid(micro_batch_size=micro_batch_size, data_parallel_size=num_ranks)
    for multiple in settings.multiples:
        grid.factor(multiple * batch_size)
    whole = math.lcm(*settings.multiples) * batch_size
    length = settings.branch_samples
    if length is None:
        length = max(math.ceil(DEFAULT_BRANCH_SHARE * budget_samples / whole), 1) * whole
    elif length < 1 or length % whole:
        below = length // whole * whole
        nearest = f"{below} or {below + whole}" if below > 0 else str(whole)
        raise InvalidInputError(
            f"--branch-samples {length} is not a multiple of {whole}, which every branch needs to end at the same "
            f"sample. Nearest: {nearest}."
        )
    if samples + length > budget_samples:
        raise InvalidInputError(
            f"branches of {length} samples from {samples} on go beyond the budget of {budget_samples}: choose an "
            "earlier checkpoint, fewer --branch-samples or a larger --budget-samples."
        )
    return length


def _run_branches(settings: CalibrationSettings, probe: Probe, bar: _Bar) -> CheckpointResult:
    records = {
        multiple: bar.run(_branch_job(settings, probe, multiple)) for multiple in sorted(set(settings.multiples))
    }
    return evaluate(
        checkpoint=str(probe.path),
        description=probe.description,
        records=records,
        tolerance=settings.tolerance,
        price=settings.price,
    )


def _branch_job(settings: CalibrationSettings, probe: Probe, multiple: int) -> Job:
    description, options = probe.description, {**probe.description["job"]}
    saved_ranks = options.pop("num_ranks")
    if settings.coupling:
        options["coupling"] = settings.coupling
    start, batch_size = description["samples_seen"], description["global_batch_size"]
    num_ranks = settings.num_ranks or saved_ranks
    if multiple == 1:
        measuring = [*_measuring(settings, batch_size=batch_size, num_ranks=num_ranks), "--record-readings"]
    else:  # noise and signal are read at the checkpoint's batch only
        measuring = ["--estimators", "split", "--measurement-interval-samples", str(options["budget_samples"])]
        measuring += ["--num-threads", str(settings.num_threads)]
    points = _evaluation_points(settings, probe)
    return Job(
        title=f"{start} samples, batch {multiple * batch_size}",
        output=settings.output / f"branch-{probe.name}-x{multiple}.jsonl",
        arguments=(
            *("--run-id", f"calibrate-x{multiple}"),
            *(part for name, value in options.items() if value is not None for part in _option(name, value)),
            *("--resume-batch-size", str(multiple * batch_size)),
            *("--stop-at-samples", str(start + probe.length)),
            *("--evaluate-at-samples", ",".join(map(str, points))),
            *measuring,
        ),
        num_ranks=num_ranks,
        num_samples=probe.length,
        start_samples=start,
        resume_from=probe.path,
    )


def _option(name: str, value: object) -> tuple[str, str]:
    return f"--{name.replace('_', '-')}", str(value)


def _evaluation_points(settings: CalibrationSettings, probe: Probe) -> list[int]:
    """Evenly over the branch, each where every branch ends a step."""
    whole = math.lcm(*settings.multiples) * probe.description["global_batch_size"]
    num_wholes = probe.length // whole
    count = min(settings.num_evaluations, num_wholes)
    return [probe.description["samples_seen"] + math.ceil(n * num_wholes / count) * whole for n in range(1, count + 1)]


class _Bar:
    """One line for everything and one per job."""

    def __init__(self, progress: Progress, *, num_samples: int) -> None:
        self._progress = progress
        self._total = num_samples
        self._done = 0
        self._whole: TaskID = progress.add_task("all", total=num_samples, state="")

    def extend(self, num_samples: int) -> None:
        self._total += num_samples
        self._progress.update(self._whole, total=self._total)

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Follow a job to its end, unless it has been run; its records."""
        task = self._progress.add_task(job.title, total=job.num_samples, state="")
        records = job.finished_records()
        found = records is not None
        if records is None:
            for samples in job.follow():
                self._progress.update(task, completed=samples)
                self._progress.update(self._whole, completed=self._done + samples)
            records = read_records(job.output)
        self._done += job.num_samples
        losses = [record["validation_loss"] for record in records if record["kind"] == "evaluation"]
        state = f"loss {losses[-1]:.4f}" + (", found" if found else "")
        self._progress.update(task, completed=job.num_samples, state=state)
        self._progress.update(self._whole, completed=self._done)
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{job.title}: {state}", highlight=False)
        return records

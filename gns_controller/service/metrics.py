"""Every Prometheus metric we export, in two tables: what the process counts, and what the runs last reported.

Series of runs are made at scrape time from the live runs, so that they vanish with them. A value that is not finite
is not exported: a gap in a graph says "unknown", NaN breaks the arithmetic of alerts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gns_controller.core.contract import Decision, NoiseScaleMeasurement
from gns_controller.core.errors import StoreError
from gns_controller.core.runs import RunState
from gns_controller.core.statistics import SmoothedNoiseScale

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What /metrics says about one run."""

    run_id: str
    state: RunState
    budget_samples: int
    smoothed: SmoothedNoiseScale | None
    """What the policy follows, kept over reports without readings."""
    learning_rate_factor: float
    global_batch_size: int
    measurement: NoiseScaleMeasurement | None
    decision: Decision | None
    last_report_timestamp_seconds: float | None
    policy_revision: int
    override_active: bool
    advised_data_parallel_size: int
    steps_saved: int | None
    seconds_saved: float | None
    steps_left: int | None


class LiveRuns(NamedTuple):
    """The runs worth series, and how many runs are in each state."""

    runs: list[LiveRun]
    states: dict[RunState, int]


class _RunMetric(NamedTuple):
    name: str
    help: str
    value: Callable[[LiveRun], float | None]


def _of_measurement(read: Callable[[NoiseScaleMeasurement], float | None]) -> Callable[[LiveRun], float | None]:
    return lambda run: None if run.measurement is None else read(run.measurement)


def _of_decision(read: Callable[[Decision], float | None]) -> Callable[[LiveRun], float | None]:
    return lambda run: None if run.decision is None else read(run.decision)


RUN_METRICS = (
    _RunMetric(
        "gns_global_batch_size_samples",
        "Samples per optimizer step in force, as last reported; before a report, as planned.",
        lambda run: run.global_batch_size,
    ),
    _RunMetric(
        "gns_learning_rate_factor",
        "Factor of the plan on the scheduled base learning rate.",
        lambda run: run.learning_rate_factor,
    ),
    _RunMetric("gns_loss", "Mean training loss since the report before.", _of_measurement(lambda m: m.loss)),
    _RunMetric("gns_validation_loss", "Last validation loss.", _of_measurement(lambda m: m.validation_loss)),
    _RunMetric(
        "gns_run_optimizer_step", "Optimizer steps completed.", _of_measurement(lambda m: float(m.optimizer_step))
    ),
    _RunMetric("gns_run_samples_seen", "Samples consumed.", _of_measurement(lambda m: float(m.samples_seen))),
    _RunMetric("gns_run_budget_samples", "Samples after which the run ends.", lambda run: run.budget_samples),
    _RunMetric("gns_step_seconds", "Median time of an unmeasured step.", _of_measurement(lambda m: m.step_seconds)),
    _RunMetric(
        "gns_measurement_seconds",
        "What the last measured step cost beyond an unmeasured one.",
        _of_measurement(lambda m: m.measurement_seconds),
    ),
    _RunMetric(
        "gns_samples_per_second", "Training throughput, all ranks.", _of_measurement(lambda m: m.samples_per_second)
    ),
    _RunMetric(
        "gns_run_last_report_timestamp_seconds",
        "When the run last reported, in seconds since 1970.",
        lambda run: run.last_report_timestamp_seconds,
    ),
    _RunMetric("gns_run_silent", "1 while reports are overdue.", lambda run: float(run.state == "silent")),
    _RunMetric(
        "gns_policy_revision", "Operator commands so far: policies and overrides.", lambda run: run.policy_revision
    ),
    _RunMetric("gns_override_active", "1 while an operator pins or holds.", lambda run: float(run.override_active)),
    _RunMetric(
        "gns_advised_data_parallel_size",
        "The most ranks that the planned batch keeps busy with whole micro-batches.",
        lambda run: run.advised_data_parallel_size,
    ),
    _RunMetric(
        "gns_optimizer_steps_saved",
        "Steps of the constant batch of the start for the same samples, less the steps taken.",
        lambda run: run.steps_saved,
    ),
    _RunMetric(
        "gns_seconds_saved",
        "Time of those steps at the batch of the start, less the time of the steps taken; measuring left out.",
        lambda run: run.seconds_saved,
    ),
    _RunMetric(
        "gns_projected_steps_left",
        "Optimizer steps to the end of the budget, if everything measured stays as it is.",
        lambda run: run.steps_left,
    ),
)
"""One series per run: {run_id}."""

READING_METRICS = (
    _RunMetric(
        "gns_noise_scale_samples",
        "Smoothed noise scale: noise_sq over signal_sq.",
        _of_decision(lambda decision: decision.noise_scale),
    ),
    _RunMetric(
        "gns_noise_scale_low_samples",
        "Lower end of the noise scale, two standard errors of the averages of noise and signal away.",
        _of_decision(lambda decision: decision.noise_scale_low),
    ),
    _RunMetric(
        "gns_noise_scale_high_samples",
        "Upper end of the noise scale; missing while there is none.",
        _of_decision(lambda decision: decision.noise_scale_high),
    ),
    _RunMetric(
        "gns_noise_scale_ceiling_samples",
        "The largest noise scale that the estimator can read now.",
        _of_decision(lambda decision: decision.ceiling_samples),
    ),
    _RunMetric(
        "gns_resolution_ratio",
        "Noise scale over its ceiling.",
        _of_decision(lambda decision: decision.resolution),
    ),
    _RunMetric(
        "gns_unresolved",
        "1 while the noise scale cannot be told from pure noise.",
        _of_decision(lambda decision: float(decision.unresolved)),
    ),
)
"""One series per run and followed reading: {run_id, geometry, estimator}."""


class Metrics:
    """What the process counts. One object per registry.

    Args:
        registry: where everything is registered; /metrics prints it.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.measurements = Counter("gns_measurements_total", "Measurements stored.", registry=registry)
        self.duplicates = Counter(
            "gns_measurements_duplicate_total", "Measurements that were already stored.", registry=registry
        )
        self.rejected = Counter(
            "gns_measurements_rejected_total",
            "Requests with measurements that were refused, by problem.",
            ["reason"],
            registry=registry,
        )
        self.not_finite = Counter(
            "gns_measurements_not_finite_total",
            "Measurements stored with a reading that is NaN, infinite or too large to average.",
            registry=registry,
        )
        self.decisions = Counter("gns_decisions_total", "Decisions, by reason.", ["reason"], registry=registry)
        self.decision_seconds = Histogram(
            "gns_decision_duration_seconds",
            "Time of one policy step.",
            buckets=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1),
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "gns_store_commit_duration_seconds",
            "Time of one transaction, commit included.",
            buckets=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10),
            registry=registry,
        )
        self.commit_jobs = Histogram(
            "gns_store_batch_size_jobs",
            "Writes that shared one transaction.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self.queued_jobs = Gauge("gns_store_queue_jobs", "Writes that wait.", registry=registry)
        self.http_seconds = Histogram(
            "gns_http_request_duration_seconds",
            "Time from request to the end of the answer; event streams and long polls included.",
            ["route", "method", "status"],
            buckets=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10, 30),
            registry=registry,
        )
        self.event_streams = Gauge("gns_event_streams", "Event streams open.", registry=registry)

    def observe_commit(self, seconds: float, jobs: int) -> None:
        """Told by the store after each commit."""
        self.commit_seconds.observe(seconds)
        self.commit_jobs.observe(jobs)

    def watch(self, live_runs: Callable[[], LiveRuns], *, num_queued: Callable[[], int]) -> None:
        """Export runs and the length of the write queue, asked for at every scrape."""
        self.queued_jobs.set_function(num_queued)
        self.registry.register(_RunCollector(live_runs))


class _RunCollector(Collector):
    def __init__(self, live_runs: Callable[[], LiveRuns]) -> None:
        self._live_runs = live_runs

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not ask for the runs."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        try:
            runs, states = self._live_runs()
        except StoreError:  # the other metrics say more about an outage than a failed scrape would
            logger.warning("runs left out of metrics: the store cannot be read")
            return
        for metric in RUN_METRICS:
            family = GaugeMetricFamily(metric.name, metric.help, labels=("run_id",))
            for run in runs:
                _add(family, (run.run_id,), metric.value(run))
            yield family
        for metric in READING_METRICS:
            family = GaugeMetricFamily(metric.name, metric.help, labels=("run_id", "geometry", "estimator"))
            for run in runs:
                if run.smoothed is not None:
                    labels = (run.run_id, run.smoothed.geometry, run.smoothed.estimator)
                    _add(family, labels, metric.value(run))
            yield family
        family = GaugeMetricFamily("gns_runs", "Recent runs, by state.", labels=("state",))
        for state, count in states.items():
            family.add_metric((state,), count)
        yield family


def _add(family: GaugeMetricFamily, labels: tuple[str, ...], value: float | None) -> None:
    if value is not None and math.isfinite(value):
        family.add_metric(labels, value)

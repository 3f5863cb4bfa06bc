"""A pretraining run that exists only on the wire: it registers, reports, and obeys the plans it is sent.

Noise and signal follow a noise scale that grows with progress, as runs on text do; the split estimator's signal is
seen through noise that shrinks with the batch. Seeded, so pictures and tests repeat.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import BatchPlan, GroupReading, NoiseScaleMeasurement, ParameterGroup, Span
from gns_controller.core.policies import AnyPolicyConfig, HoldPolicyConfig, NoiseScalePolicyConfig
from gns_controller.core.runs import IngestReply, Registration, RegistrationReply, RunSpecification

STEPS_BETWEEN_REPORTS = 25
REPORTS_PER_REQUEST = 20
"""Batches keep the fixture quick; a plan then reaches the trainer this many reports late at most."""


def specification(**changes: Any) -> RunSpecification:
    """Llama-160M on two groups, as the guides use it."""
    groups = (
        ParameterGroup(
            name="matrices", geometry="spectral", optimizer="Muon", num_tensors=84, num_parameters=84_934_656
        ),
        ParameterGroup(name="rest", geometry="sign", optimizer="AdamW", num_tensors=27, num_parameters=77_207_808),
    )
    policy = NoiseScalePolicyConfig(
        noise_tolerance=1.0,
        warmup=Span(samples=40_000),
        dwell=Span(samples=30_000),
        growth_cap=2.0,
        maximum_batch_size=4096,
    )
    return RunSpecification(
        **{
            "batch": BatchRules(global_batch_size=128, micro_batch_size=8),
            "data_parallel_size": 8,
            "budget_samples": 3_200_000,
            "tokens_per_sample": 2048,
            "optimizer": "Muon + AdamW",
            "parameter_groups": groups,
            "measurement_interval": Span(steps=STEPS_BETWEEN_REPORTS),
            "policy": policy,
            **changes,
        }
    )


def holding(**changes: Any) -> RunSpecification:
    """A run whose batch stays, whatever is measured."""
    policy: AnyPolicyConfig = HoldPolicyConfig()
    return specification(**{"policy": policy, **changes})


@dataclass
class WireRun:
    """One incarnation of a run and how far it has come."""

    client: httpx.Client
    run_id: str
    specification: RunSpecification = field(default_factory=specification)
    seed: int = 7
    plan: BatchPlan = field(init=False)
    attempt: int = 0
    optimizer_step: int = 0
    samples_seen: int = 0
    num_reports: int = 0
    last: list[NoiseScaleMeasurement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def register(self) -> WireRun:
        """Announce the run and take over its first plan."""
        registration = Registration(
            specification=self.specification,
            incarnation=f"incarnation-{self.seed:08d}",
            resume_step=self.optimizer_step,
        )
        response = self.client.put(f"/api/v1/runs/{self.run_id}", content=registration.model_dump_json(), headers=_JSON)
        assert response.is_success, response.text
        reply = RegistrationReply.model_validate_json(response.content)
        self.plan, self.attempt = reply.plan, reply.attempt
        return self

    def report(self, count: int = 1, **changes: Any) -> IngestReply:
        """Train and report `count` times; `changes` replaces fields of the measurements."""
        reply: IngestReply | None = None
        while count > 0:
            batch = [self._next(changes) for _ in range(min(count, REPORTS_PER_REQUEST))]
            count -= len(batch)
            reply = self._send(batch)
            if self.specification.mode == "active":
                self.plan = reply.plan
        assert reply is not None
        return reply

    def repeat(self) -> IngestReply:
        """Send the last report again, as a trainer does that missed the answer."""
        return self._send(self.last)

    def train_until(self, share: float) -> None:
        """Report until this share of the budget is used."""
        while self.samples_seen < share * self.specification.budget_samples:
            self.report()

    def _send(self, batch: list[NoiseScaleMeasurement]) -> IngestReply:
        self.last = batch
        body = '{"measurements":[' + ",".join(measurement.model_dump_json() for measurement in batch) + "]}"
        response = self.client.post(f"/api/v1/runs/{self.run_id}/measurements", content=body, headers=_JSON)
        assert response.is_success, response.text
        return IngestReply.model_validate_json(response.content)

    def _next(self, changes: dict[str, Any]) -> NoiseScaleMeasurement:
        self.num_reports += 1
        self.optimizer_step += STEPS_BETWEEN_REPORTS
        self.samples_seen += STEPS_BETWEEN_REPORTS * self.plan.global_batch_size
        progress = self.samples_seen / self.specification.budget_samples
        batch, noise_scale = self.plan.global_batch_size, 60 + 2400 * progress**0.8
        loss = 3.02 + 5.6 * math.exp(-progress * 55) + 1.35 * (progress + 0.012) ** -0.12 - 1.35
        wobble = self.random.gauss
        measurement = NoiseScaleMeasurement(
            run_id=self.run_id,
            attempt=self.attempt,
            optimizer_step=self.optimizer_step,
            samples_seen=self.samples_seen,
            plan_version=self.plan.version,
            global_batch_size=batch,
            micro_batch_size=self.plan.micro_batch_size,
            gradient_accumulation_steps=self.plan.gradient_accumulation_steps,
            data_parallel_size=self.specification.data_parallel_size,
            schedule_factor=max(0.1, 1 - progress),
            step_seconds=0.11 + batch / 2400 * (1 + 0.02 * wobble(0, 1)),
            samples_per_second=batch / (0.11 + batch / 2400),
            loss=loss + wobble(0, 0.22) / math.sqrt(batch / 16),
            validation_loss=loss + 0.03 if self.num_reports % 24 == 0 else None,
            readings=(
                self.reading("matrices", "spectral", noise_scale),
                self.reading("rest", "sign", 0.6 * noise_scale),
            ),
        )
        return NoiseScaleMeasurement.model_validate({**measurement.model_dump(), **changes})

    def reading(self, group: str, geometry: Any, noise_scale: float) -> GroupReading:
        """One measurement of a group by the split estimator, at this true noise scale."""
        batch = self.plan.global_batch_size
        noise_sq = 40.0 * (1 + self.random.gauss(0, 0.03))
        signal_sq = noise_sq / noise_scale
        seen = signal_sq + self.random.gauss(0, 1.1) * noise_sq / batch
        norm = math.sqrt(signal_sq + noise_sq / batch)
        return GroupReading(
            group=group,
            geometry=geometry,
            estimator="split",
            noise=math.sqrt(noise_sq),
            signal=norm,
            progress=seen / norm,
            num_sign_patterns=4,
            noise_standard_error=0.015 * math.sqrt(noise_sq),
            progress_standard_error=1.1 * noise_sq / batch / norm,
            num_groups=8,
            samples_per_group=batch / 8,
            learning_rate=0.02 * self.plan.learning_rate_factor,
        )


_JSON = {"Content-Type": "application/json"}

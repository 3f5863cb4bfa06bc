"""Grow the batch as the gradient gets noisier: the published rule, on either estimator.

    batch = kappa * noise_scale / theta^2        kappa = 1 (rank_variance), pi / 2 (split)

kappa keeps theta's meaning for the l1 norm: pure-noise plug-in readings and debiased ones differ by pi / 2 there.
Source: arXiv:2602.03001 algorithm 1. Ours: signed averages, hold while unresolved, lengths in samples, growth cap.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from gns_controller.core.contract import NoiseScaleMeasurement, PositiveCount, Reason, Span
from gns_controller.core.policies.fold import PolicyConfig, PolicyState, Proposal
from gns_controller.core.smoothing import MIN_SPREAD_MEASUREMENTS, Judgement

KAPPA = {"rank_variance": 1.0, "split": math.pi / 2}


class NoiseScalePolicyConfig(PolicyConfig):
    """Batch = kappa * noise_scale / theta^2, floored to a reachable batch."""

    policy: Literal["noise_scale"] = "noise_scale"
    noise_tolerance: Annotated[float, Field(gt=0, le=100)] = 0.6
    """theta. Smaller means larger batches. Calibrate it again for another estimator or geometry."""
    warmup: Span | None = None
    """Measured but not acted on; usually as long as the learning-rate warmup."""
    dwell: Span | None = None
    """Least distance between two batch changes."""
    monotone: bool = True
    """Never shrink the batch."""
    maximum_batch_size: PositiveCount | None = None
    """Never grow beyond this many samples."""
    growth_cap: Annotated[float, Field(gt=1)] | None = 4.0
    """Largest factor of one growth; None: whatever the rule asks for."""
    act_on_unresolved: bool = False
    """Follow readings that their own resolution calls unresolved. The published rule does; see `published`."""

    @classmethod
    def published(cls, **changes: Any) -> Self:
        """Algorithm 1 as printed: rank_variance, theta 0.6, no caps, acting on saturated readings too."""
        return cls(**{"estimator": "rank_variance", "growth_cap": None, "act_on_unresolved": True, **changes})


def propose(
    config: NoiseScalePolicyConfig, state: PolicyState, measurement: NoiseScaleMeasurement, judged: Judgement
) -> Proposal:
    """What the rule asks for at this measurement, and which guard spoke first."""
    smoothed, current = state.smoothed, state.plan.global_batch_size
    if smoothed is None:
        return Proposal(None, "hold_no_reading", f"no {config.estimator} reading yet.")
    noise_scale = judged.noise_scale
    kappa = KAPPA[config.estimator]
    requested = None if noise_scale is None else kappa * noise_scale / config.noise_tolerance**2
    if config.warmup and not config.warmup.passed(steps=measurement.optimizer_step, samples=measurement.samples_seen):
        return Proposal(None, "warmup", "warming up, measured but not acted on.", requested)
    if requested is None or noise_scale is None or (judged.unresolved and not config.act_on_unresolved):
        return Proposal(None, "hold_unresolved", _unresolved_clause(state), requested)

    whose = f" of {smoothed.group}" if config.aggregation == "max" else ""
    rule = f"noise scale {noise_scale:.4g}{whose} * {kappa:.4g} / {config.noise_tolerance:g}^2 asks for {requested:.4g}"
    if requested < current and config.monotone:
        return Proposal(None, "hold_monotone", f"{rule}, and this run never shrinks.", requested)
    if config.dwell and not config.dwell.passed(
        steps=measurement.optimizer_step - state.changed_at_step,
        samples=measurement.samples_seen - state.changed_at_samples,
    ):
        return Proposal(None, "hold_dwell", f"{rule}, too soon after the last change.", requested)
    batch_size = requested
    reason: Reason = "grow" if requested >= current else "shrink"
    because = f"{rule}."
    if config.growth_cap and batch_size > config.growth_cap * current:
        batch_size, reason = config.growth_cap * current, "capped_growth"
        because = f"{rule}, capped at {config.growth_cap:g} times the present batch."
    if config.maximum_batch_size is not None and batch_size > config.maximum_batch_size:
        if current >= config.maximum_batch_size:
            return Proposal(None, "capped_max", f"{rule}, and the maximum is reached.", requested)
        batch_size, reason = float(config.maximum_batch_size), "capped_max"
        because = f"{rule}, capped at the maximum of {config.maximum_batch_size}."
    return Proposal(batch_size, reason, because, requested)


def _unresolved_clause(state: PolicyState) -> str:
    smoothed = state.smoothed
    if smoothed is None or smoothed.estimator == "rank_variance":
        return "the reading sits at its pure-noise ceiling: the noise scale is at least about this batch."
    signal = smoothed.signal_sq
    if signal.count < MIN_SPREAD_MEASUREMENTS:
        return f"{signal.count} of the {MIN_SPREAD_MEASUREMENTS} measurements that a standard error needs."
    return (
        f"signal {signal.mean:.3g} +- {signal.standard_error:.2g} after {signal.count} measurements "
        "cannot be told from noise."
    )

"""Measurements for tests."""

from __future__ import annotations

from typing import Any

from gns_controller.core.contract import GroupReading, NoiseScaleMeasurement


def reading(
    *, noise_scale: float, estimator: str = "rank_variance", ceiling: float | None = 1e6, **changes: Any
) -> GroupReading:
    """Signal 1, so that noise_sq is the noise scale."""
    fields: dict[str, Any] = {
        "group": "matrices",
        "geometry": "spectral",
        "estimator": estimator,
        "noise": noise_scale**0.5 if noise_scale >= 0 else 1.0,
        "signal": 1.0,
        "progress": 1.0 if estimator == "split" else None,
        "ceiling_samples": ceiling if estimator == "rank_variance" else None,
        "num_groups": 4,
        "samples_per_group": 4,
        "learning_rate": 0.01,
    }
    return GroupReading(**{**fields, **changes})


def measurement(
    step: int, *readings: GroupReading, batch: int = 16, ranks: int = 2, samples: int | None = None, **changes: Any
) -> NoiseScaleMeasurement:
    """One report of a run on two ranks."""
    fields: dict[str, Any] = {
        "run_id": "run",
        "attempt": 0,
        "optimizer_step": step,
        "samples_seen": samples if samples is not None else 16 * step,
        "plan_version": 0,
        "global_batch_size": batch,
        "micro_batch_size": max(batch // ranks, 1),
        "gradient_accumulation_steps": 1,
        "data_parallel_size": ranks,
        "readings": readings,
    }
    return NoiseScaleMeasurement(**{**fields, **changes})

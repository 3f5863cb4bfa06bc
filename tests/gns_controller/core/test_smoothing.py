from __future__ import annotations

import math

import numpy as np
import pytest

from gns_controller.core.smoothing import SignedAverage, SmoothedNoiseScale
from tests.gns_controller.core.measurements import reading


def test_the_average_is_the_weighted_mean_it_claims_to_be() -> None:
    values, beta = [4.0, -1.0, 2.5, 7.0], 0.9
    average = SignedAverage(mean=values[0])
    for value in values[1:]:
        average = average.updated(value, beta=beta)
    weights = [beta**3, (1 - beta) * beta**2, (1 - beta) * beta, 1 - beta]
    mean = np.average(values, weights=weights)
    assert average.mean == pytest.approx(mean)
    assert average.sum_weights_sq == pytest.approx(sum(w * w for w in weights))
    assert average.spread == pytest.approx(np.average((np.array(values) - mean) ** 2, weights=weights))


def test_the_standard_error_is_that_of_repeated_averages() -> None:
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        average = SignedAverage(mean=rng.normal())
        for value in rng.normal(size=60):
            average = average.updated(value, beta=0.9)
        means.append(average.mean)
        errors.append(average.standard_error**2)
    # Spread of 2000 sample variances: relative standard error 1/sqrt(1000) = 3.2 %.
    assert np.mean(errors) == pytest.approx(np.var(means), rel=0.13)


def test_the_ratio_is_taken_after_averaging() -> None:
    rng = np.random.default_rng(1)
    smoothed = SmoothedNoiseScale.started_by(reading(noise_scale=1.0, signal=1.0))
    for _ in range(4000):
        signal = math.sqrt(rng.gamma(4.0, 0.25))
        smoothed = smoothed.updated(reading(noise_scale=1.0, signal=signal), noise_beta=0.999, signal_beta=0.999)
    assert smoothed.noise_scale == pytest.approx(1.0, rel=0.05)


def test_a_signal_that_averages_below_zero_has_no_noise_scale_and_is_unresolved() -> None:
    smoothed = SmoothedNoiseScale.started_by(reading(noise_scale=4.0, estimator="split", progress=1.0))
    for progress in (-1.0, -2.0, 0.5, -1.5, -0.5):
        smoothed = smoothed.updated(
            reading(noise_scale=4.0, estimator="split", progress=progress), noise_beta=0.5, signal_beta=0.5
        )
    assert smoothed.signal_sq.mean < 0
    assert smoothed.noise_scale is None
    assert smoothed.unresolved


def test_a_split_reading_is_resolved_once_its_signal_exceeds_two_standard_errors() -> None:
    rng = np.random.default_rng(2)
    for centre, expected in ((3.0, False), (0.0, True)):
        smoothed = SmoothedNoiseScale.started_by(reading(noise_scale=9.0, estimator="split", progress=centre))
        for noise in rng.normal(size=40):
            smoothed = smoothed.updated(
                reading(noise_scale=9.0, estimator="split", progress=centre + noise), noise_beta=0.9, signal_beta=0.9
            )
        assert smoothed.unresolved is expected
        assert smoothed.ceiling_samples is not None
        if smoothed.resolution is not None:
            assert (smoothed.resolution > 1) is expected


def test_a_published_reading_near_its_pure_noise_value_is_unresolved() -> None:
    assert SmoothedNoiseScale.started_by(reading(noise_scale=75.0, ceiling=100.0)).unresolved
    assert not SmoothedNoiseScale.started_by(reading(noise_scale=65.0, ceiling=100.0)).unresolved

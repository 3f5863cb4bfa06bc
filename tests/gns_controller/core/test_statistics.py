from __future__ import annotations

import math

import numpy as np
import pytest

from gns_controller.core.statistics import Judgement, SignedAverage, SmoothedNoiseScale
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


def grown(values: list[float], *, beta: float) -> SignedAverage:
    average = SignedAverage.started_by(values[0], growing=True)
    for value in values[1:]:
        average = average.updated(value, beta=beta)
    return average


def test_a_growing_average_gives_its_first_value_the_weight_of_polynomial_averaging() -> None:
    # product of (j - 1) / (j + 3) for j = 2..10, telescoped
    assert grown([1.0] + [0.0] * 9, beta=0.999).mean == pytest.approx(24 / (10 * 11 * 12 * 13), rel=1e-12)
    assert grown([0.0] * 9 + [1.0], beta=0.999).mean == pytest.approx(4 / 13, rel=1e-12)


def test_a_growing_average_ends_as_the_exponential_one() -> None:
    beta, values = (
        0.8,
        [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, -5.0, 3.0, 5.0, 8.0, 9.0, 7.0, 9.0, 3.0, 2.0, 3.0, 8.0, 4.0],
    )
    shares = [max(1 - beta, 4 / (n + 3)) for n in range(1, 21)]
    assert shares[15] > 1 - beta >= shares[17] - 1e-15  # both kinds of weight occur
    weights = [share * np.prod([1 - later for later in shares[n + 1 :]]) for n, share in enumerate(shares)]
    average = grown(values, beta=beta)
    assert sum(weights) == pytest.approx(1.0)
    assert average.mean == pytest.approx(np.average(values, weights=weights))
    assert average.sum_weights_sq == pytest.approx(sum(weight**2 for weight in weights))


def test_the_standard_error_of_a_growing_average_is_that_of_repeated_averages() -> None:
    rng = np.random.default_rng(3)
    averages = [grown(list(rng.normal(size=60)), beta=0.93) for _ in range(2000)]
    # Spread of 2000 sample variances: relative standard error 1/sqrt(1000) = 3.2 %.
    assert np.mean([average.standard_error**2 for average in averages]) == pytest.approx(
        np.var([average.mean for average in averages]), rel=0.13
    )


def test_a_falling_signal_is_no_noise_for_a_growing_average_and_most_of_the_error_of_an_exponential_one() -> None:
    rng = np.random.default_rng(4)
    falling = list(1.0 + 100 * np.exp(-np.arange(60) / 5) + 0.1 * rng.normal(size=60))
    growing, exponential = grown(falling, beta=0.96), SignedAverage(mean=falling[0])
    for value in falling[1:]:
        exponential = exponential.updated(value, beta=0.96)
    steady = 0.1 * math.sqrt(growing.sum_weights_sq)  # of values that differ by their noise alone
    assert growing.standard_error < 3 * steady
    assert exponential.standard_error > 30 * steady
    assert exponential.mean - 1 > 50 * (growing.mean - 1)  # both lag behind the signal of 1


def test_the_ratio_is_taken_after_averaging() -> None:
    rng = np.random.default_rng(1)
    smoothed = SmoothedNoiseScale.started_by(reading(noise_scale=1.0, signal=1.0))
    for _ in range(4000):
        signal = math.sqrt(rng.gamma(4.0, 0.25))
        smoothed = smoothed.updated(reading(noise_scale=1.0, signal=signal), noise_beta=0.999, signal_beta=0.999)
    assert smoothed.judged().noise_scale == pytest.approx(1.0, rel=0.05)


def test_a_signal_that_averages_below_zero_has_no_noise_scale_and_is_unresolved() -> None:
    smoothed = SmoothedNoiseScale.started_by(reading(noise_scale=4.0, estimator="split", progress=1.0))
    for progress in (-1.0, -2.0, 0.5, -1.5, -0.5):
        smoothed = smoothed.updated(
            reading(noise_scale=4.0, estimator="split", progress=progress), noise_beta=0.5, signal_beta=0.5
        )
    assert smoothed.signal_sq.mean < 0
    assert smoothed.judged().noise_scale is None
    assert smoothed.judged().unresolved


def test_a_split_reading_is_resolved_once_its_signal_exceeds_two_standard_errors() -> None:
    rng = np.random.default_rng(2)
    for centre, expected in ((3.0, False), (0.0, True)):
        smoothed = SmoothedNoiseScale.started_by(reading(noise_scale=9.0, estimator="split", progress=centre))
        for noise in rng.normal(size=40):
            smoothed = smoothed.updated(
                reading(noise_scale=9.0, estimator="split", progress=centre + noise), noise_beta=0.9, signal_beta=0.9
            )
        judged = smoothed.judged()
        assert judged.unresolved is expected
        assert judged.ceiling_samples is not None
        if judged.resolution is not None:
            assert (judged.resolution > 1) is expected


def test_a_published_reading_near_its_pure_noise_value_is_unresolved() -> None:
    assert SmoothedNoiseScale.started_by(reading(noise_scale=75.0, ceiling=100.0)).judged().unresolved
    assert not SmoothedNoiseScale.started_by(reading(noise_scale=65.0, ceiling=100.0)).judged().unresolved


def judged_from(*, signal: float, estimator: str = "split", count: int = 9) -> Judgement:
    """noise_sq 100 +- 2, signal_sq `signal` +- 1: spread s and sum of squared weights 1/2 give sqrt(s)."""
    return SmoothedNoiseScale(
        group="matrices",
        geometry="spectral",
        estimator=estimator,  # type: ignore[arg-type]
        noise_sq=SignedAverage(mean=100.0, spread=4.0, sum_weights_sq=0.5, count=count),
        signal_sq=SignedAverage(mean=signal, spread=1.0, sum_weights_sq=0.5, count=count),
        pure_noise_samples=40.0,
    ).judged()


@pytest.mark.parametrize("estimator", ["split", "rank_variance"])
def test_the_interval_goes_two_standard_errors_of_both_averages_either_way(estimator: str) -> None:
    judged = judged_from(signal=10.0, estimator=estimator)
    assert judged.noise_scale == pytest.approx(10.0)
    assert judged.low == pytest.approx((100 - 4) / (10 + 2))
    assert judged.high == pytest.approx((100 + 4) / (10 - 2))


def test_a_signal_within_two_standard_errors_of_zero_has_no_upper_end() -> None:
    at_two = judged_from(signal=2.0)
    assert at_two.low == pytest.approx(96 / 4)
    assert at_two.high is None
    negative = judged_from(signal=-1.0)
    assert negative.noise_scale is None
    assert negative.low == pytest.approx(96.0)
    assert negative.high is None
    hopeless = judged_from(signal=-2.0)
    assert (hopeless.low, hopeless.high) == (None, None)


def test_there_is_no_interval_before_a_spread_can_be_trusted() -> None:
    assert judged_from(signal=10.0, count=4)[1:3] == (None, None)
    without_memory = SmoothedNoiseScale.started_by(reading(noise_scale=4.0, estimator="split"))
    for _ in range(6):
        without_memory = without_memory.updated(
            reading(noise_scale=4.0, estimator="split"), noise_beta=0.9, signal_beta=0.0
        )
    assert without_memory.judged()[1:3] == (None, None)


def test_the_interval_holds_the_true_noise_scale_nearly_always() -> None:
    rng = np.random.default_rng(5)
    held = []
    for _ in range(400):
        smoothed = None
        for noise, signal in zip(rng.normal(9, 1, 40), rng.normal(1, 0.3, 40), strict=True):
            one = reading(noise_scale=noise, estimator="split", progress=signal)
            smoothed = (
                smoothed.updated(one, noise_beta=0.9, signal_beta=0.9)
                if smoothed
                else SmoothedNoiseScale.started_by(one)
            )
        assert smoothed is not None
        judged = smoothed.judged()
        assert judged.low is not None
        held.append(judged.low <= 9 and (judged.high is None or judged.high >= 9))
    # Two errors added where they would add in quadrature: at least the 95 % of two standard errors. About nine
    # effective measurements estimate those, which costs a few per cent again.
    assert np.mean(held) > 0.93

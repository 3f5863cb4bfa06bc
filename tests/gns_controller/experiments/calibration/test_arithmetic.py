"""Merrill's rule, theta, price and averages against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Estimator
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig, NoiseScalePolicyConfig, RunFacts, decide, initial_state
from gns_controller.experiments.calibration.arithmetic import (
    averaged,
    critical_batch,
    critical_multiple,
    growth_price,
    noise_tolerance,
    smoothed_loss,
    table_policy,
)
from tests.gns_controller.core.measurements import measurement, reading


@pytest.mark.parametrize(
    ("losses", "multiple"),
    [
        ({1: 2.000, 2: 2.005, 4: 2.009, 8: 2.020}, 4),  # 8 loses 0.020 against 1
        ({1: 2.000, 2: 1.980, 4: 1.995, 8: 2.000}, 2),  # 4 loses 0.015 against 2, though it beats 1
        ({1: 2.000, 2: 1.980, 4: 1.995, 8: 1.989}, 8),  # 8 passes where 4 fails
        ({1: 2.000, 2: 2.011, 4: 2.011}, 1),
        ({1: 2.000, 2: math.nan, 4: 2.001, 8: math.inf}, 4),  # diverged branches are no rivals
        ({8: 2.020, 4: 2.009, 2: 2.005, 1: 2.000}, 4),  # in any order
    ],
)
def test_the_critical_multiple_is_the_largest_that_loses_nothing_against_a_smaller_one(
    losses: dict[int, float], multiple: int
) -> None:
    assert critical_multiple(losses, tolerance=0.01) == multiple


def test_losses_as_large_as_the_tolerance_still_pass() -> None:
    assert critical_multiple({1: 2.0, 2: 2.25}, tolerance=0.25) == 2  # exact in binary


def test_a_critical_batch_says_from_which_side_it_is_known() -> None:
    inside = critical_batch({1: 2.0, 2: 2.0, 4: 2.5, 8: 2.6}, global_batch_size=16, tolerance=0.01)
    assert (inside.critical_batch_size, inside.next_batch_size) == (32, 64)
    assert not inside.is_at_least
    assert not inside.is_at_most
    largest = critical_batch({1: 2.0, 2: 2.0}, global_batch_size=16, tolerance=0.01)
    assert (largest.critical_batch_size, largest.next_batch_size, largest.is_at_least) == (32, None, True)
    smallest = critical_batch({1: 2.0, 2: 2.1}, global_batch_size=16, tolerance=0.01)
    assert (smallest.critical_batch_size, smallest.next_batch_size, smallest.is_at_most) == (16, 32, True)


@pytest.mark.parametrize("losses", [{}, {1: math.nan, 2: 2.0}])
def test_without_a_sound_first_branch_there_is_nothing_to_compare(losses: dict[int, float]) -> None:
    with pytest.raises(InvalidInputError):
        critical_multiple(losses, tolerance=0.01)


def test_half_of_the_newest_loss_and_half_of_the_average_before() -> None:
    assert smoothed_loss([4.0, 2.0, 1.0]) == 2.0  # 4, 3, 2
    assert smoothed_loss([4.0, 2.0, 1.0], alpha=1.0) == 1.0
    assert smoothed_loss([3.5]) == 3.5
    assert math.isnan(smoothed_loss([4.0, math.nan, 1.0]))
    with pytest.raises(InvalidInputError, match="without evaluations"):
        smoothed_loss([])


@pytest.mark.parametrize(
    ("estimator", "noise_scale", "critical", "theta"),
    [("rank_variance", 72.0, 50, 1.2), ("rank_variance", 18.0, 50, 0.6), ("split", 100.0, 50, math.sqrt(math.pi))],
)
def test_theta_maps_the_noise_scale_to_the_critical_batch(
    estimator: Estimator, noise_scale: float, critical: int, theta: float
) -> None:
    found = noise_tolerance(estimator=estimator, noise_scale=noise_scale, critical_batch_size=critical)
    assert found == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize("estimator", ["split", "rank_variance"])
def test_the_policy_with_this_theta_asks_for_the_critical_batch(estimator: Estimator) -> None:
    theta = noise_tolerance(estimator=estimator, noise_scale=300.0, critical_batch_size=96)
    config = NoiseScalePolicyConfig(estimator=estimator, noise_tolerance=theta, act_on_unresolved=True)
    rules = BatchRules(global_batch_size=16, micro_batch_size=8)
    state = initial_state(rules, data_parallel_size=2)
    report = measurement(1, reading(noise_scale=300.0, estimator=estimator))
    _, decision = decide(config, state, report, facts=RunFacts(rules))
    assert decision.requested_batch_size == pytest.approx(96, rel=1e-9)


@pytest.mark.parametrize(("noise_scale", "critical"), [(0.0, 16), (-3.0, 16), (math.inf, 16), (10.0, 0)])
def test_theta_needs_a_positive_noise_scale_and_batch(noise_scale: float, critical: int) -> None:
    with pytest.raises(InvalidInputError, match="must be positive and finite"):
        noise_tolerance(estimator="split", noise_scale=noise_scale, critical_batch_size=critical)


def test_the_price_of_a_saved_step_is_lost_nats_over_saved_steps() -> None:
    price = growth_price(loss=2.0, loss_of_double=2.015, steps=300, steps_of_double=150)
    assert price == pytest.approx(1e-4, rel=1e-9)
    assert growth_price(loss=2.0, loss_of_double=1.97, steps=300, steps_of_double=150) == pytest.approx(-2e-4, rel=1e-9)
    with pytest.raises(InvalidInputError, match="none was saved"):
        growth_price(loss=2.0, loss_of_double=2.0, steps=10, steps_of_double=10)


def test_noise_and_signal_are_averaged_apart_with_equal_weights() -> None:
    pairs = [(4.0, 1.0), (16.0, 3.0), (math.nan, 1.0), (10.0, 2.0)]
    smoothed = averaged(reading(noise_scale=1.0, estimator="split", noise=n**0.5, progress=s) for n, s in pairs)
    assert smoothed is not None
    assert smoothed.signal_sq.count == 3
    assert smoothed.noise_sq.mean == pytest.approx(10.0)
    assert smoothed.judged().noise_scale == pytest.approx(5.0)
    # s = sqrt((36 + 36 + 0) / 2) = 6, over the root of three
    assert smoothed.noise_sq.standard_error == pytest.approx(6 / math.sqrt(3))
    assert averaged([]) is None


def test_the_table_takes_the_lower_median_of_seeds_in_order_of_samples() -> None:
    document = table_policy([(100, 16), (50, 8), (100, 64), (100, 32), (50, 32)])
    assert document == {
        "policy": "critical_batch_table",
        "table": [
            {"from_samples": 50, "critical_batch_size": 8},
            {"from_samples": 100, "critical_batch_size": 32},
        ],
    }
    assert TypeAdapter(AnyPolicyConfig).validate_python(document).policy == "critical_batch_table"

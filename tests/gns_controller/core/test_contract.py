from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from gns_controller.core.contract import Decision, GroupReading, NoiseScaleMeasurement, ProgressPoint
from gns_controller.core.policies import PolicyState, decide
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from gns_controller.core.statistics import c4, corrected_for_few_groups, few_groups_factor
from tests.gns_controller.core.measurements import reading

BEFORE: dict[str, Any] = json.loads((Path(__file__).parent / "recorded_before_intervals.json").read_text())
"""Written when readings had no direction, sign patterns or standard errors, and decisions no interval."""


def split(**changes: Any) -> GroupReading:
    """noise_sq 36, signal_sq 4 * 3 = 12, standard error of signal_sq 4 * 0.5 = 2."""
    fields = {"signal": 4.0, "progress": 3.0, "num_sign_patterns": 3, "progress_standard_error": 0.5, **changes}
    return reading(noise_scale=36.0, estimator="split", **fields)


@pytest.mark.parametrize("estimator", BEFORE)
def test_what_was_stored_before_still_loads_and_replays_bit_for_bit(estimator: str) -> None:
    stored = BEFORE[estimator]
    measurements = [NoiseScaleMeasurement.model_validate_json(json.dumps(one)) for one in stored["measurements"]]
    specification = RunSpecification.model_validate_json(json.dumps(stored["specification"]))
    assert {one.direction for measurement in measurements for one in measurement.readings} == {"gradient"}
    for decision, old in zip(replay(specification, measurements), stored["decisions"], strict=True):
        assert Decision.model_validate_json(json.dumps(old)).noise_scale_low is None
        now = decision.model_copy(update={"noise_scale_low": None, "noise_scale_high": None})
        assert now == Decision.model_validate_json(json.dumps(old))


@pytest.mark.parametrize("estimator", BEFORE)
def test_a_fold_goes_on_from_a_state_that_was_stored_before(estimator: str) -> None:
    stored = BEFORE[estimator]
    state = PolicyState.model_validate_json(json.dumps(stored["state"]))
    specification = RunSpecification.model_validate_json(json.dumps(stored["specification"]))
    measurement = NoiseScaleMeasurement.model_validate_json(json.dumps(stored["measurements"][-1]))
    after, decision = decide(specification.policy, state, measurement, facts=specification.facts)
    assert after.smoothed is not None
    assert after.smoothed.noise_sq.count == len(stored["measurements"]) + 1
    assert decision.noise_scale_low is not None
    assert PolicyState.model_validate_json(after.model_dump_json()) == after


@pytest.mark.parametrize(
    ("num_groups", "squared"), [(2, 2 / math.pi), (3, math.pi / 4), (4, 8 / (3 * math.pi)), (64, 0.992)]
)
def test_c4_is_the_mean_of_a_sample_standard_deviation(num_groups: int, squared: float) -> None:
    # 2 and 4 groups: half-normal and Maxwell means; 3: Rayleigh; 64: the published table, to its three digits.
    assert c4(num_groups - 1) ** 2 == pytest.approx(squared, rel=1e-12 if num_groups < 64 else 5e-4)


@pytest.mark.parametrize("num_groups", [2, 4, 8])
def test_corrected_noise_is_the_same_from_any_number_of_groups(num_groups: int) -> None:
    dims, sigma = 200_000, 0.7
    groups = np.random.default_rng(num_groups).normal(0, sigma, (num_groups, dims))
    noise = float(np.sqrt(groups.var(axis=0, ddof=1)).sum())
    one = reading(noise_scale=1.0, geometry="sign", noise=noise, num_groups=num_groups)
    # Relative sd of a root of a variance is at most 0.76 (K = 2): of the mean of 200,000, 0.17 %; of its square twice.
    corrected = corrected_for_few_groups(one)
    assert corrected.noise_sq == pytest.approx((dims * sigma) ** 2, rel=0.012)
    assert one.noise_sq < 0.97 * corrected.noise_sq


def test_only_rank_variance_in_the_sign_geometry_is_corrected() -> None:
    for one in (reading(noise_scale=5.0), reading(noise_scale=5.0, estimator="split", geometry="sign")):
        assert few_groups_factor(one) == 1
        assert corrected_for_few_groups(one) is one


def test_a_correction_for_few_groups_leaves_the_resolution_alone() -> None:
    plain = reading(noise_scale=8.0, geometry="sign", ceiling=32.0, num_groups=2)
    corrected = corrected_for_few_groups(plain)
    assert corrected.noise_sq == pytest.approx(plain.noise_sq / few_groups_factor(plain))
    assert corrected.noise_sq == pytest.approx(8 * math.pi / 2)
    assert corrected.ceiling == pytest.approx(32 * math.pi / 2)
    assert corrected.resolution == pytest.approx(0.25)
    assert plain.resolution == pytest.approx(0.25)


def test_a_split_reading_with_sign_patterns_knows_its_own_ceiling() -> None:
    one = split()
    assert one.signal_sq_standard_error == 2.0
    assert one.noise_scale == 3.0
    assert one.ceiling == 9.0  # 36 / (2 * 2)
    assert one.resolution == pytest.approx(1 / 3)
    assert not one.unresolved


def test_a_split_reading_is_unresolved_below_two_standard_errors_or_without_any() -> None:
    assert not split(progress_standard_error=1.5).unresolved  # 12 against 2 * 6
    assert split(progress_standard_error=1.6).unresolved
    assert split(progress=-3.0).unresolved
    assert split(progress_standard_error=math.nan).unresolved
    bare = split(num_sign_patterns=None, progress_standard_error=None)
    assert bare.unresolved
    assert bare.ceiling is None
    assert bare.resolution is None


def test_a_rank_variance_reading_is_unresolved_above_seven_tenths_of_its_ceiling() -> None:
    assert not reading(noise_scale=69.0, ceiling=100.0).unresolved
    assert reading(noise_scale=71.0, ceiling=100.0).unresolved
    assert reading(noise_scale=71.0, ceiling=100.0, signal=0.0).unresolved
    assert not reading(noise_scale=71.0, ceiling=None).unresolved


def test_the_bracket_holds_the_squared_norm_of_the_true_gradient() -> None:
    # ||g||_1 of a gradient of 0.3 in each of 400 entries is 120; two halves of 16 samples with noise 1 each.
    rng = np.random.default_rng(4)
    lows, highs = [], []
    for _ in range(200):
        a, b = (np.full(400, 0.3) + rng.normal(0, 0.25, 400) for _ in range(2))
        progress = float(np.sign(a) @ b + np.sign(b) @ a) / 2
        signal = float(np.abs(a).sum() + np.abs(b).sum()) / 2
        bracket = reading(
            noise_scale=1.0, estimator="split", geometry="sign", signal=signal, progress=progress
        ).signal_sq_bracket
        assert bracket is not None
        lows.append(bracket[0])
        highs.append(bracket[1])
    assert np.mean(lows) < 120**2 < np.mean(highs)
    assert reading(noise_scale=1.0).signal_sq_bracket is None
    assert split(progress=-3.0).signal_sq_bracket == (0.0, 16.0)


def test_standard_errors_belong_to_split_and_a_curve_is_short() -> None:
    for field in ("num_sign_patterns", "noise_standard_error", "progress_standard_error"):
        with pytest.raises(ValidationError, match="split estimator only"):
            GroupReading.model_validate({**reading(noise_scale=1.0).model_dump(), field: 2})
    point = ProgressPoint(samples=4, progress=-0.5)
    assert split(progress_curve=(point,) * 16).progress_curve[-1].progress == -0.5
    with pytest.raises(ValidationError, match="at most 16"):
        split(progress_curve=(point,) * 17)
    with pytest.raises(ValidationError, match="greater than 0"):
        ProgressPoint(samples=0, progress=1.0)


def test_a_reading_survives_the_wire_with_everything_it_knows() -> None:
    one = split(
        direction="update",
        noise_standard_error=math.inf,
        progress_curve=(ProgressPoint(samples=2.5, progress=math.nan),),
    )
    read = GroupReading.model_validate_json(one.model_dump_json())
    assert read.model_dump_json() == one.model_dump_json()
    assert math.isnan(read.progress_curve[0].progress)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, 0.0])
def test_no_number_makes_a_reading_fail_when_it_is_asked(value: float) -> None:
    for one in (
        split(noise=value, signal=value, progress=value, progress_standard_error=value),
        split(progress_standard_error=value),
        reading(noise_scale=1.0, geometry="sign", noise=value, signal=value, ceiling=value),
    ):
        for name in ("noise_scale", "ceiling", "resolution", "signal_sq_bracket", "unresolved"):
            getattr(one, name)
        few_groups_factor(one)
        corrected_for_few_groups(one)

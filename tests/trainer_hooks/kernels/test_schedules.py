from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.kernels import fitted_schedule
from trainer_hooks.kernels import (
    DEEPSEEK_10,
    NEWTON_SCHULZ_5,
    POLAR_EXPRESS_4,
    POLAR_EXPRESS_5,
    POLAR_EXPRESS_7,
    POLAR_EXPRESS_8,
    OrthogonalizationSchedule,
)


def band(schedule: OrthogonalizationSchedule, low: float) -> tuple[float, float]:
    """Least and largest p(s/f) for s/f from low up to what the margin leaves."""
    x = np.geomspace(low, 1 / schedule.norm_margin, 100_001)
    for a, b, c in schedule.coefficients:
        x = a * x + b * x**3 + c * x**5
    return float(x.min()), float(x.max())


@pytest.mark.parametrize(
    ("schedule", "low", "expected"),
    [
        # Three digits, computed elsewhere from the published coefficients.
        (NEWTON_SCHULZ_5, 1e-1, (0.682, 1.134)),
        (NEWTON_SCHULZ_5, 3e-3, (0.682, 1.202)),
        (NEWTON_SCHULZ_5, 1e-3, (0.471, 1.202)),
        (POLAR_EXPRESS_5, 1e-1, (0.859, 1.141)),
        (POLAR_EXPRESS_5, 1e-3, (0.859, 1.141)),
        (POLAR_EXPRESS_8, 1e-3, (1.000, 1.000)),
        (DEEPSEEK_10, 1e-3, (1.000, 1.001)),
    ],
)
def test_singular_values_land_in_the_published_bands(
    schedule: OrthogonalizationSchedule, low: float, expected: tuple[float, float]
) -> None:
    assert band(schedule, low) == pytest.approx(expected, abs=6e-4)  # half a last digit, and 1e-4 of the grid


def test_polar_express_4_lands_in_its_band_and_is_steep_below() -> None:
    # The band that its source states, to two digits.
    low, high = band(POLAR_EXPRESS_4, 3.2e-3)
    assert low >= 0.809
    assert high <= 1.191
    x = np.geomspace(1e-9, 3.2e-3, 10_001)
    values = x.copy()
    for a, b, c in POLAR_EXPRESS_4.coefficients:
        values = a * values + b * values**3 + c * values**5
    assert float((values / x).min()) > 250


def test_polar_express_7_keeps_the_bound_of_its_source() -> None:
    low, high = band(POLAR_EXPRESS_7, 1e-3)
    assert low >= 1 - 4e-7
    assert high <= 1 + 4e-7


def test_the_constants_of_polar_express_4_come_from_the_fit() -> None:
    fitted = fitted_schedule(low=3.2e-3, num_steps=4, safety=1.005)
    assert np.allclose(POLAR_EXPRESS_4.coefficients, fitted, rtol=0, atol=5.1e-7)  # six digits were kept


def test_the_fit_finds_the_polynomials_that_others_published() -> None:
    # CANS (five steps from 1e-3), four digits: the same problem, solved elsewhere.
    published = [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ]
    assert np.allclose(fitted_schedule(low=1e-3, num_steps=5, safety=1.0), published, rtol=0, atol=5.1e-5)


def test_the_published_eight_are_divided_by_their_safety_but_for_the_last() -> None:
    # As other programs carry them, divided already.
    assert np.allclose(
        POLAR_EXPRESS_8.coefficients[:2],
        [
            (8.205160414005574, -22.90193498705605, 16.460724910180314),
            (4.066395159942775, -2.8611540867551426, 0.5183995226694741),
        ],
        rtol=1e-14,
    )
    assert POLAR_EXPRESS_8.coefficients[-1] == (1.875, -1.25, 0.375)

"""What the rank_variance estimator reads when the gradient is nothing but noise: the largest value it can report.

Its signal is the norm of the mean gradient, and noise has a norm too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from gns_controller.core.contract import Geometry
from gns_controller.core.statistics import c4

_NUM_QUADRATURE_POINTS = 4096


def pure_noise_reading(
    geometry: Geometry,
    *,
    global_batch_size: float,
    num_groups: int,
    shapes: Sequence[tuple[int, ...]] = (),
) -> float:
    """rank_variance noise_scale of independent Gaussian noise of one scale, in samples.

        euclidean   B
        sign        c4(K-1)^2 (pi/2) B
        spectral    (sum_l E||Z(m, (K-1) n)||_S1 / sqrt(K-1)  /  sum_l E||Z(m, n)||_S1)^2 B

    with Z(m, n) a standard Gaussian matrix. Real noise has unequal scales and few directions, so real readings saturate
    near this value, not at it.

    Args:
        geometry: the norm.
        global_batch_size: B.
        num_groups: K, groups of equal size.
        shapes: of the group's matrices; spectral only.
    """
    if geometry == "euclidean":
        return global_batch_size
    if geometry == "sign":
        return global_batch_size * c4(num_groups - 1) ** 2 * math.pi / 2
    degrees = num_groups - 1
    noise = sum(gaussian_nuclear_norm(min(shape), degrees * max(shape)) for shape in shapes) / math.sqrt(degrees)
    signal = sum(gaussian_nuclear_norm(min(shape), max(shape)) for shape in shapes)
    return global_batch_size * (noise / signal) ** 2


@cache
def gaussian_nuclear_norm(num_rows: int, num_columns: int) -> float:
    """E||Z||_S1 of an m x n standard Gaussian matrix, by the Marchenko-Pastur law (exact as m and n grow).

        m sqrt(n) * integral sqrt(x) sqrt((x_max - x)(x - x_min)) / (2 pi y x) dx,   y = m/n <= 1

    The square case is 8 / (3 pi) n^(3/2).
    """
    short, long = sorted((num_rows, num_columns))
    aspect = short / long
    centre, radius = 1 + aspect, 2 * math.sqrt(aspect)
    total = 0.0
    for point in range(_NUM_QUADRATURE_POINTS):
        angle = math.pi * (point + 0.5) / _NUM_QUADRATURE_POINTS
        total += (radius * math.sin(angle)) ** 2 / math.sqrt(centre + radius * math.cos(angle))
    mean_root = total / _NUM_QUADRATURE_POINTS / (2 * aspect)
    return short * math.sqrt(long) * mean_root

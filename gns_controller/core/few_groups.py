"""What few sample groups do to the root of a variance: it reads low, by a factor that theory knows."""

from __future__ import annotations

import math
from functools import cache


@cache
def c4(degrees_of_freedom: int) -> float:
    """E[s] / sigma for the root s of an unbiased variance of normal numbers: sqrt(2/f) Gamma((f+1)/2) / Gamma(f/2)."""
    half = degrees_of_freedom / 2
    return math.exp(math.lgamma(half + 0.5) - math.lgamma(half)) / math.sqrt(half)

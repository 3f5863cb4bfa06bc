"""Tensors in, tensors out: noise and signal of a gradient in the dual norm of its optimizer.

No communication, no parameters, no state. `rank_variance`, `inner_product_variance`, `split`, `split_over_patterns` and
`progress_curve` are the eager reference for anyone who wants to check us; `euclidean`, `sign` and `spectral` hold the
per-tensor sums that the hooks use, and `choose_patterns` says which groups those sums set against each other.
"""

from trainer_hooks.estimators.patterns import SignPattern, choose_patterns
from trainer_hooks.estimators.pure_noise import pure_noise_reading
from trainer_hooks.estimators.reference import (
    Estimate,
    inner_product_variance,
    progress_curve,
    rank_variance,
    split,
    split_over_patterns,
)

__all__ = [
    "Estimate",
    "SignPattern",
    "choose_patterns",
    "inner_product_variance",
    "progress_curve",
    "pure_noise_reading",
    "rank_variance",
    "split",
    "split_over_patterns",
]

"""Tensors in, tensors out: noise and signal of a gradient in the dual norm of its optimizer.

No communication, no parameters, no state. `rank_variance` and `split` are the eager reference for anyone who wants to
check us; `euclidean`, `sign` and `spectral` hold the per-tensor sums that the hooks use.
"""

from trainer_hooks.estimators.ceilings import pure_noise_reading
from trainer_hooks.estimators.reference import Estimate, rank_variance, split

__all__ = ["Estimate", "pure_noise_reading", "rank_variance", "split"]

"""What adds up over tensors and over shards, and how the sums become norms.

    split          [||u_A - u_B||, ||u_A||, ||u_B||, <p(u_A), g_B>, <p(u_B), g_A>]      u = g, or the update's direction
    progress       [<p(u), g>, 0]
    rank_variance  [||sigma||, ||gbar||]

l1 and nuclear norms add over tensors as they are. The euclidean norm is that of all tensors as one vector, so its
squares add: [||u_A - u_B||^2, ||u_A||^2, ||u_B||^2, <u_A, g_B>, <u_B, g_A>], [<u, g>, ||u||^2] and
[||sigma||^2, ||gbar||^2].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gns_controller.core.contract import Geometry

NUM_SPLIT_SUMS = 5
NUM_SPREAD_SUMS = 2
NUM_PROGRESS_SUMS = 2
NUM_INNER_PRODUCT_SUMS = 2


class DualNorms(NamedTuple):
    """() float64 tensors: dual norms, not squared."""

    noise: Tensor
    """Of the per-sample spread."""
    signal: Tensor
    """rank_variance: ||gbar||_*. split: (||g_A||_* + ||g_B||_*) / 2."""
    progress: Tensor | None
    """split: (<p(g_A), g_B> + <p(g_B), g_A>) / 2, signed."""


def split_dual_norms(sums: Tensor, *, geometry: Geometry, num_samples_a: float, num_samples_b: float) -> DualNorms:
    """Finish the split estimator from sums over all tensors.

        noise = ||g_A - g_B||_* / sqrt(1/n_A + 1/n_B)

    Args:
        sums: (5,) float64.
        geometry: which convention the sums follow.
        num_samples_a: n_A, samples behind half A.
        num_samples_b: n_B.

    Bias: noise estimates sqrt(B) E||gbar - grad L||_* without bias for symmetric noise. progress is unbiased for
        E<grad L, p(g)> at the half batch.
    """
    per_sample = (1 / num_samples_a + 1 / num_samples_b) ** -0.5
    if geometry == "euclidean":
        difference, norm_a, norm_b = sums[0].sqrt(), sums[1].sqrt(), sums[2].sqrt()
        progress = 0.5 * (_divide_or_zero(sums[3], norm_a) + _divide_or_zero(sums[4], norm_b))
    else:
        difference, norm_a, norm_b = sums[0], sums[1], sums[2]
        progress = 0.5 * (sums[3] + sums[4])
    return DualNorms(noise=difference * per_sample, signal=0.5 * (norm_a + norm_b), progress=progress)


def first_order_noise(sums: Tensor, *, geometry: Geometry, num_samples_a: float, num_samples_b: float) -> Tensor:
    """u = sqrt(n_A n_B)/B <p(g_A) + p(g_B), g_A - g_B> / 2, whose square stands for Var <p(grad L), gbar>.

    The part of the error of `progress` that all sign patterns share where signal dominates. For halves of the gradient
    only: <p(g_A), g_A> is taken to be ||g_A||.
    """
    if geometry == "euclidean":
        norm_a, norm_b = sums[1].sqrt(), sums[2].sqrt()
        inner_ab, inner_ba = _divide_or_zero(sums[3], norm_a), _divide_or_zero(sums[4], norm_b)
    else:
        norm_a, norm_b, inner_ab, inner_ba = sums[1:5].unbind()
    weight = math.sqrt(num_samples_a * num_samples_b) / (num_samples_a + num_samples_b)
    inner: Tensor = norm_a - inner_ab + inner_ba - norm_b
    return inner.mul(0.5 * weight)


def finished_progress(sums: Tensor, *, geometry: Geometry) -> Tensor:
    """<p(u), g> over all tensors from progress sums (..., 2) float64: (...,)."""
    return _divide_or_zero(sums[..., 0], sums[..., 1].sqrt()) if geometry == "euclidean" else sums[..., 0]


def spread_dual_norms(sums: Tensor, *, geometry: Geometry) -> DualNorms:
    """Finish the rank_variance estimator from sums over all tensors: (2,) float64."""
    if geometry == "euclidean":
        sums = sums.sqrt()
    return DualNorms(noise=sums[0], signal=sums[1], progress=None)


def inner_product_variance(sums: Tensor, *, num_samples: float, num_groups: int) -> Tensor:
    """Per-sample variance of <g_i, gbar> from sums over sample groups: () float64.

        (sum_j n_j y_j^2 - (sum_j n_j y_j)^2 / B) / (K - 1)        y_j = <g_j - gbar, gbar>

    The y_j are centred already, so nothing is lost in the difference.

    Args:
        sums: (2,) float64: sum_j n_j y_j, sum_j n_j y_j^2.
        num_samples: B.
        num_groups: K, at least 2.
    """
    return ((sums[1] - sums[0].square() / num_samples) / (num_groups - 1)).clamp_min(0)


def _divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

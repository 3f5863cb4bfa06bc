"""Noise and signal for SGD, measured in the l2 norm of all tensors as one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def split_sums(half_a: Tensor, half_b: Tensor, difference: Tensor) -> Tensor:
    """(5,) float64: squares and the inner product of two half gradients, any shape, float32 or float64.

    `difference` is half_a - half_b, handed in because the signed reduction knows it without cancellation.
    """
    return torch.stack(
        [
            _sum_of_squares(difference),
            _sum_of_squares(half_a),
            _sum_of_squares(half_b),
            (half_a * half_b).sum(dtype=torch.float64),
            torch.zeros((), dtype=torch.float64, device=half_a.device),
        ]
    )


def spread_sums(mean_grad: Tensor, variance: Tensor) -> Tensor:
    """(2,) float64: tr C and ||gbar||_2^2, both unbiased for what they name; the ratio is not."""
    return torch.stack([variance.sum(dtype=torch.float64), _sum_of_squares(mean_grad)])


def _sum_of_squares(tensor: Tensor) -> Tensor:
    return tensor.square().sum(dtype=torch.float64)

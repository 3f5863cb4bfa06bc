"""Noise and signal for SGD, measured in the l2 norm of all tensors as one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def split_sums(
    half_a: Tensor,
    half_b: Tensor,
    difference: Tensor,
    *,
    target_a: Tensor | None = None,
    target_b: Tensor | None = None,
) -> Tensor:
    """(5,) float64: squares and the inner products of two halves, any shape, float32 or float64.

    `difference` is half_a - half_b, handed in because the signed reduction knows it without cancellation. Where the
    halves are directions (momentum included), the targets are the half gradients that judge them.
    """
    inner_ab = _inner(half_a, half_b if target_b is None else target_b)
    inner_ba = inner_ab if target_a is None else _inner(half_b, target_a)
    return torch.stack(
        [_inner(difference, difference), _inner(half_a, half_a), _inner(half_b, half_b), inner_ab, inner_ba]
    )


def progress_sums(direction: Tensor, target: Tensor) -> Tensor:
    """(2,) float64: <direction, target> and |direction|^2; progress is the first over the root of the second."""
    return torch.stack([_inner(direction, target), _inner(direction, direction)])


def spread_sums(mean_grad: Tensor, variance: Tensor) -> Tensor:
    """(2,) float64: tr C and ||gbar||_2^2, both unbiased for what they name; the ratio is not."""
    return torch.stack([variance.sum(dtype=torch.float64), _inner(mean_grad, mean_grad)])


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Rows in the tensors' dtype, their sum in float64: a float64 sum of float32 entries copies them all first."""
    rows: Tensor = torch.linalg.vecdot(left, right) if left.ndim else left * right
    return rows.sum(dtype=torch.float64)

"""Sizes to divide by, of gradients of any scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def safe_rms(tensor: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """Root mean square along dims, also where squares would overflow or vanish.

        s (mean (x / s)^2)^(1/2)        s = max |x|

    Divide by it, where it is not 0. It lies between s / n^(1/2) and s, n entries, and so within the range of x, which a
    norm may leave; so may its inverse.

    Args:
        tensor: floating, computed in float32, or in float64 if it is that.
        dim: these dims stay, with size 1.

    Returns:
        In the dtype it was computed in: 0 of zeros and of no entries, NaN where x is not finite.
    """
    entries = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if not entries.numel():
        return entries.sum(dim, keepdim=True)
    largest = entries.abs().amax(dim, keepdim=True)
    scaled = entries / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    found: Tensor = largest * (norm / math.sqrt(entries.numel() / norm.numel()))
    return found

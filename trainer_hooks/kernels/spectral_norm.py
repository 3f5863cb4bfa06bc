"""Updates of a given spectral norm, by a power method that goes on from one step to the next.

M = rows, N = columns. Nothing is copied to the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError


def power_iterations(num_updates: int) -> int:
    """Return how many iterations `spectrally_normalized` gets: 5 in the first 50 updates, then 1.

    Source: arXiv:2512.05620v2, code.
    """
    return 5 if num_updates < 50 else 1


def spectrally_normalized(update: Tensor, vector: Tensor, *, iterations: int, scale: float) -> tuple[Tensor, Tensor]:
    """Give an update a spectral norm of `scale`, which with sqrt(dout / din) needs no transfer of the rate over width.

        u = W v / |W v|        v = W^T u / |W^T u|        sigma = |W^T u|        W scale / (sigma + 1e-10)

    Nothing is copied to the host.

    Args:
        update: W, (..., M, N), floating.
        vector: v, (..., N) float32 or float64, kept from one step to the next; at first any random direction.
        iterations: of the power method, at least 1; see `power_iterations`.
        scale: the spectral norm of the result.

    Returns:
        The update in its own dtype, and the vector for the next step. A zero update stays zero and leaves the vector.

    Raises:
        InvalidInputError: iterations < 1.

    Bias: sigma is a lower bound, so the norm comes out at `scale` or above, never below. Before the vector has turned
    to the top direction it is up to sqrt(min(M, N)) too large, as |W|_F / sqrt(min(M, N)) bounds sigma from below.
    Source: arXiv:2512.05620v2, code; the bound by the Frobenius norm is ours: a vector that W sends to 0 would blow the
    update up by 1e10.
    """
    if iterations < 1:
        raise InvalidInputError(f"spectral normalization needs iterations >= 1, got {iterations=}.")
    # Power method on W^T W, in float32 or better: v (..., N) turns to the top right singular vector.
    matrix = update.to(vector.dtype)
    sigma = torch.zeros_like(vector[..., :1])
    for _ in range(iterations):
        image = matrix @ vector.unsqueeze(-1)  # (..., M, 1)
        image = image / _one_for_zero(torch.linalg.vector_norm(image, dim=-2, keepdim=True))
        turned = (matrix.mT @ image).squeeze(-1)  # (..., N)
        sigma = torch.linalg.vector_norm(turned, dim=-1, keepdim=True)
        vector = torch.where(sigma == 0, vector, turned / _one_for_zero(sigma))
    # The Frobenius norm bounds sigma from below where v has not met the top direction yet.
    frobenius = torch.linalg.matrix_norm(matrix).unsqueeze(-1)
    sigma = torch.maximum(sigma, frobenius / math.sqrt(min(matrix.shape[-2:])))
    return (matrix * (scale / (sigma + 1e-10)).unsqueeze(-1)).to(update.dtype), vector


def _one_for_zero(norm: Tensor) -> Tensor:
    """Return the norm, 1 where it is 0. NaN stays NaN."""
    return torch.where(norm == 0, 1, norm)

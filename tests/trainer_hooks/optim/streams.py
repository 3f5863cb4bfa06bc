"""Gradient streams for parity tests, and the loop that feeds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def gradients(*shape: int, steps: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: Sequence[Tensor]) -> Tensor:
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype).clone()
        optimizer.step()
    return parameter.detach().double()


def run_new(
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    grads: Sequence[Tensor],
    *,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the weights of a fresh parameter at the end."""
    parameter = nn.Parameter((torch.ones_like(grads[0]) if start is None else start).to(dtype).clone())
    return run(build([parameter]), parameter, grads)


def distance(actual: Tensor, expected: Tensor, *, start: float = 1.0) -> float:
    """Return the distance of two ends, over the distance travelled."""
    return float((actual - expected).norm() / (expected - start).norm())

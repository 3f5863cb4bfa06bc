"""Products known to be symmetric, at about half the work where that was measured to be faster.

S = side of the symmetric result, L = the side that is summed over. Arguments are (S, L) or (B, S, L), all of one dtype.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_SMALLEST_SIDE_IN_BLOCKS = {torch.float64: 512, torch.float32: 512, torch.bfloat16: 768}
"""Side from which on a CPU computes the upper blocks alone, and mirrors them. Of the time of the whole product this
took 0.45 to 0.85 at sides up to 4096, one and two cores; below, bfloat16 came to 0.8 to 1.1."""
_BLOCK = 192
"""Rows of a block; 128 to 256 differ by 5 %."""

TRITON_FROM_SIDE: dict[tuple[int, int], int] = {}
"""Compute capability of an NVIDIA GPU -> smallest S at which the Triton kernel takes the place of cuBLAS.

Empty, because it has not been measured: until then it is a choice of yours, such as TRITON_FROM_SIDE[9, 0] = 2048. It
holds for float32, bfloat16 and float16, where Triton is installed; everything else stays with cuBLAS."""


def gram(X: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compute X X^T: (S, L) -> (S, S), or (B, S, L) -> (B, S, S)."""
    return symmetric_product(X, X.mT, out=out)


def symmetric_product(first: Tensor, second: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compute first @ second where that is symmetric, as X X^T is, or the product of two polynomials of one matrix.

    Args:
        first: (S, L) or (B, S, L).
        second: (L, S) or (B, L, S).
        out: where to put it; neither argument.
    """
    if on_triton(first):
        return _by_triton(first, second, out=out)
    if not in_blocks(first):
        return torch.matmul(first, second, out=out)
    # Of each block of rows the part from the diagonal on; what is below is its mirror.
    result = _result(first, out)
    for upper, rows in _blocks(first.shape[0]):
        torch.mm(first[rows], second[:, upper], out=result[rows, upper])
        _mirror(result, rows)
    return result


def symmetric_polynomial(A: Tensor, *, linear: float, square: float, out: Tensor | None = None) -> Tensor:
    """Compute linear * A + square * A @ A of a symmetric matrix, (S, S) or (B, S, S)."""
    # On a GPU by Triton where it was chosen, on a CPU by blocks of rows where that is faster, else by the library.
    if on_triton(A):
        return _by_triton(A, A, added=A, scale=linear, product_scale=square, out=out)
    if not in_blocks(A):
        return multiply_add(A, A, A, scale=linear, product_scale=square, out=out)
    result = _result(A, out)
    for upper, rows in _blocks(A.shape[0]):
        torch.addmm(A[rows, upper], A[rows], A[:, upper], beta=linear, alpha=square, out=result[rows, upper])
        _mirror(result, rows)
    return result


def multiply_add(
    added: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    scale: float,
    product_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Compute scale * added + product_scale * first @ second, for one matrix or a batch, symmetric or not."""
    multiply = torch.addmm if added.ndim == 2 else torch.baddbmm
    return multiply(added, first, second, beta=scale, alpha=product_scale, out=out)


def in_blocks(matrix: Tensor) -> bool:
    """Return whether symmetric products of this matrix are computed in blocks; those of a batch never are."""
    smallest = _SMALLEST_SIDE_IN_BLOCKS.get(matrix.dtype)
    return matrix.ndim == 2 and matrix.device.type == "cpu" and smallest is not None and matrix.shape[0] >= smallest


def on_triton(matrix: Tensor) -> bool:
    """Return whether symmetric products of this matrix are computed with Triton."""
    if not TRITON_FROM_SIDE or not matrix.is_cuda or importlib.util.find_spec("triton") is None:
        return False
    smallest = TRITON_FROM_SIDE.get(torch.cuda.get_device_capability(matrix.device))
    served = (torch.float32, torch.bfloat16, torch.float16)
    return smallest is not None and matrix.dtype in served and matrix.shape[-2] >= smallest


def _by_triton(
    first: Tensor,
    second: Tensor,
    *,
    out: Tensor | None,
    added: Tensor | None = None,
    scale: float = 0.0,
    product_scale: float = 1.0,
) -> Tensor:
    """Compute scale * added + product_scale * first @ second, symmetric, with the Triton kernel."""
    from trainer_hooks.kernels.triton_symmetric import symmetric_multiply_add

    result = _result(first, out)
    symmetric_multiply_add(
        *(tensor.view(-1, *tensor.shape[-2:]) for tensor in (first, second, result)),
        added=None if added is None else added.view(-1, *added.shape[-2:]),
        scale=scale,
        product_scale=product_scale,
    )
    return result


def _result(first: Tensor, out: Tensor | None) -> Tensor:
    """Return where the result goes, (S, S) or (B, S, S)."""
    return first.new_empty(*first.shape[:-1], first.shape[-2]) if out is None else out


def _blocks(side: int) -> list[tuple[slice, slice]]:
    """Return (columns from the diagonal on, rows) of each block of rows."""
    return [(slice(start, None), slice(start, min(start + _BLOCK, side))) for start in range(0, side, _BLOCK)]


def _mirror(result: Tensor, rows: slice) -> None:
    """Copy the entries right of a block on the diagonal to those below it."""
    result[rows.stop :, rows].copy_(result[rows, rows.stop :].mT)

"""A matrix product known to be symmetric, in Triton: upper tiles alone, each stored twice.

Imported by trainer_hooks.kernels.symmetric alone, when it is chosen there. S = side of the result, L = the
side that is summed over, B = matrices in a batch.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

_TILE = 128
_DEPTH = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
DTYPES = tuple(_DEPTH)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _upper_tiles(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    first,
    second,
    added,
    result,
    S,
    L,
    first_batch,
    first_row,
    first_column,
    second_batch,
    second_row,
    second_column,
    added_batch,
    added_row,
    added_column,
    result_batch,
    result_row,
    result_column,
    scale,
    product_scale,
    HAS_ADDED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # One program per tile and matrix; those below the diagonal have nothing to do.
    tile_row, tile_column = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if tile_column < tile_row:
        return
    # Addresses of the first (TILE, DEPTH) and (DEPTH, TILE) pieces of both arguments.
    rows = (tile_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tile_column * TILE + tl.arange(0, TILE)).to(tl.int64)
    depth = tl.arange(0, DEPTH).to(tl.int64)
    left = first + batch * first_batch + rows[:, None] * first_row + depth[None, :] * first_column
    right = second + batch * second_batch + depth[:, None] * second_row + columns[None, :] * second_column
    # Sum over L in float32, without TF32.
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, L, DEPTH):
        inside = depth < L - start
        x = tl.load(left, mask=(rows[:, None] < S) & inside[None, :], other=0.0)
        y = tl.load(right, mask=inside[:, None] & (columns[None, :] < S), other=0.0)
        sums = tl.dot(x, y, acc=sums, input_precision="ieee")
        left += DEPTH * first_column
        right += DEPTH * second_row
    # scale * added + product_scale * sums.
    sums *= product_scale
    inside_result = (rows[:, None] < S) & (columns[None, :] < S)
    if HAS_ADDED:
        address = added + batch * added_batch + rows[:, None] * added_row + columns[None, :] * added_column
        sums += scale * tl.load(address, mask=inside_result, other=0.0).to(tl.float32)
    # Store the tile, and its mirror below the diagonal.
    tile = sums.to(result.dtype.element_ty)
    base = result + batch * result_batch
    tl.store(base + rows[:, None] * result_row + columns[None, :] * result_column, tile, mask=inside_result)
    if tile_row != tile_column:
        tl.store(base + columns[None, :] * result_row + rows[:, None] * result_column, tile, mask=inside_result)


def symmetric_multiply_add(
    first: Tensor,
    second: Tensor,
    result: Tensor,
    *,
    added: Tensor | None = None,
    scale: float = 0.0,
    product_scale: float = 1.0,
) -> Tensor:
    """Let result <- scale * added + product_scale * first @ second, which is symmetric; summed in float32.

    Args:
        first: (B, S, L), any strides, one of DTYPES. float32 is multiplied in float32, not in TF32.
        second: (B, L, S), any strides.
        result: (B, S, S), any strides, none of the others. Its tiles below the diagonal are those above, mirrored.
        added: (B, S, S), symmetric.
        scale: of added.
        product_scale: of the product.
    """
    # A grid of tiles by matrices. Without `added` the result stands in for its address, which is not read then.
    num_matrices, side, depth = first.shape
    tiles = triton.cdiv(side, _TILE)
    given = result if added is None else added
    _upper_tiles[(tiles, tiles, num_matrices)](
        first,
        second,
        given,
        result,
        side,
        depth,
        *first.stride(),
        *second.stride(),
        *given.stride(),
        *result.stride(),
        scale,
        product_scale,
        HAS_ADDED=added is not None,
        TILE=_TILE,
        DEPTH=_DEPTH[first.dtype],
        num_warps=8,
        num_stages=3,
    )
    return result

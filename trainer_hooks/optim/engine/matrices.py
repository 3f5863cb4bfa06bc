"""The matrices inside a parameter: fused projections, heads, experts, convolutions and blocks are several.

M = rows, N = columns, E = leading dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError

CUTS = ("split_sizes", "num_heads", "batched")
"""Group settings by which a parameter is cut into matrices."""
OWNED = "owned"
"""Entry of a parameter's state on the owner of its matrices, on the CPU: 0 in the first step, 1 from the second on."""


def matrices_of(whole: Tensor, group: Mapping[str, Any], *, block_size: int | None = None) -> list[Tensor]:
    """Return views of a whole parameter (or of its gradient, or update), one per matrix that is updated by itself.

    Args:
        whole: (M, N); (M, N, ...), a convolution, whose trailing dims are columns; or, if the group is batched,
            (E..., M, N), one matrix per leading index. Contiguous.
        group: split_sizes, rows of each fused projection; num_heads, equal pieces of rows in the first projection
            (the others are cut into pieces of as many rows); batched. All optional.
        block_size: cut rows and columns into pieces of at most this many.

    Raises:
        GeometryError: the sizes do not fit, or the parameter is not a matrix.
    """
    # Stacked experts, one matrix each; a convolution is one.
    matrices = _experts(whole, group)
    split_sizes, num_heads = group.get("split_sizes"), group.get("num_heads")
    # Fused projections, by rows.
    if split_sizes is not None:
        num_rows = matrices[0].shape[0]
        if sum(split_sizes) != num_rows:
            raise GeometryError(
                f"split_sizes={tuple(split_sizes)} sum to {sum(split_sizes)}, and the matrix has {num_rows} rows."
            )
        matrices = [piece for matrix in matrices for piece in torch.split(matrix, list(split_sizes))]
    # Heads, by rows; keys and values of grouped heads have fewer of the same width.
    if num_heads is not None:
        num_rows = matrices[0].shape[0]
        head_rows = num_rows // num_heads
        if any(matrix.shape[0] % max(head_rows, 1) for matrix in matrices) or num_rows % num_heads:
            raise GeometryError(
                f"num_heads={num_heads} does not cut matrices of {[matrix.shape[0] for matrix in matrices]} rows into "
                "equal heads."
            )
        matrices = [head for matrix in matrices for head in torch.split(matrix, head_rows)]
    # Blocks, by rows and columns.
    if block_size is not None:
        matrices = [
            block
            for matrix in matrices
            for strip in torch.split(matrix, block_size)
            for block in torch.split(strip, block_size, dim=1)
        ]
    return matrices


def _experts(whole: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
    """Return the matrices of a stack if the group is batched; otherwise one matrix, trailing dims flattened."""
    if whole.ndim < 2:
        raise GeometryError(f"a parameter of shape {tuple(whole.shape)} is not a matrix; give it to AdamW or Signum.")
    if whole.ndim == 2:
        return [whole]
    if group.get("batched"):
        return list(whole.flatten(0, -3).unbind())
    return [whole.flatten(1)]


class MatrixState(MutableMapping[str, Any]):
    """State of one matrix of a parameter: entry `name` is `name.number` in the parameter's state."""

    def __init__(self, state: dict[str, Any], number: int) -> None:
        self._state, self._suffix = state, f".{number}"

    def __getitem__(self, name: str) -> Any:
        return self._state[name + self._suffix]

    def __setitem__(self, name: str, value: Any) -> None:
        self._state[name + self._suffix] = value

    def __delitem__(self, name: str) -> None:
        del self._state[name + self._suffix]

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(self._suffix) for name in self._state if name.endswith(self._suffix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def is_of_owner(name: str) -> bool:
    """Return whether an entry of a parameter's state is kept by the owner of its matrices alone."""
    return name == OWNED or "." in name


def lacks_matrices(state: Mapping[str, Any]) -> bool:
    """Return whether a parameter was stepped, and its owner's share is missing or that of torch's initialising step.

    A full state dict of one rank brings the other ranks counts only, beside which torch leaves what that first step
    made. A state_dict without `owned`, from before there was one, is taken as it is. A distributed checkpoint without
    it cannot be loaded: torch misses the key, or, if missing keys are allowed, leaves the 0 of its own step.
    """
    stepped = float(state.get("step", 0))
    return (state.keys() == {"step"} and stepped > 0) or (stepped > 1 and not state.get(OWNED, 1))

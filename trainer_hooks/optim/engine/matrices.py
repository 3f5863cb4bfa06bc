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
"""Group settings that say which matrices a parameter is cut into."""
OWNED = "owned"
"""Entry of a parameter's state on the owner of its matrices, on the CPU: 0 in the first step, 1 from the second on."""


def matrices_of(whole: Tensor, group: Mapping[str, Any], *, block_size: int | None = None) -> list[Tensor]:
    """Views of a whole parameter (or of its gradient, or update), one per matrix that is preconditioned by itself.

    Args:
        whole: (M, N); (M, N, ...), a convolution, whose trailing dims are columns; or, if the group is batched,
            (E..., M, N), one matrix per leading index. Contiguous.
        group: split_sizes, rows of each fused projection; num_heads, equal pieces of rows in the first projection
            (the others are cut into pieces of as many rows); batched. All optional.
        block_size: cut rows and columns into pieces of at most this many.

    Raises:
        GeometryError: the sizes do not fit, or the parameter is no matrix.
    """
    found = _experts(whole, group)
    split_sizes, num_heads = group.get("split_sizes"), group.get("num_heads")
    if split_sizes is not None:
        if sum(split_sizes) != found[0].shape[0]:
            raise GeometryError(
                f"split_sizes={tuple(split_sizes)} sum to {sum(split_sizes)}, and the matrix has "
                f"{found[0].shape[0]} rows."
            )
        found = [piece for matrix in found for piece in torch.split(matrix, list(split_sizes))]
    if num_heads is not None:
        head_rows = found[0].shape[0] // num_heads
        if any(matrix.shape[0] % max(head_rows, 1) for matrix in found) or found[0].shape[0] % num_heads:
            raise GeometryError(
                f"num_heads={num_heads} does not cut matrices of {[matrix.shape[0] for matrix in found]} rows into "
                "equal heads."
            )
        found = [head for matrix in found for head in torch.split(matrix, head_rows)]
    if block_size is not None:
        found = [
            block
            for matrix in found
            for strip in torch.split(matrix, block_size)
            for block in torch.split(strip, block_size, dim=1)
        ]
    return found


def _experts(whole: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
    if whole.ndim < 2:
        raise GeometryError(f"a parameter of shape {tuple(whole.shape)} is no matrix; give it to AdamW or Signum.")
    if whole.ndim == 2:
        return [whole]
    if group.get("batched"):
        return list(whole.flatten(0, -3).unbind())
    return [whole.flatten(1)]


class MatrixState(MutableMapping[str, Any]):
    """The state of one matrix of a parameter: entry `name` is `name.number` in the parameter's state."""

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
    """Whether an entry of a parameter's state is kept by the owner of its matrices alone."""
    return name == OWNED or "." in name


def lacks_matrices(state: Mapping[str, Any]) -> bool:
    """Whether a parameter was stepped, and its owner's share is missing or that of torch's initialising step.

    A full state dict of one rank brings the other ranks counts only, beside which torch leaves what that first step
    made. A state_dict without `owned`, from before there was one, is taken as it is. A distributed checkpoint without
    it cannot be loaded: torch misses the key, or, if told to go on, leaves the 0 of its own step.
    """
    stepped = float(state.get("step", 0))
    return (state.keys() == {"step"} and stepped > 0) or (stepped > 1 and not state.get(OWNED, 1))

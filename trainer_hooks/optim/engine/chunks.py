"""Parameters in portions, so that a step's temporary tensors stay small beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_CHUNK_NUMEL = 2**26
"""Entries of this rank's blocks: 256 MiB per temporary list in float32, and kernels long past launch-bound."""


def chunks_of(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in lists of one device and dtype, plain ones and DTensors together, of bounded size."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for found in alike.values():
        chunk: list[Tensor] = []
        numel = 0
        for parameter in found:
            chunk.append(parameter)
            numel += (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
            if numel >= _CHUNK_NUMEL:
                yield chunk
                chunk, numel = [], 0
        if chunk:
            yield chunk

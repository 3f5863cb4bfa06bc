"""Size of an update of a matrix: a factor by its shape, or a spectral norm that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.kernels.spectral_norm import power_iterations, spectrally_normalized
from trainer_hooks.optim.engine.matrices import MatrixState

Scale = Literal["spectral", "shape", "rms_match", "none"]


def update_scale(scale: Scale, *, rows: int, columns: int) -> float:
    """Return the factor on the orthogonal update of a (rows, columns) matrix.

        spectral    (rows / columns)^(1/2)            unit RMS -> RMS norm
        shape       max(1, rows / columns)^(1/2)      Jordan et al.
        rms_match   0.2 max(rows, columns)^(1/2)      RMS 0.2, as AdamW's updates have
        none        1

    Raises:
        InvalidInputError: the rule does not exist.

    Source: arXiv:2410.21265; Muon (Jordan et al. 2024); arXiv:2502.16982.
    """
    match scale:
        case "spectral":
            return math.sqrt(rows / columns)
        case "shape":
            return math.sqrt(max(1.0, rows / columns))
        case "rms_match":
            return 0.2 * math.sqrt(max(rows, columns))
        case "none":
            return 1.0
    raise InvalidInputError(f"scale={scale!r} does not exist; there are {', '.join(get_args(Scale))}.")


def normalized_updates(updates_BMN: Tensor, states: Sequence[MatrixState], step: int) -> Tensor:
    """Return updates of spectral norm (M / N)^(1/2) each.

    Args:
        updates_BMN: (B, M, N) of one shape.
        states: of each matrix; the vector of the power method is kept in them from step to step.
        step: of the parameter, from 1.
    """
    rows, columns = updates_BMN.shape[1:]
    # At first a random direction, the same on every rank and in every run.
    for state in states:
        if "spectral_vector" not in state:
            dtype = torch.promote_types(updates_BMN.dtype, torch.float32)
            start = torch.randn(columns, dtype=dtype, generator=torch.Generator().manual_seed(columns))
            state["spectral_vector"] = start.to(updates_BMN.device)
    vectors_BN = torch.stack([state["spectral_vector"] for state in states])
    updates_BMN, vectors_BN = spectrally_normalized(
        updates_BMN, vectors_BN, iterations=power_iterations(step - 1), scale=math.sqrt(rows / columns)
    )
    torch._foreach_copy_([state["spectral_vector"] for state in states], list(vectors_BN.unbind()))
    return updates_BMN

"""What an orthogonal update is multiplied with, by the shape of the matrix."""

from __future__ import annotations

import math
from typing import Literal, get_args

from gns_controller.core.errors import InvalidInputError

Scale = Literal["spectral", "shape", "rms_match", "none"]


def update_scale(scale: Scale, *, rows: int, columns: int) -> float:
    """Factor on the orthogonal update of a (rows, columns) matrix.

        spectral    (rows / columns)^(1/2)            unit RMS -> RMS norm
        shape       max(1, rows / columns)^(1/2)      Jordan et al.
        rms_match   0.2 max(rows, columns)^(1/2)      RMS 0.2, as AdamW's updates have
        none        1

    Raises:
        InvalidInputError: there is no such rule.

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
    raise InvalidInputError(f"there is no scale={scale!r}; there are {', '.join(get_args(Scale))}.")

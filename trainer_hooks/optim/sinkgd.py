"""SinkGD: gradients whose rows and columns are both of RMS 1, without any state.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.options import DecayOptions
from trainer_hooks.optim.engine.update import check_settings
from trainer_hooks.optim.known_optimizers import OptimizerFacts

_LEAST_NORM = 1e-8
"""Norms below count as this one, so that zero rows and columns stay zero."""
_LARGEST_ENTRY = 1e15
"""Matrices with larger entries are divided, so that float32 holds sums of up to 1e8 squares."""


class SinkGD(MatrixOptimizer):
    """Gradients normalized by rows and by columns in turn, as Sinkhorn does it.

    SinkGD divides every row of a gradient by its root mean square, then every column, and repeats that a few times.
    What is left has rows and columns of equal size, so that no output and no input of a layer moves more than another.
    It keeps neither momentum nor second moments, and so needs as little memory as plain gradient descent.

        X = G;  rounds times:  X_i. <- N^(1/2) X_i. / ||X_i.||;   X_.j <- M^(1/2) X_.j / ||X_.j||
        w <- w (1 - lr weight_decay) - lr X

    Norms below 1e-8 count as 1e-8, so rows and columns of zeros stay zero. Rows that hold nothing but noise come out as
    long as the others: give embeddings, heads, norms and biases to AdamW.

    Args:
        params: matrices, or groups of them; a group may set split_sizes, num_heads and batched.
        lr: RMS of the step.
        rounds: of rows and columns each.
        weight_decay: times lr, or times lr over the first lr: see decay.
        options: decay, cautious, maximize and process_group; see DecayOptions.

    Raises:
        GeometryError: a parameter is not a matrix, or its splits do not fit.
        InvalidInputError: a setting out of range.

    Errors: columns are exact, rows as far as the rounds have converged. In float32 or better.
    Source: Scetbon et al. 2025, arXiv:2502.06742.
    """

    # Rows and columns of equal size: none of the three norms that are measured is the dual of that.
    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        learning_rate_coupling="sqrt", averaged_settings=(), momentum="none"
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rounds: int = 5,
        weight_decay: float = 0.0,
        **options: Unpack[DecayOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "rounds": rounds, "weight_decay": weight_decay}, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings("SinkGD", rounds=(group["rounds"], 1, float("inf")))

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        X_BMN = matrices_BMN.to(torch.promote_types(matrices_BMN.dtype, torch.float32))
        # Scale huge matrices down: the rounds make their size irrelevant, but their squares would overflow.
        X_BMN = X_BMN / (X_BMN.abs().amax(dim=(1, 2), keepdim=True) / _LARGEST_ENTRY).clamp_(min=1)
        # Rows, then columns, each to RMS 1.
        for _ in range(group["rounds"]):
            for dim in (2, 1):
                norms = torch.linalg.vector_norm(X_BMN, dim=dim, keepdim=True).clamp_(min=_LEAST_NORM)
                X_BMN = X_BMN * (X_BMN.shape[dim] ** 0.5 / norms)
        return X_BMN

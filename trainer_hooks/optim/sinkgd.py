"""SinkGD: gradients whose rows and columns are both of RMS 1, without any state.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.update import Decay, check_settings
from trainer_hooks.optim.known_optimizers import OptimizerFacts

_LEAST_NORM = 1e-8
_LARGEST_ENTRY = 1e15
"""Matrices with larger ones are divided, so that float32 holds sums of up to 1e8 squares."""


class SinkGD(MatrixOptimizer):
    """Gradients normalized by rows and by columns in turn, as Sinkhorn does it.

        X = G;  rounds times:  X_i. <- N^(1/2) X_i. / ||X_i.||;   X_.j <- M^(1/2) X_.j / ||X_.j||
        w <- w (1 - lr weight_decay) - lr X

    Norms below 1e-8 count as 1e-8, so rows and columns of zeros stay zero. Rows that hold nothing but noise come out as
    long as the others: give embeddings, heads, norms and biases to AdamW.

    Args:
        params: matrices, or groups of them; a group may say split_sizes, num_heads and batched.
        lr: RMS of the step.
        rounds: of rows and columns each.
        weight_decay: times lr, or times lr over the first lr: see decay.
        decay: "decoupled" or "independent".
        cautious: decay only entries that the update moves towards zero.
        maximize: ascend.
        process_group: ranks that hold copies of the same plain parameters (DDP) and share the work. DTensors need none.

    Raises:
        GeometryError: a parameter is no matrix, or its splits do not fit.
        InvalidInputError: a setting out of range.

    Errors: columns are exact, rows as far as the rounds have converged. In float32 or better.
    Source: Scetbon et al. 2025, arXiv:2502.06742.
    """

    # Rows and columns of equal size: none of the three norms is the dual of that.
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
        decay: Decay = "decoupled",
        cautious: bool = False,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "rounds": rounds,
            "weight_decay": weight_decay,
            "decay": decay,
            "cautious": cautious,
            "maximize": maximize,
        }
        super().__init__(params, defaults, process_group=process_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings("SinkGD", rounds=(group["rounds"], 1, float("inf")))

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        X_BMN = matrices_BMN.to(torch.promote_types(matrices_BMN.dtype, torch.float32))
        X_BMN = X_BMN / (X_BMN.abs().amax(dim=(1, 2), keepdim=True) / _LARGEST_ENTRY).clamp_(min=1)
        for _ in range(group["rounds"]):
            for dim in (2, 1):
                norms = torch.linalg.vector_norm(X_BMN, dim=dim, keepdim=True).clamp_(min=_LEAST_NORM)
                X_BMN = X_BMN * (X_BMN.shape[dim] ** 0.5 / norms)
        return X_BMN

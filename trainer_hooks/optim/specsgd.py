"""Stochastic spectral descent: steepest descent in the spectral norm along the gradient itself, by an exact SVD.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer_hooks.kernels import EXACT, orthogonalize
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.update import Decay
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule
from trainer_hooks.optim.muon import check_iteration


def _facts_by_step(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """No rule is known for steps that grow with the nuclear norm."""
    return {} if settings["scale_by_nuclear_norm"] else {"transfer_rule": TransferRule("muon")}


class SpecSGD(MatrixOptimizer):
    """Every matrix moves along the orthogonal factor of its gradient. No momentum, no state.

        G = U diag(s) V^T        w <- w (1 - lr weight_decay) - lr U V^T                    (normalized)
                                 w <- w (1 - lr weight_decay) - lr (sum_i s_i) U V^T        (scale_by_nuclear_norm)

    For tests and small models: an SVD of every matrix at every step. Muon is the optimizer for training.

    Args:
        params: matrices, or groups of them; a group may say split_sizes, num_heads and batched.
        lr: the step's spectral norm; with scale_by_nuclear_norm the inverse of a smoothness.
        scale_by_nuclear_norm: the step that minimizes <G, D> + ||D||^2 / (2 lr) in the spectral norm.
        weight_decay: times lr, or times lr over the first lr: see decay.
        decay: "decoupled" or "independent".
        cautious: decay only entries that the update moves towards zero.
        maximize: ascend.
        process_group: ranks that hold copies of the same plain parameters (DDP) and share the work. DTensors need none.

    Raises:
        GeometryError: a parameter is no matrix, or its splits do not fit.
        InvalidInputError: a setting out of range.

    Errors: the SVD is in float64. Singular values below eps max(M, N) s_1, eps of float32 or of a float64 parameter,
        count as zero: their directions do not move.
    Source: Carlson et al. 2015, "Preconditioned spectral descent for deep learning".
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="spectral",
        learning_rate_coupling="sqrt",
        averaged_settings=(),
        momentum="none",
        by_settings=_facts_by_step,
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        scale_by_nuclear_norm: bool = False,
        weight_decay: float = 0.0,
        decay: Decay = "decoupled",
        cautious: bool = False,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "scale_by_nuclear_norm": scale_by_nuclear_norm,
            "weight_decay": weight_decay,
            "decay": decay,
            "cautious": cautious,
            "maximize": maximize,
        }
        super().__init__(params, defaults, process_group=process_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_iteration("SpecSGD", group["params"], schedule=EXACT, dtype=None)

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        factors_BMN = orthogonalize(matrices_BMN, schedule=EXACT)
        if not group["scale_by_nuclear_norm"]:
            return factors_BMN
        nuclear_B11 = (matrices_BMN * factors_BMN).sum(dim=(1, 2), keepdim=True, dtype=torch.float64)
        return factors_BMN * nuclear_B11.to(factors_BMN.dtype)

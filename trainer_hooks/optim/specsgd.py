"""Stochastic spectral descent: steepest descent in the spectral norm along the gradient itself, by an exact SVD.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from trainer_hooks.kernels import EXACT, orthogonalize
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.options import DecayOptions
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule
from trainer_hooks.optim.muon import check_iteration


def _facts_by_step(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return Muon's transfer rule, unless steps grow with the nuclear norm, for which none is known."""
    return {} if settings["scale_by_nuclear_norm"] else {"transfer_rule": TransferRule("muon")}


class SpecSGD(MatrixOptimizer):
    """Every matrix moves along the orthogonal factor of its gradient. No momentum, no state.

    SpecSGD is Muon in its purest form: the gradient of one step is replaced by the nearest orthogonal matrix, computed
    exactly by a singular value decomposition, and the weights move along it. With scale_by_nuclear_norm the step grows
    with the gradient, as that of gradient descent does.

        G = U diag(s) V^T        w <- w (1 - lr weight_decay) - lr U V^T                    (normalized)
                                 w <- w (1 - lr weight_decay) - lr (sum_i s_i) U V^T        (scale_by_nuclear_norm)

    For tests and small models: an SVD of every matrix at every step. Muon is the optimizer for training.

    Args:
        params: matrices, or groups of them; a group may set split_sizes, num_heads and batched.
        lr: the step's spectral norm; with scale_by_nuclear_norm the inverse of a smoothness.
        scale_by_nuclear_norm: the step that minimizes <G, D> + ||D||^2 / (2 lr) in the spectral norm.
        weight_decay: times lr, or times lr over the first lr: see decay.
        options: decay, cautious, maximize and process_group; see DecayOptions.

    Raises:
        GeometryError: a parameter is not a matrix, or its splits do not fit.
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
        **options: Unpack[DecayOptions],
    ) -> None:
        defaults = {"lr": lr, "scale_by_nuclear_norm": scale_by_nuclear_norm, "weight_decay": weight_decay}
        super().__init__(params, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_iteration("SpecSGD", group["params"], schedule=EXACT, dtype=None)

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        factors_BMN = orthogonalize(matrices_BMN, schedule=EXACT)
        if not group["scale_by_nuclear_norm"]:
            return factors_BMN
        # <G, U V^T> is the sum of the singular values, the nuclear norm: (B, 1, 1).
        nuclear_B11 = (matrices_BMN * factors_BMN).sum(dim=(1, 2), keepdim=True, dtype=torch.float64)
        return factors_BMN * nuclear_B11.to(factors_BMN.dtype)

"""ASGO: Shampoo on the shorter side alone.

M = rows, N = columns, S = the shorter side, L = the longer one, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.engine.kronecker_factors import (
    accumulate,
    accumulate_grams,
    check_betas,
    in_working_dtype,
    inverse_roots,
    rescaled_to_rms,
    stack_buffers,
    state_buffers,
    where_finite,
)
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.options import FactorOptions, MatrixOptions
from trainer_hooks.optim.engine.update import check_settings
from trainer_hooks.optim.known_optimizers import OptimizerFacts


class ASGO(MatrixOptimizer):
    """Momentum times the inverse square root of the gradient's averaged Gram matrix, on the shorter side.

    ASGO whitens a gradient: it averages the matrix of inner products of the gradient's rows (or columns, where these
    are fewer) and multiplies the momentum by the inverse root of that average, so that directions in which gradients
    have been large become small steps and the other way round. It is Shampoo with one of its two factors, so it needs
    less memory and one root per matrix, which is computed at every step.

        V <- beta2 V + (1 - beta2) G G^T  (G^T G of a tall matrix)        m <- beta1 m + (1 - beta1) G
        U = (V + e)^(-1/2) m  (m (V + e)^(-1/2))        W <- W (1 - lr weight_decay) - lr 0.2 (M N)^(1/2) U / |U|

    The update has an RMS of 0.2, as AdamW's have, so V and m need no correction for their first steps. With betas of 0
    it is Muon's, 0.2 max(M, N)^(1/2) times the orthogonal factor of the gradient.

    Args:
        params: matrices, or groups of them. Give embeddings, heads, norms and biases to AdamW. A group may set
            split_sizes (rows of fused projections), num_heads (each head by itself) and batched (stacked experts).
        lr: AdamW's own fits.
        betas: of m and of V, in [0, 1).
        epsilon: e, in units of the largest eigenvalue of V. 0 takes a pseudo-inverse if method is "eigh".
        method: of the root, which is computed at every step: "polar_express" by products, as published, or "eigh",
            exact.
        weight_decay: times lr, or times lr over the first lr: see decay.
        options: decay, cautious, maximize, process_group and spectral_normalization; see FactorOptions.

    Raises:
        GeometryError: a parameter is not a matrix, or its splits do not fit.
        InvalidInputError: a setting out of range.

    State: V and m in float32 (float64 beside float64), on the owner of the matrix. Where V has no finite root, the
        update is along m.
    Source: arXiv:2503.20762 and its code, whose epsilon of 1e-10 is absolute.
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="spectral", learning_rate_coupling="sqrt", averaged_settings=("betas",)
    )
    _allowed_options: ClassVar[type[MatrixOptions]] = FactorOptions
    owns_state: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.8),
        epsilon: float = 1e-6,
        method: Literal["eigh", "polar_express"] = "polar_express",
        weight_decay: float = 0.1,
        **options: Unpack[FactorOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "epsilon": epsilon,
            "method": method,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("ASGO", group["betas"])
        check_settings("ASGO", epsilon=(group["epsilon"], 0, 1))
        if group["method"] not in ("eigh", "polar_express"):
            raise InvalidInputError(f"ASGO has no method={group['method']!r}; there are eigh, polar_express.")

    def _cost(self, parameter: Tensor, group: dict[str, Any]) -> float:
        pieces = self._pieces(torch.empty(parameter.shape, device="meta"), group)
        return float(sum(2 * piece.numel() * min(piece.shape) + 32 * min(piece.shape) ** 3 for piece in pieces))

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        grads_BMN = in_working_dtype(matrices_BMN)
        rows, columns = grads_BMN.shape[-2:]
        beta1, beta2 = group["betas"]
        # V of the shorter side, (S, S) per matrix, and its inverse square root.
        side = min(rows, columns)
        factors = state_buffers(states, "factor", grads_BMN, side, side)
        accumulate_grams(factors, grads_BMN if rows == side else grads_BMN.mT, beta2)
        roots_BSS = inverse_roots(
            torch.stack(factors), exponent=0.5, epsilon=group["epsilon"], relative=True, method=group["method"]
        )
        roots_BSS = where_finite(roots_BSS, torch.eye(side, dtype=roots_BSS.dtype, device=roots_BSS.device))
        # The momentum, multiplied by the root on that side, at an RMS of 0.2.
        momenta_BMN = grads_BMN
        if beta1:
            accumulate(state_buffers(states, "momentum", grads_BMN), grads_BMN, beta1)
            momenta_BMN = stack_buffers(states, "momentum")
        updates_BMN = roots_BSS @ momenta_BMN if rows == side else momenta_BMN @ roots_BSS
        return rescaled_to_rms(updates_BMN, 0.2)

"""Muon: steepest descent in the spectral norm, along the orthogonalized momentum. Hidden matrices only.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.kernels import POLAR_EXPRESS_4, OrthogonalizationSchedule, orthogonalize
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.options import DecayOptions
from trainer_hooks.optim.engine.update import check_settings, gradient_of, state_block
from trainer_hooks.optim.engine.update_scale import Scale, update_scale
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule


def _facts_by_scale(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the scale of the updates, and a transfer rule that divides it out."""
    return {"update_scale": settings["scale"], "transfer_rule": TransferRule("muon", scale=settings["scale"])}


class Muon(MatrixOptimizer):
    """Momentum, orthogonalized matrix by matrix.

    Muon averages the gradients of a weight matrix, and then replaces the average by the nearest matrix with orthogonal
    rows or columns: the same singular vectors, and every singular value 1. A step thus moves all directions of the
    matrix by the same amount, also those in which gradients are small. It is for the hidden matrices of a model only;
    embeddings, heads, norms and biases go to AdamW.

        m <- beta m + (1 - beta) g            u = (1 - beta) g + beta m  (Nesterov)  or  m
        w <- w (1 - lr weight_decay) - lr scale(M, N) orthogonalize(u)

    Args:
        params: matrices, or groups of them. Give embeddings, heads, norms and biases to AdamW. A group may set
            split_sizes (rows of fused projections), num_heads (each head by itself) and batched (stacked experts).
        lr: in units of the scaled update.
        momentum: beta in [0, 1); an average, kept in the parameter's dtype and layout.
        nesterov: look ahead along the momentum.
        weight_decay: times lr, or times lr over the first lr: see decay.
        scale: "shape" max(1, M/N)^(1/2), "spectral" (M/N)^(1/2), "rms_match" 0.2 max(M, N)^(1/2), which gives
            updates the RMS of AdamW's, or "none".
        schedule: polynomials of the orthogonalization; docs/reference/kernels.md has their accuracy. NEWTON_SCHULZ_5
            is the published one: a step more, and farther from the orthogonal factor.
        dtype: of the iteration. None: the parameter's own.
        options: decay, cautious, maximize and process_group; see DecayOptions.

    Raises:
        GeometryError: a parameter is not a matrix, or its splits do not fit.
        InvalidInputError: a setting out of range.

    Source: Jordan et al. 2024 (Muon), EMA form; rms_match: arXiv:2502.16982; spectral: arXiv:2409.20325.
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="spectral",
        learning_rate_coupling="sqrt",
        averaged_settings=("momentum",),
        momentum="average",
        momentum_key="momentum",
        by_settings=_facts_by_scale,
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Scale = "shape",
        schedule: OrthogonalizationSchedule = POLAR_EXPRESS_4,
        dtype: torch.dtype | None = torch.bfloat16,
        **options: Unpack[DecayOptions],
    ) -> None:
        self._schedule, self._dtype = schedule, dtype
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scale": scale,
        }
        super().__init__(params, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings("Muon", momentum=(group["momentum"], 0, 1))
        check_iteration("Muon", group["params"], schedule=self._schedule, dtype=self._dtype)
        update_scale(group["scale"], rows=1, columns=1)

    def _directions(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        # Nesterov momentum, entry by entry: every rank does it for the blocks that it holds.
        grads = [gradient_of(parameter, group) for parameter in parameters]
        momenta = [state_block(self.state[parameter], "momentum", parameter) for parameter in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return list(torch._foreach_lerp(grads, momenta, group["momentum"])) if group["nesterov"] else momenta

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        # Polar Express: each matrix is replaced by the nearest orthogonal one, by products alone.
        return orthogonalize(matrices_BMN, schedule=self._schedule, dtype=self._dtype)

    def _scale(self, rows: int, columns: int, group: dict[str, Any]) -> float:
        return update_scale(group["scale"], rows=rows, columns=columns)


def check_iteration(
    kind: str, parameters: Sequence[Tensor], *, schedule: OrthogonalizationSchedule, dtype: torch.dtype | None
) -> None:
    """Refuse a schedule or a dtype in which these parameters cannot be orthogonalized, at construction on every rank.

    Raises:
        InvalidInputError: names the schedule or the dtype that does not fit.
    """
    if not isinstance(schedule, OrthogonalizationSchedule):
        raise InvalidInputError(
            f"{kind}: schedule is one of trainer_hooks.kernels, such as POLAR_EXPRESS_4, got {schedule!r}."
        )
    # One matrix of one entry in each dtype goes the way that a step will go.
    for served in {parameter.dtype for parameter in parameters}:
        try:
            orthogonalize(torch.zeros(1, 1, dtype=served), schedule=schedule, dtype=dtype)
        except InvalidInputError:
            raise InvalidInputError(
                f"{kind} cannot iterate parameters of {served} in {dtype or served}: float32, float64 and bfloat16 are "
                "served, the exact schedule not in bfloat16; dtype=None iterates in the parameters' own."
            ) from None

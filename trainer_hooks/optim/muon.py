"""Muon: steepest descent in the spectral norm, along the orthogonalized momentum. Hidden matrices only.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.kernels import POLAR_EXPRESS_4, OrthogonalizationSchedule, orthogonalize
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.update import Decay, check_settings, gradient_of, state_block
from trainer_hooks.optim.engine.update_scale import Scale, update_scale
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule


def _facts_by_scale(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scale of the updates, and a transfer rule that divides it out."""
    return {"update_scale": settings["scale"], "transfer_rule": TransferRule("muon", scale=settings["scale"])}


class Muon(MatrixOptimizer):
    """Momentum, orthogonalized matrix by matrix.

        m <- beta m + (1 - beta) g            u = (1 - beta) g + beta m  (Nesterov)  or  m
        w <- w (1 - lr weight_decay) - lr scale(M, N) orthogonalize(u)

    Args:
        params: matrices, or groups of them. Give embeddings, heads, norms and biases to AdamW. A group may say
            split_sizes (rows of fused projections), num_heads (each head by itself) and batched (stacked experts).
        lr: in units of the scaled update.
        momentum: beta in [0, 1); an average, kept in the parameter's dtype and layout.
        nesterov: look ahead along the momentum.
        weight_decay: times lr, or times lr over the first lr: see decay.
        scale: "shape" max(1, M/N)^(1/2), "spectral" (M/N)^(1/2), "rms_match" 0.2 max(M, N)^(1/2), which gives
            updates the RMS of AdamW's, or "none".
        decay: "decoupled" or "independent".
        cautious: decay only entries that the update moves towards zero.
        maximize: ascend.
        schedule: polynomials of the orthogonalization, whose accuracy docs/reference/kernels.md tells. NEWTON_SCHULZ_5
            is the published one: a step more, and farther from the orthogonal factor.
        dtype: of the iteration. None: the parameter's own.
        process_group: ranks that hold copies of the same plain parameters (DDP) and share the work. DTensors need none.

    Raises:
        GeometryError: a parameter is no matrix, or its splits do not fit.
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
        decay: Decay = "decoupled",
        cautious: bool = False,
        maximize: bool = False,
        schedule: OrthogonalizationSchedule = POLAR_EXPRESS_4,
        dtype: torch.dtype | None = torch.bfloat16,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._schedule, self._dtype = schedule, dtype
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scale": scale,
            "decay": decay,
            "cautious": cautious,
            "maximize": maximize,
        }
        super().__init__(params, defaults, process_group=process_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings("Muon", momentum=(group["momentum"], 0, 1))
        check_iteration("Muon", group["params"], schedule=self._schedule, dtype=self._dtype)
        update_scale(group["scale"], rows=1, columns=1)

    def _directions(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        grads = [gradient_of(parameter, group) for parameter in parameters]
        momenta = [state_block(self.state[parameter], "momentum", parameter) for parameter in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return list(torch._foreach_lerp(grads, momenta, group["momentum"])) if group["nesterov"] else momenta

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        return orthogonalize(matrices_BMN, schedule=self._schedule, dtype=self._dtype)

    def _scale(self, rows: int, columns: int, group: dict[str, Any]) -> float:
        return update_scale(group["scale"], rows=rows, columns=columns)


def check_iteration(
    kind: str, parameters: Sequence[Tensor], *, schedule: OrthogonalizationSchedule, dtype: torch.dtype | None
) -> None:
    """Whether parameters of these dtypes can be orthogonalized so, told at construction and on every rank.

    Raises:
        InvalidInputError: names the schedule or the dtype that cannot be.
    """
    if not isinstance(schedule, OrthogonalizationSchedule):
        raise InvalidInputError(
            f"{kind}: schedule is one of trainer_hooks.kernels, such as POLAR_EXPRESS_4, got {schedule!r}."
        )
    for served in {parameter.dtype for parameter in parameters}:
        try:
            orthogonalize(torch.zeros(1, 1, dtype=served), schedule=schedule, dtype=dtype)
        except InvalidInputError:
            raise InvalidInputError(
                f"{kind} cannot iterate parameters of {served} in {dtype or served}: float32, float64 and bfloat16 are "
                "served, the exact schedule not in bfloat16; dtype=None iterates in the parameters' own."
            ) from None

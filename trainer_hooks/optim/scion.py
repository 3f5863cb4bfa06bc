"""Scion: steps to the farthest point of a norm ball, with a norm for each kind of parameter.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod, sqrt
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.kernels import NEWTON_SCHULZ_5, OrthogonalizationSchedule, orthogonalize
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.options import MatrixOptions
from trainer_hooks.optim.engine.update import check_settings, gradient_of, safe_rms, state_block
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule
from trainer_hooks.optim.muon import check_iteration

Norm = Literal["spectral", "sign", "row", "column", "bias_rms"]
"""The ball that a group's steps and, with weight decay, its weights are in. G is a matrix of M rows and N columns.

spectral   (M/N)^(1/2) U V^T                       hidden matrices
sign       sign(G) / N                             heads, tied embeddings; N = 1 for vectors
row        each row over its RMS                   embeddings, (number, width)
column     each column over its RMS                a Linear that reads one-hot vectors
bias_rms   g over its RMS                          biases and other vectors
"""


def _facts_by_norm(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row's fields that the norm of a group changes: only the spectral norm is spectral.

    "sign" is sign exactly; "row", "column" and "bias_rms" move all entries by about as much, and of the geometries
    there are, sign is the closest.
    """
    norm = settings["norm"]
    if norm == "spectral":
        return {}
    return {"geometry": "sign", "update_scale": "none", "normalizes_rows": norm in ("row", "column")}


class Scion(MatrixOptimizer):
    """Linear minimization oracle of an averaged gradient, with a norm per group.

    Scion averages gradients, and steps towards the point of a norm ball that lies farthest along the average. The norm
    fits what a parameter does: hidden matrices are orthogonalized as by Muon, embeddings are normalized row by row,
    the output layer follows signs, vectors are divided by their size. So one optimizer serves the whole model, and a
    learning rate means the same in every layer and at every width.

        d <- beta d + (1 - beta) g
        w <- (1 - lr weight_decay) w - lr scale P(d)        P: see Norm

    P(d) maximizes <d, .> in the norm's unit ball. With weight_decay=1, the constrained form, weights that start in the
    ball of radius `scale` stay in it (lr <= 1), as far as the orthogonalization is exact. 0 is the unconstrained form.

    Args:
        params: parameters, or groups with norm and scale of their own. A matrix's group may set split_sizes, num_heads
            and batched.
        lr: part of the way to the ball's surface.
        momentum: beta in [0, 1), an average; one minus the reference's `momentum`. Kept in the parameter's dtype and
            layout.
        norm: see Norm. Rows of a table that is sharded by rows, or not at all, and signs are taken where they lie.
        scale: radius of the ball. The reference has 50 for spectral and 3000 for sign.
        weight_decay: 1 or 0; other values make the radius scale / weight_decay.
        schedule: polynomials of the orthogonalization; docs/reference/kernels.md has their accuracy.
        dtype: of the iteration. None: the parameter's own.
        options: maximize and process_group; see MatrixOptions.

    Raises:
        GeometryError: a norm that a parameter cannot have, or splits that do not fit.
        InvalidInputError: a setting out of range, or a dtype that the schedule cannot iterate.

    Errors: zero rows, columns and vectors stay zero. Convolutions are (out, in * kernel) matrices throughout.
    Source: Pethick et al. 2025, arXiv:2502.07529. Ours: no epsilon in the norms, so that steps do not shorten
        where gradients are small, down to the least normal number of their dtype.
    """

    _allowed_options: ClassVar[type[MatrixOptions]] = MatrixOptions
    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="spectral",
        learning_rate_coupling="sqrt",
        averaged_settings=("momentum",),
        momentum="average",
        momentum_key="momentum",
        transfer_rule=TransferRule("spectral"),
        update_scale="spectral",
        decay_follows_width=False,  # it holds the weights in a ball, whose norm accounts for the width
        by_settings=_facts_by_norm,
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2**-12,
        *,
        momentum: float = 0.9,
        norm: Norm = "spectral",
        scale: float = 1.0,
        weight_decay: float = 1.0,
        schedule: OrthogonalizationSchedule = NEWTON_SCHULZ_5,
        dtype: torch.dtype | None = torch.bfloat16,
        **options: Unpack[MatrixOptions],
    ) -> None:
        self._schedule, self._dtype = schedule, dtype
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "norm": norm,
            "scale": scale,
            "weight_decay": weight_decay,
            "decay": "decoupled",
        }
        super().__init__(params, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings("Scion", momentum=(group["momentum"], 0, 1), scale=(group["scale"], 0, float("inf")))
        if group["decay"] != "decoupled":
            raise InvalidInputError(
                f"Scion's weight_decay is part of its step, so it has no decay={group['decay']!r}; leave it out."
            )
        if group["norm"] == "spectral":
            check_iteration("Scion", group["params"], schedule=self._schedule, dtype=self._dtype)

    def _check_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        norm = group["norm"]
        if norm not in get_args(Norm):
            raise InvalidInputError(f"Scion has no norm={norm!r}; there are {', '.join(get_args(Norm))}.")
        # Signs are for anything, bias_rms for vectors alone, the others for matrices.
        is_vector = parameter.ndim < 2
        if norm != "sign" and is_vector != (norm == "bias_rms"):
            fitting = "'bias_rms' or 'sign'" if is_vector else "'spectral', 'sign', 'row' or 'column'"
            raise GeometryError(
                f"Scion: a parameter of shape {tuple(parameter.shape)} cannot have norm={norm!r}; give its group "
                f"norm={fitting}."
            )
        if norm != "sign" and not is_vector:
            super()._check_parameter(parameter, group)

    def _step(self) -> None:
        # Parameters that one rank needs whole: matrices, and rows that are cut between ranks.
        super()._step()
        # The others, on every rank where their blocks lie.
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and not self._needs_whole(p, group)]
            averages = self._directions(parameters, group) if parameters else []
            updates = [_local_update(average, p, group) for average, p in zip(averages, parameters, strict=True)]
            self._apply(parameters, [update.mul_(group["scale"]) for update in updates], group)

    def _needs_whole(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        # Singular values and columns cross the blocks of a sharded matrix; signs and rows that are not cut do not.
        norm = group["norm"]
        if norm in ("spectral", "column"):
            return True
        if norm == "sign" or not isinstance(parameter, DTensor):
            return False
        # Dims in front of those that make a row may be cut, counted from either end.
        num_cuttable = parameter.ndim - len(_row_shape(parameter, group))
        cuttable = [*range(num_cuttable), *range(-parameter.ndim, num_cuttable - parameter.ndim)]
        return not all(
            isinstance(placement, Replicate) or getattr(placement, "dim", None) in cuttable
            for placement in parameter.placements
        )

    def _directions(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        averages = [state_block(self.state[parameter], "momentum", parameter) for parameter in parameters]
        grads = [gradient_of(parameter, group) for parameter in parameters]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        return averages

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        if group["norm"] == "spectral":
            return orthogonalize(matrices_BMN, schedule=self._schedule, dtype=self._dtype)
        return _over_rms(matrices_BMN, dim=1 if group["norm"] == "column" else 2)

    def _scale(self, rows: int, columns: int, group: dict[str, Any]) -> float:
        shape = sqrt(rows / columns) if group["norm"] == "spectral" else 1.0
        return shape * float(group["scale"])

    def _pieces(self, whole: Tensor, group: dict[str, Any]) -> list[Tensor]:
        return super()._pieces(whole, group) if whole.ndim >= 2 else [whole.reshape(1, -1)]

    def _cost(self, parameter: Tensor, group: dict[str, Any]) -> float:
        return super()._cost(parameter, group) if group["norm"] == "spectral" else float(parameter.numel())


def _local_update(average: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Return P of a block that holds whole rows, or any part if the norm is sign."""
    row_shape = _row_shape(parameter, group)
    if group["norm"] == "sign":
        return average.sign().div_(prod(row_shape) if parameter.ndim > 1 else 1)
    return _over_rms(average.reshape(-1, prod(row_shape)), dim=1).view(average.shape)


def _row_shape(parameter: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
    """Return the dims that make one row, or all of a vector."""
    if parameter.ndim < 2:
        return tuple(parameter.shape)
    return tuple(parameter.shape[-1:] if group["batched"] else parameter.shape[1:])


def _over_rms(matrices: Tensor, *, dim: int) -> Tensor:
    """Divide by the root mean square along one dim; zero stays zero."""
    sizes = safe_rms(matrices, dim=dim)
    return (matrices / torch.where(sizes == 0, 1, sizes)).to(matrices.dtype)

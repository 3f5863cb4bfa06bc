"""SOAP: Adam in a slowly turning eigenbasis of Shampoo's factors, as published, with a bound on its updates.

M = rows, N = columns, S = side of a factor, B = matrices of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from trainer_hooks.kernels import eigenbasis
from trainer_hooks.optim.engine.kronecker_factors import (
    FactoredOptimizer,
    accumulate,
    accumulate_grams,
    bias_correction,
    check_betas,
    in_working_dtype,
    stack_buffers,
    state_buffers,
    store,
    update_cost,
    where_finite,
)
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.options import FactorOptions
from trainer_hooks.optim.engine.update import check_settings
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule

_SIDES = ("left", "right")


def _facts_by_side(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a transfer rule that leaves out sides that are not rotated."""
    return {"transfer_rule": TransferRule("soap", largest_side=settings["max_preconditioner_dim"])}


class SOAP(FactoredOptimizer):
    """Adam on the gradient rotated into eigenbases of its averaged Gram matrices.

    SOAP runs Adam in the coordinates that Shampoo would precondition in: the eigenvectors of the averaged Gram matrices
    of the gradient's rows and columns. They are followed by one power iteration every few steps, which is much cheaper
    than to compute them anew. Its updates have the size of Adam's, so nothing is grafted.

        G' = Q_L^T G Q_R        m <- beta1 m + (1 - beta1) G'        v <- beta2 v + (1 - beta2) G'^2, entry by entry
        U = m / (v^(1/2) + epsilon) (1 - beta2^t)^(1/2) / (1 - beta1^t)
        W <- (W - lr Q_L U Q_R^T) (1 - lr weight_decay)
        L <- shampoo_beta L + (1 - shampoo_beta) G G^T      R likewise of G^T G

    The first step sets L, R and their eigenvectors and moves nothing; t counts from the second. A step at lr 0 before
    it, as torch takes with zero gradients to make the state, is not counted. Every precondition_frequency updates,
    after the update, the columns of Q are ordered by the diagonal of Q^T L Q, largest first, and Q <- qr(L Q), one
    power iteration. m is carried into the new basis, v is reordered with the columns and not rotated.

    So where the basis turned far, entries of v belong to other directions and may be next to nothing, and U has an RMS
    of up to tens: after a refresh at the first update, and gradients that then fall a hundredfold, 2 to 19; a
    thousandfold, 2 to 42 (24 streams of Gaussian squares, sides of 16 to 64). The guard holds every entry of U to the
    most that gradients can make of it in a basis that stands still, c, by Cauchy and Schwarz

        c^2 = (1 - beta1)^2 (1 - beta2^t) / ((1 - beta2) (1 - beta1^t)^2)  sum_(k < t) (beta1^2 / beta2)^k

    which is 1 for equal betas. Until the first refresh it changes nothing.

    Args:
        params: matrices, or groups of them. Give embeddings, heads, norms and biases to AdamW. A group may set
            split_sizes (rows of fused projections), num_heads (each head by itself) and batched (stacked experts).
        lr: AdamW's own, or somewhat more.
        betas: of the momentum and of the second moments, in [0, 1).
        shampoo_beta: of L and R. None: the second of betas.
        epsilon: added to the square root, before the corrections.
        precondition_frequency: updates between two power iterations.
        max_preconditioner_dim: sides longer than this are not rotated.
        guard: bound the entries of U. False: as published.
        weight_decay: times lr, or times lr over the first lr: see decay. After the step, as published, unless cautious.
        options: decay, cautious, maximize, process_group and spectral_normalization; see FactorOptions.

    Raises:
        GeometryError: a parameter is not a matrix, or its splits do not fit.
        InvalidInputError: a setting out of range.

    State: L, R, Q_L, Q_R, m and v in float32 (float64 beside float64), on the owner of the matrix. What cannot be
        computed leaves the old basis in place.
    Source: arXiv:2409.11321 and its code. Ours: the guard, and a refresh after a batch change.
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="spectral",
        learning_rate_coupling="sqrt",
        averaged_settings=("betas", "shampoo_beta"),
        by_settings=_facts_by_side,
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        epsilon: float = 1e-8,
        precondition_frequency: int = 10,
        max_preconditioner_dim: int = 10000,
        guard: bool = True,
        weight_decay: float = 0.01,
        **options: Unpack[FactorOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "epsilon": epsilon,
            "precondition_frequency": precondition_frequency,
            "max_preconditioner_dim": max_preconditioner_dim,
            "guard": guard,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("SOAP", group["betas"])
        if group["shampoo_beta"] is None:
            group["shampoo_beta"] = group["betas"][1]
        check_settings("SOAP", shampoo_beta=(group["shampoo_beta"], 0, 1), epsilon=(group["epsilon"], 0, float("inf")))

    def _block_size(self, group: dict[str, Any]) -> int | None:
        return None

    def _cost(self, parameter: Tensor, group: dict[str, Any]) -> float:
        frequency, longest = group["precondition_frequency"], group["max_preconditioner_dim"]
        pieces = self._pieces(torch.empty(parameter.shape, device="meta"), group)
        return sum(update_cost(*piece.shape, frequency=frequency, longest_side=longest) for piece in pieces)

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        grads_BMN = in_working_dtype(matrices_BMN)
        num_updates = step - 1
        # The first step makes the state, which checkpoints are read into; the others run Adam between the eigenbases.
        if num_updates == 0:
            updates_BMN = torch.zeros_like(grads_BMN)
            state_buffers(states, "momentum", grads_BMN)
            state_buffers(states, "second_moment", grads_BMN)
        else:
            rotated_BMN = _adam(_turned(grads_BMN, states), states, group, num_updates)
            updates_BMN = _turned(rotated_BMN, states, back=True)
        # The factors see the gradient after the update, and the bases follow the factors.
        _observe(grads_BMN, states, group)
        if num_updates == 0:
            _begin(states)
        elif group["refresh_due"] or num_updates % group["precondition_frequency"] == 0:
            _refresh(states)
        return updates_BMN

    def _apply(self, parameters: Sequence[Tensor], updates: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Step, then decay. The first gradient of a parameter does neither."""
        # A first step at lr 0, which torch takes to make the state, is not counted.
        moves = [int(self.state[parameter]["step"]) > 1 for parameter in parameters]
        if group["lr"] == 0:
            for parameter, is_moved in zip(parameters, moves, strict=True):
                if not is_moved:
                    self.state[parameter]["step"].zero_()
        # As published: the step, then the decay of what it left. Cautious decay needs the update and comes first.
        parameters, updates = list(compress(parameters, moves)), list(compress(updates, moves))
        if group["cautious"] or not group["weight_decay"]:
            super()._apply(parameters, updates, group)
        elif parameters:
            super()._apply(parameters, updates, {**group, "weight_decay": 0.0})
            torch._foreach_zero_(updates)
            super()._apply(parameters, updates, group)


def _adam(rotated_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], num_updates: int) -> Tensor:
    """Return Adam's update of rotated gradients, in their basis."""
    beta1, beta2 = group["betas"]
    momenta = state_buffers(states, "momentum", rotated_BMN)
    second_moments = state_buffers(states, "second_moment", rotated_BMN)
    accumulate(momenta, rotated_BMN, beta1)
    accumulate(second_moments, rotated_BMN.square(), beta2)
    # Epsilon is added before the corrections for the first steps.
    denominators_BMN = torch.stack(second_moments).sqrt_().add_(group["epsilon"])
    size = math.sqrt(bias_correction(beta2, num_updates)) / bias_correction(beta1, num_updates)
    updates_BMN = torch.stack(momenta).div_(denominators_BMN).mul_(size)
    if not group["guard"]:
        return updates_BMN
    bound = _largest_entry(beta1, beta2, num_updates)
    return updates_BMN.clamp_(-bound, bound)


def _largest_entry(beta1: float, beta2: float, num_updates: int) -> float:
    """Return the bound c of the class: no gradients let an entry of Adam's update, epsilon 0, exceed it."""
    if beta2 == 0:
        return math.inf if beta1 else 1.0
    ratio = beta1**2 / beta2
    total = num_updates if ratio == 1 else (1 - ratio**num_updates) / (1 - ratio)
    weight = (1 - beta1) / bias_correction(beta1, num_updates)
    return weight * math.sqrt(bias_correction(beta2, num_updates) / (1 - beta2) * total)


def _observe(grads_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any]) -> None:
    """Average this gradient into the factors of sides that are not too long."""
    for side, matrices_BSL in zip(_SIDES, (grads_BMN, grads_BMN.mT), strict=True):
        length = matrices_BSL.shape[-2]
        if length <= group["max_preconditioner_dim"]:
            accumulate_grams(
                state_buffers(states, side, grads_BMN, length, length), matrices_BSL, group["shampoo_beta"]
            )


def _turned(matrices_BMN: Tensor, states: Sequence[MatrixState], *, back: bool = False) -> Tensor:
    """Rotate matrices into the eigenbases, or back."""
    if "left_basis" in states[0]:
        left_BMM = stack_buffers(states, "left_basis")
        matrices_BMN = (left_BMM if back else left_BMM.mT) @ matrices_BMN
    if "right_basis" in states[0]:
        right_BNN = stack_buffers(states, "right_basis")
        matrices_BMN = matrices_BMN @ (right_BNN.mT if back else right_BNN)
    return matrices_BMN


def _begin(states: Sequence[MatrixState]) -> None:
    """Set the first bases, the eigenvectors of the factors; the identity where a factor has none."""
    for side in _SIDES:
        if side in states[0]:
            factors_BSS = stack_buffers(states, side)
            identity_SS = torch.eye(factors_BSS.shape[-1], dtype=factors_BSS.dtype, device=factors_BSS.device)
            store(states, f"{side}_basis", where_finite(eigenbasis(factors_BSS), identity_SS))


def _refresh(states: Sequence[MatrixState]) -> None:
    """Turn the bases by one power iteration: m goes with the basis, v with the order of its columns."""
    momenta_BMN = _turned(stack_buffers(states, "momentum"), states, back=True)
    second_moments_BMN = stack_buffers(states, "second_moment")
    for side, dim in zip(_SIDES, (-2, -1), strict=True):
        if side not in states[0]:
            continue
        # Columns by the diagonal of Q^T L Q, largest first, then Q <- qr(L Q); a basis that is not finite stays.
        factors_BSS, bases_BSS = stack_buffers(states, side), stack_buffers(states, f"{side}_basis")
        images_BSS = factors_BSS @ bases_BSS
        order_BS = (bases_BSS * images_BSS).sum(-2).argsort(dim=-1, descending=True, stable=True)
        turned_BSS, _ = torch.linalg.qr(images_BSS.take_along_dim(order_BS.unsqueeze(-2), dim=-1))
        store(states, f"{side}_basis", where_finite(turned_BSS, bases_BSS))
        second_moments_BMN = second_moments_BMN.take_along_dim(order_BS.unsqueeze(-1 if dim == -2 else -2), dim=dim)
    # m, which was rotated out of the old bases above, into the new ones.
    for name, matrices_BMN in (("momentum", _turned(momenta_BMN, states)), ("second_moment", second_moments_BMN)):
        torch._foreach_copy_([state[name] for state in states], list(matrices_BMN.unbind()))

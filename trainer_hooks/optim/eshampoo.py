"""EShampoo: Adam in the eigenbasis of Shampoo's factors, which is refreshed only when it no longer fits.

M = rows, N = columns, S = side of a factor, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from trainer_hooks.kernels import eigenbasis, needs_refresh, refreshed_basis
from trainer_hooks.optim.engine.kronecker_factors import (
    FactoredOptimizer,
    accumulate,
    accumulate_grams,
    bias_correction,
    check_betas,
    check_counts,
    in_working_dtype,
    is_refresh_due,
    stack_buffers,
    state_buffers,
    store,
    where_finite,
)
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.options import FactorOptions
from trainer_hooks.optim.engine.update import check_settings
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule

_SIDES = ("left", "right")


def _facts_by_block(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a transfer rule that counts the blocks of a matrix."""
    return {"transfer_rule": TransferRule("soap", block_size=settings["max_preconditioner_dim"])}


class EShampoo(FactoredOptimizer):
    """Shampoo with corrected eigenvalues: second moments measured in the factors' eigenbasis, so nothing is grafted.

    EShampoo looks at a gradient matrix in the coordinates in which the entries of past gradients were uncorrelated, the
    eigenvectors of its averaged Gram matrices, and runs Adam there: every coordinate gets a step of its own. The
    coordinates turn slowly, so they are computed anew only when they no longer fit, and the averages of Adam are
    carried into the new ones.

        L <- beta2 L + (1 - beta2) G G^T        R <- beta2 R + (1 - beta2) G^T G
        G' = Q_L^T G Q_R        m <- beta1 m + (1 - beta1) G'        D <- beta2 D + (1 - beta2) G'^2, entry by entry
        W <- W (1 - lr weight_decay) - lr Q_L [m_hat / (D_hat^(1/2) + epsilon)] Q_R^T         hat: over 1 - beta^t

    Q_L and Q_R hold eigenvectors of L and R. Every precondition_frequency steps B = Q^T L Q is looked at (and likewise
    for R), and Q is refreshed unless |B - diag(B)| <= tolerance |B|, Frobenius norms; each side by itself. Before the
    first eigenvectors Q is the identity, and the update is AdamW's.

    A refresh carries m and D into the new basis. With P = Q_new^T Q_old on either side,

        m <- P_L m P_R^T, exact            D <- (P_L o P_L) D (P_R o P_R)^T, o entry by entry

    The second is exact if entries of G' were uncorrelated in the old basis. Rows and columns of P o P add up to one, so
    the sum of D, the mean squared gradient, is kept; where P only reorders or flips eigenvectors, D is reordered.

    Args:
        params: matrices, or groups of them. Give embeddings, heads, norms and biases to AdamW. A group may set
            split_sizes (rows of fused projections), num_heads (each head by itself) and batched (stacked experts).
        lr: AdamW's own.
        betas: of the momentum, and of factors and second moments, in [0, 1).
        epsilon: added to the square root.
        tolerance: tau in [0, 1]; 0 refreshes at every look.
        precondition_frequency: steps between two looks.
        qr_iterations: 0 computes eigenvectors afresh; else the old ones are improved by at most so many steps of the
            QR algorithm.
        start_preconditioning_step: of the first eigenvectors, counted from 1, and at least 2; until then the update is
            AdamW's. In the basis of its own Gram matrices the first gradient is diagonal, and beside the diagonal Adam
            would divide rounding by rounding.
        max_preconditioner_dim: larger matrices are cut into blocks of at most this side, each with its own factors.
        weight_decay: times lr, or times lr over the first lr: see decay.
        options: decay, cautious, maximize, process_group and spectral_normalization; see FactorOptions.

    Raises:
        GeometryError: a parameter is not a matrix, or its splits do not fit.
        InvalidInputError: a setting out of range.

    State: L, R, Q_L, Q_R, m and D in float32 (float64 beside float64), on the owner of the matrix, and refreshes, how
        often (Q_L, Q_R) were replaced. What cannot be computed leaves the old basis in place.
    Source: arXiv:2506.03595; m and D carried over are ours: the source keeps D of the old basis as it is.
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="spectral",
        learning_rate_coupling="sqrt",
        averaged_settings=("betas",),
        by_settings=_facts_by_block,
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        tolerance: float = 0.1,
        precondition_frequency: int = 50,
        qr_iterations: int = 0,
        start_preconditioning_step: int = 2,
        max_preconditioner_dim: int = 1024,
        weight_decay: float = 0.0,
        **options: Unpack[FactorOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "epsilon": epsilon,
            "tolerance": tolerance,
            "precondition_frequency": precondition_frequency,
            "qr_iterations": qr_iterations,
            "start_preconditioning_step": start_preconditioning_step,
            "max_preconditioner_dim": max_preconditioner_dim,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("EShampoo", group["betas"])
        check_settings("EShampoo", epsilon=(group["epsilon"], 0, float("inf")))
        check_settings("EShampoo", tolerance=(group["tolerance"], 0, 1 + 1e-9))
        check_counts("EShampoo", group, start_preconditioning_step=2, qr_iterations=0)

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        grads_BMN = in_working_dtype(matrices_BMN)
        rows, columns = grads_BMN.shape[-2:]
        beta1, beta2 = group["betas"]
        # Factors L (M, M) and R (N, N), and everything else that a checkpoint is read into.
        accumulate_grams(state_buffers(states, "left", grads_BMN, rows, rows), grads_BMN, beta2)
        accumulate_grams(state_buffers(states, "right", grads_BMN, columns, columns), grads_BMN.mT, beta2)
        momenta = state_buffers(states, "momentum", grads_BMN)
        second_moments = state_buffers(states, "second_moment", grads_BMN)
        _begin(states)
        if is_refresh_due(step, group):
            _refresh(states, group, is_first=step == group["start_preconditioning_step"])
        # The gradient in the eigenbases, and Adam's update there.
        rotated = step >= group["start_preconditioning_step"]
        if rotated:
            left_BMM, right_BNN = (stack_buffers(states, f"{side}_basis") for side in _SIDES)
            grads_BMN = left_BMM.mT @ grads_BMN @ right_BNN
        accumulate(momenta, grads_BMN, beta1)
        accumulate(second_moments, grads_BMN.square(), beta2)
        denominators_BMN = torch.stack(second_moments).div_(bias_correction(beta2, step)).sqrt_().add_(group["epsilon"])
        updates_BMN = torch.stack(momenta).div_(denominators_BMN).div_(bias_correction(beta1, step))
        # The update in the matrix's own coordinates.
        return left_BMM @ updates_BMN @ right_BNN.mT if rotated else updates_BMN


def _begin(states: Sequence[MatrixState]) -> None:
    """Make the bases at the first step, because checkpoints are read into what the first step has made."""
    for state in states:
        if "refreshes" not in state:
            for side in _SIDES:
                state[f"{side}_basis"] = torch.eye(len(state[side]), dtype=state[side].dtype, device=state[side].device)
            state["refreshes"] = torch.zeros(2, dtype=torch.int64, device=state["left"].device)


def _refresh(states: Sequence[MatrixState], group: dict[str, Any], *, is_first: bool) -> None:
    """Replace the bases that do not fit any more, and carry over what was measured in them."""
    # The criterion decides by side and matrix; at the start every basis is new.
    stale = [[True] * len(states)] * 2 if is_first else _stale(states, group["tolerance"])
    for number, side in enumerate(_SIDES):
        chosen = [state for state, is_stale in zip(states, stale[number], strict=True) if is_stale]
        if not chosen:
            continue
        # Eigenvectors afresh, or the old ones improved by QR steps; those that are not finite stay as they were.
        factors_BSS, previous_BSS = stack_buffers(chosen, side), stack_buffers(chosen, f"{side}_basis")
        if is_first or not group["qr_iterations"]:
            bases_BSS = eigenbasis(factors_BSS)
        else:
            bases_BSS = refreshed_basis(
                factors_BSS, previous_BSS, tolerance=group["tolerance"], max_iterations=group["qr_iterations"]
            ).basis
        _turn(chosen, side, previous_BSS, where_finite(bases_BSS, previous_BSS))
        torch._foreach_add_([state["refreshes"][number] for state in chosen], 1)


def _stale(states: Sequence[MatrixState], tolerance: float) -> list[list[bool]]:
    """Return which bases fail the criterion, by side and matrix. This is the one copy to the host."""
    failing = [
        needs_refresh(stack_buffers(states, side), stack_buffers(states, f"{side}_basis"), tolerance) for side in _SIDES
    ]
    stale: list[list[bool]] = torch.stack(failing).tolist()
    return stale


def _turn(states: Sequence[MatrixState], side: str, previous_BSS: Tensor, bases_BSS: Tensor) -> None:
    """Take another basis, and carry momentum and second moments into it."""
    store(states, f"{side}_basis", bases_BSS)
    turn_BSS = bases_BSS.mT @ previous_BSS  # P of the class: old coordinates to new ones
    for name, matrix_BSS in (("momentum", turn_BSS), ("second_moment", turn_BSS.square())):
        old_BMN = stack_buffers(states, name)
        carried_BMN = matrix_BSS @ old_BMN if side == "left" else old_BMN @ matrix_BSS.mT
        torch._foreach_copy_([state[name] for state in states], list(carried_BMN.unbind()))

"""Kronecker factors of the Shampoo family: their averages, when they are decomposed, and what if that fails.

M = rows, N = columns, S = side of a factor, L = the side summed over, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.kernels import InverseRootMethod, inverse_root
from trainer_hooks.kernels.inverse_roots import eigenvalues_and_basis
from trainer_hooks.kernels.symmetric import gram, in_blocks
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.engine.options import FactorOptions, MatrixOptions
from trainer_hooks.optim.engine.update import check_settings, safe_rms

_DECOMPOSITION = 10.0
"""Cost of one eigendecomposition over that of one product of the same side. 6 on a core of a CPU, more on a GPU."""


class FactoredOptimizer(MatrixOptimizer):
    """Base of optimizers that decompose the factors of a matrix every precondition_frequency steps.

    Groups have precondition_frequency and max_preconditioner_dim, and start_preconditioning_step for is_refresh_due.
    """

    _allowed_options: ClassVar[type[MatrixOptions]] = FactorOptions
    owns_state: ClassVar[bool] = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], options: MatrixOptions) -> None:
        super().__init__(params, {**defaults, "refresh_due": False}, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        kind = type(self).__name__
        check_counts(kind, group, precondition_frequency=1, max_preconditioner_dim=1)

    def _step(self) -> None:
        super()._step()
        # Every owner has looked at its factors in this step.
        for group in self.param_groups:
            group["refresh_due"] = False

    def on_batch_change(self, *, global_batch_size: int, previous: int) -> None:
        """Look at the factors again at the next step: what they hold of the noise goes with 1 / batch size.

        Called on every rank after the step at which the batch changed. Does not communicate.
        """
        if global_batch_size != previous:
            for group in self.param_groups:
                group["refresh_due"] = True

    def _block_size(self, group: dict[str, Any]) -> int | None:
        return int(group["max_preconditioner_dim"])

    def _cost(self, parameter: Tensor, group: dict[str, Any]) -> float:
        pieces = self._pieces(torch.empty(parameter.shape, device="meta"), group)
        return sum(update_cost(*piece.shape, frequency=group["precondition_frequency"]) for piece in pieces)


def update_cost(rows: int, columns: int, *, frequency: int, longest_side: int | None = None) -> float:
    """Count multiplications of one update of a (rows, columns) matrix: products, and decompositions now and then.

    Sides above longest_side have neither.
    """
    # Two products with each side's root or basis, and its decomposition, spread over the steps between two of them.
    sides = [side for side in (rows, columns) if longest_side is None or side <= longest_side]
    products = 2.0 * rows * columns * sum(sides)
    return products + _DECOMPOSITION * sum(side**3 for side in sides) / frequency


def is_refresh_due(step: int, group: dict[str, Any]) -> bool:
    """Return whether factors are decomposed now: at the start, every so many steps, and after a batch change."""
    since_start: int = step - group["start_preconditioning_step"]
    return since_start >= 0 and bool(group["refresh_due"] or since_start % group["precondition_frequency"] == 0)


def check_counts(kind: str, group: Mapping[str, Any], **least: int) -> None:
    """Refuse settings that are not whole numbers from a least one on.

    Raises:
        InvalidInputError: names the setting, its value and its range.
    """
    for name, first in least.items():
        if not isinstance(group[name], int) or group[name] < first:
            raise InvalidInputError(f"{kind} counts {name} in whole numbers from {first}, got {name}={group[name]!r}.")


def check_betas(kind: str, betas: tuple[float, float], *, sum_allowed: bool = False) -> None:
    """Refuse weights of the past out of [0, 1); the second may be 1, a sum, if that is allowed.

    Raises:
        InvalidInputError: names the weight, its value and its range.
    """
    first, second = betas
    check_settings(kind, **{"betas[0]": (first, 0, 1)})
    if not (sum_allowed and second == 1):
        check_settings(kind, **{"betas[1]": (second, 0, 1)})


def bias_correction(beta: float, step: int) -> float:
    """Return the sum of the weights in an average that began with zero `step` steps ago; 1 for a sum."""
    return 1.0 if beta == 1 else 1 - beta**step


def rescaled_to_rms(updates_BMN: Tensor, rms: Tensor | float) -> Tensor:
    """Rescale updates to this root mean square; zero stays zero."""
    # Also where squares of the updates overflow or vanish.
    present_B11 = safe_rms(updates_BMN, dim=(1, 2))
    return updates_BMN / torch.where(present_B11 == 0, 1, present_B11) * rms


def in_working_dtype(matrices: Tensor) -> Tensor:
    """Return float64 as it is, everything else in float32."""
    return matrices.to(torch.promote_types(matrices.dtype, torch.float32))


def state_buffers(states: Sequence[MatrixState], name: str, like_BMN: Tensor, *shape: int) -> list[Tensor]:
    """Return a buffer of every matrix, of this shape or of the matrices', made of zeros when there is none yet."""
    for state in states:
        if name not in state:
            state[name] = like_BMN.new_zeros(shape or like_BMN.shape[1:])
    return [state[name] for state in states]


def accumulate(buffers: list[Tensor], terms_BMN: Tensor, beta: float, *, scale: float = 1.0) -> None:
    """Let buffer <- beta buffer + (1 - beta) scale term, or buffer + scale term where beta is 1."""
    if beta != 1:
        torch._foreach_mul_(buffers, beta)
    torch._foreach_add_(buffers, list(terms_BMN.unbind()), alpha=scale if beta == 1 else (1 - beta) * scale)


def accumulate_grams(factors: list[Tensor], matrices_BSL: Tensor, beta: float, *, scale: float = 1.0) -> None:
    """Let factor <- beta factor + (1 - beta) scale X X^T, or factor + scale X X^T where beta is 1."""
    # Large products are computed one by one, their upper half alone; small ones in one batch.
    if in_blocks(matrices_BSL[0]):
        for factor, matrix_SL in zip(factors, matrices_BSL, strict=True):
            accumulate([factor], gram(matrix_SL).unsqueeze(0), beta, scale=scale)
    else:
        accumulate(factors, gram(matrices_BSL), beta, scale=scale)


def inverse_roots(
    factors_BSS: Tensor, *, exponent: float, epsilon: float, relative: bool, method: InverseRootMethod
) -> Tensor:
    """Compute (A + e I)^(-exponent), or its pseudo-inverse without epsilon: NaN where there is none, or A is 0.

    Args:
        factors_BSS: symmetric, positive semidefinite.
        exponent: over 0.
        epsilon: e, in units of the largest eigenvalue if relative.
        relative: see epsilon.
        method: see InverseRootMethod. Without epsilon, "eigh" takes eigenvalues of up to eps S times the largest,
            eps that of the dtype, for rounding, and puts them to zero.
    """
    if epsilon > 0 or method != "eigh":
        return inverse_root(factors_BSS, root=1 / exponent, epsilon=epsilon, relative=relative, method=method)
    values_BS, bases_BSS = _damped_eigenvalues(factors_BSS, epsilon=epsilon, relative=relative)
    return _between_bases(bases_BSS, values_BS.pow(-exponent)).to(factors_BSS.dtype)


def corrected_inverse_roots(
    factors_BSS: Tensor,
    half_A_BSL: Tensor,
    half_B_BSL: Tensor,
    *,
    weight: float,
    exponent: float,
    epsilon: float,
    relative: bool,
) -> Tensor:
    """Compute (A + e I)^(-p) without, to second order, the bias that the noise of its eigenvalues brings.

        Q diag(max(0, (l + e)^(-p) - p (p + 1) / 2 (l + e)^(-p-2) Var(l))) Q^T
        Var(l_k) = weight^2 (|q_k^T A|^2 - |q_k^T B|^2)^2 / 2

    Args:
        factors_BSS: symmetric, positive semidefinite; half B's Gram matrix has this weight in them.
        half_A_BSL: a gradient as noisy as half B's, from other samples.
        half_B_BSL: the gradient whose Gram matrix the factors took last.
        weight: of that Gram matrix.
        exponent: p.
        epsilon: e, see inverse_roots.
        relative: see inverse_roots.
    """
    values_BS, bases_BSS = _damped_eigenvalues(factors_BSS, epsilon=epsilon, relative=relative)
    # |q_k^T A|^2 and |q_k^T B|^2 of every eigenvector: their difference is noise alone, and estimates Var(l_k).
    seen_A_BS, seen_B_BS = (
        (bases_BSS.mT @ half_BSL.to(bases_BSS.dtype)).square().sum(-1) for half_BSL in (half_A_BSL, half_B_BSL)
    )
    relative_variance_BS = (weight * (seen_A_BS - seen_B_BS) / values_BS).square() / 2
    # The root of every eigenvalue, shrunk by the bias that this variance gives it.
    shrinkage_BS = (1 - exponent * (exponent + 1) / 2 * relative_variance_BS).clamp_min(0)
    return _between_bases(bases_BSS, values_BS.pow(-exponent) * shrinkage_BS).to(factors_BSS.dtype)


def _damped_eigenvalues(factors_BSS: Tensor, *, epsilon: float, relative: bool) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, damped, or infinite where they are rounding and nothing damps them, and their vectors.

    Without damping all those of a zero matrix are NaN: it holds nothing of the gradient, and its pseudo-inverse, zero,
    would stop every update.
    """
    # Damped, as it is or in units of the largest one.
    values_BS, bases_BSS = eigenvalues_and_basis(factors_BSS)
    largest_B1 = values_BS[:, -1:]
    if epsilon > 0:
        return values_BS.clamp_min(0) + (epsilon * largest_B1 if relative else epsilon), bases_BSS
    # Undamped: eigenvalues that rounding alone may have made have no inverse.
    rounding = torch.finfo(factors_BSS.dtype).eps * values_BS.shape[-1]
    values_BS = torch.where(values_BS <= rounding * largest_B1, torch.inf, values_BS)
    return torch.where(largest_B1 > 0, values_BS, torch.nan), bases_BSS


def _between_bases(bases_BSS: Tensor, values_BS: Tensor) -> Tensor:
    """Return Q diag(values) Q^T, (B, S, S)."""
    matrices_BSS: Tensor = (bases_BSS * values_BS.unsqueeze(-2)) @ bases_BSS.mT
    return matrices_BSS


def where_finite(matrices_BSS: Tensor, previous_BSS: Tensor) -> Tensor:
    """Return each new root or basis, or the one before where the new one is not finite."""
    is_finite_B11 = matrices_BSS.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(is_finite_B11, matrices_BSS, previous_BSS)


def store(states: Sequence[MatrixState], name: str, matrices_BSS: Tensor) -> None:
    """Keep each matrix in the state of its own, and in memory of its own."""
    for state, matrix_SS in zip(states, matrices_BSS, strict=True):
        state[name] = matrix_SS.clone()


def stack_buffers(states: Sequence[MatrixState], name: str) -> Tensor:
    """Stack a buffer of every matrix, (B, ...)."""
    return torch.stack([state[name] for state in states])

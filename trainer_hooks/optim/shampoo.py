"""Shampoo: the momentum between inverse roots of two averaged Gram matrices of the gradient.

M = rows, N = columns, S = side of a factor, B = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.engine.kronecker_factors import (
    FactoredOptimizer,
    accumulate,
    accumulate_grams,
    bias_correction,
    check_betas,
    check_counts,
    corrected_inverse_roots,
    in_working_dtype,
    inverse_roots,
    is_refresh_due,
    rescaled_to_rms,
    stack_buffers,
    state_buffers,
    store,
    where_finite,
)
from trainer_hooks.optim.engine.matrices import MatrixState
from trainer_hooks.optim.engine.options import FactorOptions
from trainer_hooks.optim.engine.split_halves import HalvesMixin
from trainer_hooks.optim.engine.update import blocks_of, check_settings, safe_rms
from trainer_hooks.optim.known_optimizers import OptimizerFacts, RuleName, TransferRule

Factors = Literal["gradient", "kl"]
"""Quantity that the factors average: G G^T and G^T G, or the same with the other side whitened (KL-Shampoo)."""
Grafting = Literal["adam", "rms_match", "none"]
"""Magnitude that the update of a block gets: that of Adam's update, an RMS of 0.2, or its own."""


def _facts_by_grafting(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the transfer rule of the magnitude that updates get; none is known for whitened factors' own."""
    grafting = settings["grafting"]
    if settings["factors"] == "kl" and grafting == "none":
        return {}
    name: RuleName = "grafted_shampoo" if grafting == "adam" else "shampoo"
    rule = TransferRule(
        name,
        scale="rms_match" if grafting == "rms_match" else "none",
        exponent=settings["exponent"],
        block_size=settings["max_preconditioner_dim"],
    )
    return {"transfer_rule": rule}


class Shampoo(HalvesMixin, FactoredOptimizer):
    """Momentum between inverse roots of the gradient's row and column Gram matrices, block by block.

    Shampoo averages two small matrices per weight matrix, of inner products between the gradient's rows and between
    its columns, and multiplies the momentum by an inverse root of each. Directions in which gradients have been large
    are made small and the other way round, so that a step comes near to that of AdaGrad with its full matrix, at the
    cost of two decompositions now and then. How long the step is, it usually takes from Adam (grafting).

        L <- beta2 L + (1 - beta2) G G^T        R <- beta2 R + (1 - beta2) G^T G        m <- beta1 m + (1 - beta1) G
        U = (L_hat + e)^(-p) m_hat (R_hat + e)^(-p)                 hat: over 1 - beta^t, the sum of the weights
        W <- W (1 - lr weight_decay) - lr graft(U)

        factors="kl"    L <- beta2 L + (1 - beta2) G R'^-1 G^T / N  R <- beta2 R + (1 - beta2) G^T L'^-1 G / M
                        L'^-1, R'^-1: the squares of the last roots, the identity before the first
        grafting        "adam"       U |A| / |U|, A = m_hat / (v_hat^(1/2) + grafting_epsilon), Frobenius norms
                        "rms_match"  U 0.2 (M N)^(1/2) / |U|, an RMS of 0.2, as AdamW's updates have
                        "none"       U

    With update_bias_correction, and after supply_halves, the numerator and the denominator see different samples: m
    averages the gradient of half A, and L and R those of half B. Roots taken at such a step give way to

        Q diag(max(0, (l + e)^(-p) - p (p + 1) / 2 (l + e)^(-p-2) Var(l))) Q^T          Q diag(l) Q^T = L_hat
        Var(l_k) = w^2 (|q_k^T G_A|^2 - |q_k^T G_B|^2)^2 / 2        w = (1 - beta2) / (1 - beta2^t), or 1 for a sum

    which removes to second order what the noise of this step's l adds to its inverse root; 5/32 for p = 1/4.

    Without averages (betas of 0), epsilon and grafting, exponent 1/4 gives the orthogonal factor of the gradient.

    Args:
        params: matrices, or groups of them. Give embeddings, heads, norms and biases to AdamW. A group may set
            split_sizes (rows of fused projections), num_heads (each head by itself) and batched (stacked experts).
        lr: in units of the grafted update; AdamW's own fits "adam" and "rms_match".
        betas: of the momentum, in [0, 1), and of the factors, in [0, 1]; 1 sums them up (AdaGrad) and corrects nothing.
        epsilon: e, added to the eigenvalues of a factor, after the correction: times the largest of them if
            relative_epsilon, else as it is. 0 takes a pseudo-inverse, which a zero factor has not.
        relative_epsilon: the update then does not depend on the scale of the gradient.
        exponent: p, 1/4 or 1/2; "kl" needs 1/2.
        factors: "gradient" or "kl", the quantity that L and R average.
        method: of the roots, "eigh" or "newton"; the latter never waits for a GPU, needs an epsilon, and is off by up
            to 1e-2 in float32 at the default one.
        nesterov: look ahead, m_hat = (beta1 m + (1 - beta1) G) / (1 - beta1^(t+1)).
        precondition_frequency: steps between two roots; those in between use the old ones.
        start_preconditioning_step: of the first roots, counted from 1. Until then the update is Adam's ("adam"), or the
            momentum at an RMS of 0.2 ("rms_match").
        max_preconditioner_dim: larger matrices are cut into blocks of at most this side, each with its own factors.
        grafting: "adam", "rms_match" or "none", the magnitude of an update, per block. A zero update stays zero.
        grafting_beta2: of v, the diagonal second moment, the only state of grafting="adam".
        grafting_epsilon: of grafting="adam".
        update_bias_correction: use halves of the batch where they are supplied; for factors="gradient" and
            method="eigh" only.
        weight_decay: times lr, or times lr over the first lr: see decay.
        options: decay, cautious, maximize, process_group and spectral_normalization; see FactorOptions.

    Raises:
        GeometryError: a parameter is not a matrix, or its splits do not fit.
        InvalidInputError: a setting out of range, or two that exclude each other.

    State: L, R and their roots, m and v, in float32 (float64 beside float64), on the owner of the matrix. A root that
        cannot be computed in float32 is tried in float64; if that fails, too, the old one stays, at first
        the identity.
    Source: arXiv:1802.09568; averages, grafting, blocks: arXiv:2309.06497; exponent 1/2: arXiv:2602.09314. KL-Shampoo:
        arXiv:2509.03378; with amortized roots and corrected averages ours. Update bias: arXiv:2605.20756; ours from two
        halves in place of many micro-batches.
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="spectral",
        learning_rate_coupling="sqrt",
        averaged_settings=("betas", "grafting_beta2"),
        by_settings=_facts_by_grafting,
    )
    _not_copied: ClassVar[tuple[str, ...]] = ("_halves",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-6,
        relative_epsilon: bool = True,
        exponent: float = 0.25,
        factors: Factors = "gradient",
        method: Literal["eigh", "newton"] = "eigh",
        nesterov: bool = False,
        precondition_frequency: int = 50,
        start_preconditioning_step: int = 1,
        max_preconditioner_dim: int = 1024,
        grafting: Grafting = "adam",
        grafting_beta2: float = 0.999,
        grafting_epsilon: float = 1e-8,
        update_bias_correction: bool = False,
        weight_decay: float = 0.0,
        **options: Unpack[FactorOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "epsilon": epsilon,
            "relative_epsilon": relative_epsilon,
            "exponent": exponent,
            "factors": factors,
            "method": method,
            "nesterov": nesterov,
            "precondition_frequency": precondition_frequency,
            "start_preconditioning_step": start_preconditioning_step,
            "max_preconditioner_dim": max_preconditioner_dim,
            "grafting": grafting,
            "grafting_beta2": grafting_beta2,
            "grafting_epsilon": grafting_epsilon,
            "update_bias_correction": update_bias_correction,
            "weight_decay": weight_decay,
        }
        self._differences: dict[Tensor, list[Tensor]] = {}
        super().__init__(params, defaults, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check(group)

    def _step(self) -> None:
        self._share_halves()
        super()._step()

    def _share_halves(self) -> None:
        """Bring the halves' differences to the owners of their matrices.

        Every rank reaches every exchange: all were supplied for the same parameters, and those without a difference
        send zeros.
        """
        # A session supplies all ranks or none, so all or none come to the exchanges.
        halves = self._take_halves()
        for exchange, members in self._divided() if halves else ():
            blocks = blocks_of([member.parameter for member in members])
            outgoing = [
                halves[member.parameter].to(block.dtype) if member.parameter in halves else torch.zeros_like(block)
                for member, block in zip(members, blocks, strict=True)
            ]
            exchange.run(outgoing, partial(self._keep_differences, members, halves))

    def _keep_differences(
        self, members: Sequence[Any], halves: Mapping[Tensor, Tensor], indexes: Sequence[int], whole: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Keep the whole differences of parameters that this rank owns, cut into matrices, for the step itself."""
        for index, difference in zip(indexes, whole, strict=True):
            parameter, group = members[index].parameter, self.param_groups[members[index].group]
            if parameter in halves:
                signed = -difference if group["maximize"] else difference
                self._differences[parameter] = self._pieces(signed.contiguous(), group)
        return whole

    def _owned_updates(self, members: Sequence[Any], indexes: Sequence[int], whole: Sequence[Tensor]) -> list[Tensor]:
        # The differences go into the states of the matrices, where _updates finds and removes them.
        for index in indexes:
            parameter = members[index].parameter
            pieces = self._differences.pop(parameter, [])
            if pieces and parameter.grad is not None:
                for number, piece in enumerate(pieces):
                    if piece.numel():
                        MatrixState(self.state[parameter], number)["difference"] = piece
        return super()._owned_updates(members, indexes, whole)

    def _updates(self, matrices_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
        grads_BMN = in_working_dtype(matrices_BMN)
        # Numerator and denominator see different samples where there are halves.
        halves = _halves_of(grads_BMN, states)
        for_momentum_BMN, for_factors_BMN = halves or (grads_BMN, grads_BMN)
        # Factors L (M, M) and R (N, N), and their inverse roots every so many steps.
        _observe(for_factors_BMN, states, group)
        if is_refresh_due(step, group):
            _refresh(halves, states, group, step)
        # The momentum between the roots, at the magnitude that is grafted onto it.
        momenta_BMN = _momenta(for_momentum_BMN, states, group, step)
        if step < group["start_preconditioning_step"]:
            updates_BMN = momenta_BMN
        else:
            updates_BMN = stack_buffers(states, "left_root") @ momenta_BMN @ stack_buffers(states, "right_root")
        return _grafted(updates_BMN, grads_BMN, momenta_BMN, states, group, step)


def _halves_of(grads_BMN: Tensor, states: Sequence[MatrixState]) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of halves A and B, if any matrix got its own; elsewhere both are the whole gradient."""
    differences = [state.pop("difference", None) for state in states]
    if all(difference is None for difference in differences):
        return None
    zero_MN = torch.zeros_like(grads_BMN[0])
    differences_BMN = torch.stack([zero_MN if d is None else d.to(zero_MN) for d in differences])
    return grads_BMN + differences_BMN, grads_BMN - differences_BMN


def _observe(grads_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any]) -> None:
    """Average this gradient into the factors."""
    rows, columns = grads_BMN.shape[-2:]
    left = state_buffers(states, "left", grads_BMN, rows, rows)
    right = state_buffers(states, "right", grads_BMN, columns, columns)
    _begin(states)
    beta2 = group["betas"][1]
    if group["factors"] == "gradient":
        accumulate_grams(left, grads_BMN, beta2)
        accumulate_grams(right, grads_BMN.mT, beta2)
        return
    # KL-Shampoo: the gradient times the other side's root, whose Gram matrix holds the inverse R'^-1 or L'^-1.
    accumulate_grams(left, grads_BMN @ stack_buffers(states, "right_root"), beta2, scale=1 / columns)
    accumulate_grams(right, grads_BMN.mT @ stack_buffers(states, "left_root"), beta2, scale=1 / rows)


def _begin(states: Sequence[MatrixState]) -> None:
    """Make the roots at the first step, because checkpoints are read into what the first step has made."""
    for state in states:
        if "left_root" not in state:
            for side in ("left", "right"):
                state[f"{side}_root"] = torch.eye(len(state[side]), dtype=state[side].dtype, device=state[side].device)


def _refresh(
    halves: tuple[Tensor, Tensor] | None, states: Sequence[MatrixState], group: dict[str, Any], step: int
) -> None:
    """Compute the inverse roots of both factors; a root that is not finite leaves the old one in place."""
    # Averages over the sum of their weights; half B's Gram matrix has this weight in them.
    beta2 = group["betas"][1]
    weights = bias_correction(beta2, step)
    damping = {"exponent": group["exponent"], "epsilon": group["epsilon"], "relative": group["relative_epsilon"]}
    for side in ("left", "right"):
        factors_BSS = stack_buffers(states, side).div_(weights)
        if halves is None:
            roots_BSS = inverse_roots(factors_BSS, method=group["method"], **damping)
        else:
            weight = 1.0 if beta2 == 1 else (1 - beta2) / weights
            sides = [half_BMN if side == "left" else half_BMN.mT for half_BMN in halves]
            roots_BSS = corrected_inverse_roots(factors_BSS, sides[0], sides[1], weight=weight, **damping)
        store(states, f"{side}_root", where_finite(roots_BSS, stack_buffers(states, f"{side}_root")))


def _check(group: dict[str, Any]) -> None:
    """Refuse settings out of range, then those that exclude each other."""
    infinity = float("inf")
    # Each setting by itself.
    check_betas("Shampoo", group["betas"], sum_allowed=True)
    check_counts("Shampoo", group, start_preconditioning_step=1)
    check_settings(
        "Shampoo",
        epsilon=(group["epsilon"], 0, infinity),
        grafting_beta2=(group["grafting_beta2"], 0, 1),
        grafting_epsilon=(group["grafting_epsilon"], 1e-30, infinity),
    )
    for name, words in (
        ("factors", get_args(Factors)),
        ("grafting", get_args(Grafting)),
        ("method", ("eigh", "newton")),
    ):
        if group[name] not in words:
            raise InvalidInputError(f"Shampoo has no {name}={group[name]!r}; there are {', '.join(words)}.")
    if group["exponent"] not in (0.25, 0.5):
        raise InvalidInputError(f"Shampoo takes exponents of 1/4 and 1/2, got exponent={group['exponent']!r}.")
    # Settings that exclude each other.
    if group["method"] == "newton" and group["epsilon"] == 0:
        raise InvalidInputError(
            "method='newton' inverts what has full rank, got epsilon=0; pass 1e-6, or method='eigh'."
        )
    if group["method"] == "newton" and group["update_bias_correction"]:
        raise InvalidInputError(
            "update_bias_correction corrects eigenvalues, which method='newton' does not compute; pass method='eigh', "
            "or leave one of them."
        )
    if group["factors"] == "kl" and group["exponent"] != 0.5:
        raise InvalidInputError(
            f"factors='kl' estimate a covariance, whose exponent is 1/2, got exponent={group['exponent']!r}; "
            "pass exponent=0.5."
        )
    if group["factors"] == "kl" and group["update_bias_correction"]:
        raise InvalidInputError(
            "update_bias_correction is for factors='gradient', got factors='kl'; leave one of them."
        )
    if group["grafting"] == "none" and group["start_preconditioning_step"] > 1:
        raise InvalidInputError(
            f"start_preconditioning_step={group['start_preconditioning_step']} leaves steps before it without any "
            "magnitude when grafting='none'; start at 1, or graft."
        )


def _momenta(grads_BMN: Tensor, states: Sequence[MatrixState], group: dict[str, Any], step: int) -> Tensor:
    """Return the corrected averages of the gradient, with a look ahead if nesterov."""
    beta1 = group["betas"][0]
    if beta1 == 0:
        return grads_BMN
    buffers = state_buffers(states, "momentum", grads_BMN)
    accumulate(buffers, grads_BMN, beta1)
    momenta_BMN = torch.stack(buffers)
    if group["nesterov"]:
        momenta_BMN = torch.lerp(grads_BMN, momenta_BMN, beta1)
        step += 1
    return momenta_BMN.div_(bias_correction(beta1, step))


def _grafted(
    updates_BMN: Tensor,
    grads_BMN: Tensor,
    momenta_BMN: Tensor,
    states: Sequence[MatrixState],
    group: dict[str, Any],
    step: int,
) -> Tensor:
    """Return the updates at the magnitude that grafting gives them, matrix by matrix."""
    if group["grafting"] == "none":
        return updates_BMN
    if group["grafting"] == "rms_match":
        return rescaled_to_rms(updates_BMN, 0.2)
    # Adam's update of the same matrix, of which only the size is taken, until the roots begin all of it.
    beta2 = group["grafting_beta2"]
    second_moments = state_buffers(states, "second_moment", grads_BMN)
    accumulate(second_moments, grads_BMN.square(), beta2)
    denominators_BMN = (
        torch.stack(second_moments).div_(bias_correction(beta2, step)).sqrt_().add_(group["grafting_epsilon"])
    )
    adam_BMN = momenta_BMN / denominators_BMN
    if step < group["start_preconditioning_step"]:
        return adam_BMN
    return rescaled_to_rms(updates_BMN, safe_rms(adam_BMN, dim=(1, 2)))

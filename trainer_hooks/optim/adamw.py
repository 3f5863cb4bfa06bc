"""AdamW, and on request without the bias that a step gets from squaring the gradient that it follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.engine.optimizer import BaseOptimizer
from trainer_hooks.optim.engine.split_halves import HalvesMixin
from trainer_hooks.optim.engine.update import (
    Decay,
    blocks_of,
    check_settings,
    chunks_of,
    descend,
    gradient_of,
    state_block,
)
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule


class AdamW(HalvesMixin, BaseOptimizer):
    """Adam with decoupled weight decay, by torch's conventions: state and checkpoints are those of torch.optim.AdamW.

    AdamW averages gradients and their squares, and divides the one by the root of the other, entry by entry, so that
    every weight moves at a rate of its own: where gradients are steady, by about lr. Weights shrink towards zero apart
    from that (decoupled decay).

        m <- beta1 m + (1 - beta1) g          m^ = m / (1 - beta1^t)
        v <- beta2 v + (1 - beta2) g^2        v^ = v / (1 - beta2^t)
        w <- w (1 - lr weight_decay) - lr m^ / (sqrt(v^) + eps)

    With update_bias_correction, and after supply_halves, m^ / (sqrt(v^) + eps) = m^ / p gives way to u. E[m^ / p] is
    not E[m^] / E[p]: the same noise is in both (coupling), and 1/p is convex: E[1/p] = 1/E[p] + Var(p) / E[p]^3 + ...
    So each half is divided by the denominator of the other half, and the second term is estimated and taken off:

        m_r = (beta1 m + (1 - beta1) g_r) / (1 - beta1^t)                              r = A, B; s the other one
        p_s = sqrt((beta2 v + (1 - beta2) g_s^2) / (1 - beta2^t)) + eps                g_r and p_s share no sample
        c = mean_r m_r / p_s        V = (p_A - p_B)^2 / 2
        u = c - V mean_r m_r / p_s^3, or 0 where that has not the sign of c

    This is leave-one-out over m folds at m = 2: the batch without fold A is half B. V is the authors' sample variance
    M2 / (m - 1); the variance of a leave-one-out p, M2, is the same at m = 2 only. The averages that stay, m and v,
    get g and g^2 of the whole batch as ever.

    Args:
        params: parameters or groups; sharded ones (DTensors) are stepped where they lie, beside plain ones.
        lr: size of a step where the gradient is steady.
        betas: weights of the past, each in [0, 1).
        eps: added outside the root.
        weight_decay: times lr, or times lr over the first lr: see decay.
        decay: "decoupled" or "independent".
        maximize: ascend.
        update_bias_correction: use halves of the batch where they are supplied: one more gradient in memory. Leave it
            off for embeddings, as the authors do: many of their rows are seen by one half only.

    Raises:
        InvalidInputError: a setting out of range, an eps that is 0 in a parameter's dtype, or a complex parameter.

    Bias: E[u] = E[m^] / E[p_s] to second order in the noise of p. But p_s holds the noise of half a batch, twice that
        of a whole one, so that E[p_s] is larger, and u is closer to the step of a noiseless gradient than m^ / p is for
        beta1 below about 1/2 only: see docs/reference/optimizers.md.
    Source: arXiv:1711.05101; correction: arXiv:2605.20756, with two folds in place of m.
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="sign",
        learning_rate_coupling="sqrt",
        averaged_settings=("betas",),
        momentum="average",
        momentum_key="exp_avg",
        transfer_rule=TransferRule("adam"),
    )
    _not_copied: ClassVar[tuple[str, ...]] = ("_halves",)
    _torch_settings: ClassVar[frozenset[str]] = frozenset(
        ("amsgrad", "foreach", "capturable", "fused", "decoupled_weight_decay")
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decay: Decay = "decoupled",
        maximize: bool = False,
        update_bias_correction: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "maximize": maximize,
            "update_bias_correction": update_bias_correction,
        }
        super().__init__(params, defaults)

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Refuse also torch's relatives of AdamW, whose groups may have the same names."""
        super()._check_checkpoint(state_dict)
        for group in state_dict["param_groups"]:
            if group.get("amsgrad"):
                raise InvalidInputError(
                    "AdamW has no amsgrad, got a checkpoint with amsgrad=True; go on with torch's own."
                )
            if "decay" not in group and "amsgrad" not in group:
                raise InvalidInputError(
                    "this checkpoint is not AdamW's: its groups lack amsgrad, as torch's Adamax and RAdam do. Load it "
                    "into the optimizer that wrote it."
                )
            if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
                raise InvalidInputError(
                    "this checkpoint is not AdamW's: its groups have decoupled_weight_decay=False, which decays "
                    f"gradients by weight_decay={group['weight_decay']!r}. Go on with torch's Adam."
                )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        # Settings in range, then parameters for which they work.
        kind = type(self).__name__
        beta1, beta2 = group["betas"]
        check_settings(kind, beta1=(beta1, 0, 1), beta2=(beta2, 0, 1), eps=(group["eps"], 0, float("inf")))
        if any(parameter.is_complex() for parameter in group["params"]):
            raise InvalidInputError(f"{kind} steps real parameters; give it torch.view_as_real of complex ones.")
        for dtype in {parameter.dtype for parameter in group["params"]}:
            if group["eps"] and not torch.tensor(group["eps"], dtype=dtype):
                raise InvalidInputError(
                    f"{kind}: eps={group['eps']:g} is 0 in {dtype}, and entries without gradient would become NaN; "
                    f"give eps={torch.finfo(dtype).tiny:.0e}."
                )

    def _step(self) -> None:
        halves = self._take_halves()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            # Parameters without halves, then those with; entry by entry, so every rank steps the blocks that it holds.
            for corrects in (False, True):
                for parameters in chunks_of([p for p in trained if (p in halves) == corrects]):
                    moments = _Moments(parameters, [self.state[parameter] for parameter in parameters], group)
                    grads = [gradient_of(parameter, group) for parameter in parameters]
                    corrected = moments.corrected_updates(grads, _signed(halves, parameters, group)) if corrects else []
                    moments.take_in(grads)
                    descend(blocks_of(parameters), corrected or moments.updates(), group)


class _Moments:
    """Averages m and v of parameters of one device and dtype, at their next step t."""

    def __init__(self, parameters: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        self._beta1, self._beta2 = group["betas"]
        self._eps = group["eps"]
        self._firsts = [state_block(state, "exp_avg", p) for state, p in zip(states, parameters, strict=True)]
        self._seconds = [state_block(state, "exp_avg_sq", p) for state, p in zip(states, parameters, strict=True)]
        # Corrections of the averages for their first steps, one per parameter: 1 - beta1^t and (1 - beta2^t)^(1/2).
        counts = [state.setdefault("step", torch.tensor(0.0)).add_(1) for state in states]
        self._weights1 = [1 - self._beta1 ** float(count) for count in counts]
        self._roots2 = [(1 - self._beta2 ** float(count)) ** 0.5 for count in counts]

    def take_in(self, grads: list[Tensor]) -> None:
        """Average g and g^2 into m and v."""
        torch._foreach_lerp_(self._firsts, grads, 1 - self._beta1)
        torch._foreach_mul_(self._seconds, self._beta2)
        torch._foreach_addcmul_(self._seconds, grads, grads, 1 - self._beta2)

    def updates(self) -> list[Tensor]:
        """Return Adam's update, m^ / (sqrt(v^) + eps)."""
        return self._divided(self._firsts, self._denominators(self._seconds))

    def corrected_updates(self, grads: list[Tensor], differences: list[Tensor]) -> list[Tensor]:
        """Return u for the averages with g in them, cross-fitted and corrected. The averages stay as they are."""
        # Gradients of the halves, and each half's own denominator p and average m.
        halves = [list(torch._foreach_add(grads, differences)), list(torch._foreach_sub(grads, differences))]
        p_A, p_B = (self._with_half(half) for half in halves)
        firsts_A, firsts_B = (list(torch._foreach_lerp(self._firsts, half, 1 - self._beta1)) for half in halves)
        # c, doubled: each average over the denominator of the other half.
        ratios_A, ratios_B = self._divided(firsts_A, p_B), self._divided(firsts_B, p_A)
        crossed = list(torch._foreach_add(ratios_A, ratios_B))
        # V sum_r m_r / p_s^3, from the same ratios.
        for ratios, denominators in ((ratios_A, p_B), (ratios_B, p_A)):
            torch._foreach_div_(ratios, denominators)
            torch._foreach_div_(ratios, denominators)
        torch._foreach_add_(ratios_A, ratios_B)
        torch._foreach_sub_(p_A, p_B)
        torch._foreach_mul_(p_A, p_A)
        torch._foreach_mul_(ratios_A, p_A)
        # crossed is 2c, and this 2u; it is 0 where the correction would turn an entry round.
        doubled = torch._foreach_sub(crossed, ratios_A, alpha=0.5)
        return [torch.where(u * c < 0, 0, u).mul_(0.5) for u, c in zip(doubled, crossed, strict=True)]

    def _with_half(self, half: list[Tensor]) -> list[Tensor]:
        """Return the denominators that v would give with the squares of one half's gradient in it."""
        squares = torch._foreach_mul(self._seconds, self._beta2)
        torch._foreach_addcmul_(squares, half, half, 1 - self._beta2)
        return self._denominators(list(squares))

    def _denominators(self, squares: list[Tensor]) -> list[Tensor]:
        """Return sqrt(v^) + eps of averaged squares v."""
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, self._roots2)
        torch._foreach_add_(roots, self._eps)
        return list(roots)

    def _divided(self, firsts: list[Tensor], denominators: list[Tensor]) -> list[Tensor]:
        """Return m^ over the denominators."""
        ratios = torch._foreach_div(firsts, denominators)
        torch._foreach_div_(ratios, self._weights1)
        return list(ratios)


def _signed(halves: Mapping[Tensor, Tensor], parameters: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """Return d of the direction of ascent, in the dtype of the parameters."""
    differences = [halves[parameter].to(parameter.dtype) for parameter in parameters]
    return list(torch._foreach_neg(differences)) if group["maximize"] else differences

"""SignSGD and Signum: steepest descent in the l-infinity norm, along the sign of the gradient or of its average."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.engine.optimizer import BaseOptimizer
from trainer_hooks.optim.engine.update import Decay, blocks_of, check_settings, descend, gradient_of, state_block
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule


class Signum(BaseOptimizer):
    """Sign of an exponential average of gradients.

    Signum averages gradients and moves every entry of the weights by the same amount, against the sign of its average.
    The size of a gradient does not matter, only its direction, entry by entry: a step is like one of AdamW where
    gradients are steady.

        m <- beta m + (1 - beta) g        w <- w (1 - lr weight_decay) - lr sign(m)

    momentum=0 is SignSGD. sign(0) is 0, so an entry that never got a gradient never moves.

    Args:
        params: parameters or groups.
        lr: size of every entry's step.
        momentum: beta in [0, 1).
        weight_decay: times lr, or times lr over the first lr: see decay.
        decay: "decoupled" or "independent".
        maximize: ascend.

    Raises:
        InvalidInputError: a setting out of range.

    Source: Bernstein et al. 2018, arXiv:1802.04434 (with decoupled decay).
    """

    facts: ClassVar[OptimizerFacts] = OptimizerFacts(
        geometry="sign",
        learning_rate_coupling="sqrt",
        averaged_settings=("momentum",),
        momentum="average",
        momentum_key="momentum",
        transfer_rule=TransferRule("adam"),
    )

    _same_checkpoints: ClassVar[frozenset[str]] = frozenset(("SignSGD",))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: Decay = "decoupled",
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decay": decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings(type(self).__name__, momentum=(group["momentum"], 0, 1))

    def _step(self) -> None:
        for group in self.param_groups:
            # Entry by entry, so every rank steps the blocks that it holds.
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            directions = self._averaged(parameters, group)
            descend(blocks_of(parameters), list(torch._foreach_sign(directions)) if directions else [], group)

    def _averaged(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return the averages with this step's gradients in them, or the gradients themselves without momentum."""
        grads = [gradient_of(parameter, group) for parameter in parameters]
        if not group["momentum"] or not parameters:
            return grads
        momenta = [state_block(self.state[parameter], "momentum", parameter) for parameter in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return momenta


class SignSGD(Signum):
    """Sign of the gradient, without any state.

    SignSGD moves every entry of the weights by the same amount, against the sign of its gradient. It is Signum without
    the average.

        w <- w (1 - lr weight_decay) - lr sign(g)

    Args:
        params: parameters or groups.
        lr: size of every entry's step.
        weight_decay: times lr, or times lr over the first lr: see decay.
        decay: "decoupled" or "independent".
        maximize: ascend.

    Raises:
        InvalidInputError: a setting out of range.

    Source: Bernstein et al. 2018, arXiv:1802.04434.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        decay: Decay = "decoupled",
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, momentum=0.0, weight_decay=weight_decay, decay=decay, maximize=maximize)

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Refuse also Signum's checkpoints with a momentum."""
        super()._check_checkpoint(state_dict)
        momenta = [group["momentum"] for group in state_dict["param_groups"]]
        if any(momenta):
            raise InvalidInputError(
                f"this checkpoint is not SignSGD's: its groups have momentum={max(momenta)!r}. Load it into Signum."
            )

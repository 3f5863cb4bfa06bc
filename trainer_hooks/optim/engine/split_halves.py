"""Mixin for optimizers that use the difference of two half-batch gradients besides their mean."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.sharding import local_tensor

_NOTHING: Mapping[Tensor, Tensor] = MappingProxyType({})


class HalvesMixin:
    """Mixin for optimizers with the group setting update_bias_correction.

    A batch is cut into halves A and B of equal size. With g the gradient of the batch and d = (g_A - g_B) / 2, the
    halves' own gradients are g_A = g + d and g_B = g - d.
    """

    param_groups: list[dict[str, Any]]
    _halves: Mapping[Tensor, Tensor] = _NOTHING

    @property
    def wants_halves(self) -> bool:
        """True if any group corrects, so that the next step has a use for supply_halves."""
        return any(group["update_bias_correction"] for group in self.param_groups)

    def supply_halves(self, differences: Mapping[Tensor, Tensor]) -> None:
        """Take d for the next step, which drops it; a step without one is a plain one.

        It replaces what was supplied before. After a step that was skipped, by a gradient scaler, supply {}: d is not
        finite then, and would be used by the step after. A session does it.

        Args:
            differences: parameter -> this rank's block of d, averaged over ranks as the gradient is, and scaled as the
                gradient is (loss scale, clipping). Kept, not copied. Parameters of groups that do not correct, and
                those of other optimizers, are left out.

        Raises:
            InvalidInputError: a difference that is not shaped like its parameter's block.
        """
        blocks_of_d = {}
        # Blocks of this rank, as the parameter's own; parameters without a use for them are left out.
        for group in self.param_groups:
            for parameter in group["params"] if group["update_bias_correction"] else ():
                if parameter not in differences:
                    continue
                difference = local_tensor(differences[parameter], parameter)
                block = local_tensor(parameter)
                if difference.shape != block.shape:
                    raise InvalidInputError(
                        f"the halves' difference of a parameter has shape {tuple(difference.shape)}, and this rank's "
                        f"block of it {tuple(block.shape)}; give this rank's block."
                    )
                blocks_of_d[parameter] = difference
        self._halves = blocks_of_d

    def _take_halves(self) -> Mapping[Tensor, Tensor]:
        """Return what was supplied for this step, and forget it."""
        taken, self._halves = self._halves, _NOTHING
        return taken

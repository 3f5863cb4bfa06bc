"""Every micro-batch's gradients of one rank, kept until their mean over all ranks is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ENTRIES_AT_ONCE = {"cpu": 2**17, "cuda": 2**25}
"""Per device: half a MiB in float32, or enough to fill a GPU."""


class AlongMean(NamedTuple):
    """How far this rank's micro-batches lie from the mean along the mean."""

    deviations: Tensor
    """(micro-batches, parameters) float64: <g_j - gbar, gbar>, tensor by tensor."""
    num_samples: Tensor
    """(micro-batches,) float64: n_j."""


class KeptGradients:
    """Copies in the gradients' own dtype: as many gradients as a rank has micro-batches in the step.

    There is no exact way with less: <g_j, gbar> is known only after the reduction, and one sum over a rank's
    micro-batches would leave as few groups as there are ranks.
    """

    def __init__(self, num_parameters: int) -> None:
        self._num_parameters = num_parameters
        self._micro_batches: list[tuple[float, dict[int, tuple[Tensor, float]]]] = []

    def begin(self, *, num_samples: float) -> None:
        """The next micro-batch; parameters that get no gradient in it count as zero."""
        self._micro_batches.append((num_samples, {}))

    def add(self, index: int, grad: Tensor, *, scale: float) -> None:
        """The gradient of one parameter; scale * grad is that of the micro-batch's mean loss."""
        self._micro_batches[-1][1][index] = (grad.detach().clone(), scale)

    def along(self, mean: Sequence[Tensor]) -> AlongMean:
        """Inner products in float64, entry by entry: |g|^4 is no number in lower precision, and the spread of the
        products is far below their size. No collective.

        Args:
            mean: gbar over all ranks, per parameter.
        """
        rows = []
        for _, grads in self._micro_batches:
            row = []
            for index, mean_grad in enumerate(mean):
                grad, scale = grads.get(index, (None, 0.0))
                row.append(_deviation_along(mean_grad, grad, scale))
            rows.append(torch.stack(row))
        num_samples = torch.tensor([number for number, _ in self._micro_batches], dtype=torch.float64)
        return AlongMean(torch.stack(rows), num_samples.to(rows[0].device))


def _deviation_along(mean: Tensor, grad: Tensor | None, scale: float) -> Tensor:
    at_once = ENTRIES_AT_ONCE["cuda" if mean.is_cuda else "cpu"]
    total = torch.zeros((), dtype=torch.float64, device=mean.device)
    means = mean.reshape(-1).split(at_once)  # type: ignore[no-untyped-call]
    grads = [None] * len(means) if grad is None else grad.reshape(-1).split(at_once)  # type: ignore[no-untyped-call]
    for mean_part, grad_part in zip(means, grads, strict=True):
        wide = mean_part.double()
        deviation = -wide if grad_part is None else grad_part.double().mul_(scale).sub_(wide)
        total += torch.dot(deviation, wide)
    return total

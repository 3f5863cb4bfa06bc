"""One endless order of samples, the same whatever the batch size, world size or restart."""

from __future__ import annotations

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError


class SampleStream:
    """Sample numbers by position: epoch after epoch, each a permutation seeded by (seed, epoch).

    A batch change moves the cuts between steps, never the order, and resuming needs the position only.

    Args:
        num_samples: size of the data set.
        seed: seed of the permutations.

    Raises:
        InvalidInputError: the data set is empty.
    """

    def __init__(self, num_samples: int, *, seed: int = 0) -> None:
        if num_samples < 1:
            raise InvalidInputError("the data set is empty.")
        self._num_samples = num_samples
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def positions(self, start: int, count: int) -> Tensor:
        """Return the (count,) int64 sample numbers at positions start .. start + count of the stream."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self._num_samples)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                self._order, self._epoch = torch.randperm(self._num_samples, generator=generator), epoch
            piece = self._order[offset : offset + count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

"""Eigenvalues of the published spectral estimator on the CPU, in a thread, while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class LateTraces:
    """tr C^(1/2) of the matrices this rank owns, asked for on one measured step and fetched on the next.

    One thread, no collective in it: whoever fetches sums over ranks.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gns-eigenvalues")

    def start(self, covariances: Sequence[tuple[int, Tensor]], *, num_rows: int) -> Future[Tensor]:
        """Begin. `covariances` are (group's row, (S, S) float64); they are copied to the host here.

        Returns:
            Of a (num_rows,) float64 tensor: sums over matrices. NaN where a decomposition fails.
        """
        on_host = [(row, covariance.cpu()) for row, covariance in covariances]
        return self._executor.submit(partial(_traces, on_host, num_rows))


def _traces(covariances: Sequence[tuple[int, Tensor]], num_rows: int) -> Tensor:
    found = torch.zeros(num_rows, dtype=torch.float64)
    for row, covariance in covariances:
        try:
            found[row] += torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt().sum()
        except RuntimeError:
            logger.exception("eigenvalues failed, this reading is NaN: shape=%s", tuple(covariance.shape))
            found[row] = torch.nan
    return found

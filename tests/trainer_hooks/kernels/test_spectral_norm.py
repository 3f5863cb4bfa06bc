"""Updates of a given spectral norm, held against singular values."""

from __future__ import annotations

import math

import pytest
import torch

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.kernels.spectral_norm import power_iterations, spectrally_normalized


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (3, 12, 8)])
def test_normalized_updates_have_the_given_spectral_norm(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(shape, generator=generator, dtype=torch.float64)
    vector = torch.randn((*shape[:-2], shape[-1]), generator=generator, dtype=torch.float64)
    normalized, vector = spectrally_normalized(update, vector, iterations=500, scale=1.5)
    norms = torch.linalg.matrix_norm(normalized, ord=2)
    # 500 products at a ratio of the two largest singular values below 0.97 leave 0.97^1000 < 1e-13 of the angle.
    assert torch.allclose(norms, torch.full_like(norms, 1.5), rtol=1e-9)
    again, _ = spectrally_normalized(update, vector, iterations=1, scale=1.5)
    assert torch.allclose(again, normalized, rtol=1e-9)


def test_the_kept_vector_makes_one_product_per_step_enough() -> None:
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(64, 48, generator=generator)
    vector = torch.randn(48, generator=generator)
    norms = []
    for step in range(100):
        drift = torch.randn(64, 48, generator=generator)
        update = 0.99 * update + 0.02 * drift
        normalized, vector = spectrally_normalized(update, vector, iterations=power_iterations(step), scale=1.0)
        norms.append(float(torch.linalg.matrix_norm(normalized, ord=2)))
    # sigma is a lower bound, so the norm is never below the scale, but for float32; on a slowly turning matrix, whose
    # upper singular values lie close together, it is a few percent above.
    assert min(norms) > 1 - 1e-5
    assert max(norms[50:]) < 1.1
    assert [power_iterations(step) for step in (0, 49, 50, 1000)] == [5, 5, 1, 1]


def test_normalizing_never_blows_an_update_up() -> None:
    zero, vector = spectrally_normalized(torch.zeros(4, 3), torch.ones(3), iterations=2, scale=1.0)
    assert torch.equal(zero, torch.zeros(4, 3))
    assert torch.equal(vector, torch.ones(3))
    blind, _ = spectrally_normalized(
        torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([0.0, 1.0]), iterations=1, scale=1.0
    )
    # The vector is orthogonal to the only direction of W, so that |W|_F / sqrt(2) is all there is to divide by.
    assert float(torch.linalg.matrix_norm(blind, ord=2)) == pytest.approx(math.sqrt(2))
    half, vector = spectrally_normalized(torch.ones(4, 3).bfloat16(), torch.ones(3), iterations=1, scale=1.0)
    assert half.dtype == torch.bfloat16
    assert vector.dtype == torch.float32
    with pytest.raises(InvalidInputError, match="iterations >= 1"):
        spectrally_normalized(torch.ones(4, 3), torch.ones(3), iterations=0, scale=1.0)

from __future__ import annotations

import pytest
import torch

from trainer_hooks.kernels import orthogonalize


def with_singular_values(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return (left * values) @ right.mT


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (12, 40), (40, 12)])
def test_singular_values_land_in_the_published_band(rows: int, columns: int) -> None:
    # Band of the five Jordan steps for inputs from 3e-3 of the Frobenius norm upwards: [0.682, 1.202].
    values = torch.logspace(-2.4, 0, 12, dtype=torch.float64)
    matrix = with_singular_values(values, rows, columns)
    found = torch.linalg.svdvals(orthogonalize(matrix))
    assert float(found.min()) > 0.68
    assert float(found.max()) < 1.21


def test_singular_vectors_are_kept() -> None:
    matrix = with_singular_values(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 3, 5)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ orthogonalize(matrix) @ right.mT
    assert torch.allclose(core, torch.diag(core.diagonal()), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_the_scale_of_the_input_does_not_matter(scale: float) -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonalize(scale * matrix), orthogonalize(matrix), atol=1e-5)


def test_a_batch_is_orthogonalized_matrix_by_matrix_and_zero_stays_zero() -> None:
    batch = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    batch[1] = 0
    found = orthogonalize(batch)
    assert torch.equal(found[1], torch.zeros(5, 8))
    assert torch.allclose(found[2], orthogonalize(batch[2]), atol=1e-6)

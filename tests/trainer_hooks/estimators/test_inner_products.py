"""The variance of inner products with the mean gradient: reference, and what capture keeps for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gns_controller.core.errors import TooFewGroupsError
from trainer_hooks.estimators import inner_product_variance
from trainer_hooks.estimators.sums import inner_product_variance as finished
from trainer_hooks.measurement.capture.per_micro_batch import ENTRIES_AT_ONCE, KeptGradients


def in_plain_numbers(groups: list[list[list[float]]], sizes: list[float]) -> float:
    """Written out without a tensor: x_j = <g_j, gbar>, sum n_j (x_j - mean x)^2 / (K - 1)."""
    vectors = [[value for tensor in group for value in tensor] for group in groups]
    total = sum(sizes)
    mean = [sum(n * v[i] for n, v in zip(sizes, vectors, strict=True)) / total for i in range(len(vectors[0]))]
    products = [sum(a * b for a, b in zip(vector, mean, strict=True)) for vector in vectors]
    centre = sum(n * x for n, x in zip(sizes, products, strict=True)) / total
    return sum(n * (x - centre) ** 2 for n, x in zip(sizes, products, strict=True)) / (len(groups) - 1)


def kept_variance(groups: list[list[Tensor | None]], sizes: list[float]) -> float:
    """Through what one rank keeps, and the sums that a row holds."""
    like = next(group for group in groups if all(tensor is not None for tensor in group))
    kept = KeptGradients(len(like))
    total = sum(sizes)
    mean = [torch.zeros_like(tensor) for tensor in like if tensor is not None]
    for grads, size in zip(groups, sizes, strict=True):
        kept.begin(num_samples=size)
        for index, grad in enumerate(grads):
            if grad is not None:
                kept.add(index, grad * 0.5, scale=2.0)
                mean[index] += size / total * grad
    along = kept.along(mean)
    deviations = along.deviations.sum(1)
    weighted = along.num_samples * deviations
    sums = torch.stack([weighted.sum(), weighted.dot(deviations)])
    return float(finished(sums, num_samples=total, num_groups=len(groups)))


def test_scalars_by_hand() -> None:
    # gbar = 3, x = 0, 6, 12, 18 with mean 9: (81 + 9 + 9 + 81) / 3.
    groups = [[torch.tensor([value])] for value in (0.0, 2.0, 4.0, 6.0)]
    assert inner_product_variance(groups, [1, 1, 1, 1]) == pytest.approx(60.0, rel=1e-15)
    # Groups of five samples each: b times as much.
    assert inner_product_variance(groups, [5, 5, 5, 5]) == pytest.approx(300.0, rel=1e-15)


def test_spread_across_the_mean_gradient_does_not_count() -> None:
    groups = [[torch.tensor([2.0, sideways])] for sideways in (-3.0, 3.0, 1.0, -1.0)]
    assert inner_product_variance(groups, [1, 1, 1, 1]) == 0
    along = [[torch.tensor([2.0 + step, 0.0])] for step in (-1.0, 1.0)]
    assert inner_product_variance(along, [1, 1]) == pytest.approx(2 * 2.0**2)  # |g|^2 times the variance along g


@pytest.mark.parametrize("sizes", [[4.0, 4.0, 4.0, 4.0, 4.0], [1.0, 7.0, 3.0, 2.0, 5.0]])
def test_reference_and_capture_agree_with_plain_numbers(sizes: list[float]) -> None:
    generator = torch.Generator().manual_seed(1)
    groups = [
        [0.3 + torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)] for _ in range(len(sizes))
    ]
    plain = in_plain_numbers([[tensor.reshape(-1).tolist() for tensor in group] for group in groups], sizes)
    assert float(inner_product_variance(groups, sizes)) == pytest.approx(plain, rel=1e-12)
    assert kept_variance([list(group) for group in groups], sizes) == pytest.approx(plain, rel=1e-12)


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    one, two = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    with_none: list[list[Tensor | None]] = [[one, None], [2 * one, two]]
    with_zero = [[one, 0 * two], [2 * one, two]]
    expected = float(inner_product_variance(with_zero, [1, 1]))
    assert float(inner_product_variance(with_none, [1, 1])) == pytest.approx(expected, rel=1e-15)
    assert kept_variance(with_none, [1, 1]) == pytest.approx(expected, rel=1e-15)


def test_small_gradients_neither_underflow_nor_drown_in_rounding() -> None:
    """|g|^4 = 1e-60 is 0 in float32; and a spread of 1e-3 of the gradient keeps its digits."""
    generator = torch.Generator().manual_seed(2)
    size = 2 * ENTRIES_AT_ONCE["cpu"] + 5
    common = torch.randn(size, generator=generator) * 1e-15 / size**0.5
    groups: list[list[Tensor | None]] = [[(common + common * 1e-3 * step).float()] for step in (-1.0, -0.5, 0.5, 1.0)]
    expected = float(inner_product_variance(groups, [2, 2, 2, 2]))
    # Along the gradient alone: variance of 1e-3 * step * |g|^2, times two samples a group.
    in_closed_form = 2 * (1 + 0.25 + 0.25 + 1) / 3 * 1e-6 * float(common.double().square().sum()) ** 2
    assert expected == pytest.approx(in_closed_form, rel=1e-3)
    assert 0 < expected < 1e-65
    # The mean is averaged in float32: half an epsilon of it moves every deviation alike, and drops out.
    assert kept_variance(groups, [2, 2, 2, 2]) == pytest.approx(expected, rel=1e-5)


def test_over_batches_it_is_high_by_the_noise_of_the_mean() -> None:
    """E = g^T C g + tr(C^2) / B for normal noise: C = diag(1, 4), g = (1, 0.5), B = 8 groups of 4."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    truth = torch.tensor([1.0, 0.5], dtype=torch.float64)
    found = []
    for _ in range(4000):
        noise = torch.randn(8, 2, generator=generator, dtype=torch.float64) * scale / 4**0.5
        found.append(inner_product_variance([[truth + row] for row in noise], [4] * 8))
    values = torch.stack(found)
    expected = (1 + 4 * 0.25) + (1 + 16) / 32
    assert float(values.mean()) == pytest.approx(expected, abs=4 * float(values.std()) / 4000**0.5)


def test_one_group_has_no_spread() -> None:
    with pytest.raises(TooFewGroupsError):
        inner_product_variance([[torch.ones(2)]], [3])

"""Against the definition in float64, which holds the squares of every float32."""

from __future__ import annotations

import pytest
import torch

from trainer_hooks.optim.engine.update import safe_rms


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 5e37])
@pytest.mark.parametrize("dim", [1, 2, (1, 2)])
def test_the_root_mean_square_is_exact_at_every_scale_of_float32(dim: int | tuple[int, ...], scale: float) -> None:
    entries = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0)).mul_(scale)
    expected = entries.double().square().mean(dim, keepdim=True).sqrt()
    # Sums of up to 600 rounded squares, and a result of 1e-38 whose last digit is 1.4e-45.
    torch.testing.assert_close(safe_rms(entries, dim=dim).double(), expected, rtol=1e-6, atol=1.5e-45)


def test_zero_empty_and_infinite_rows_do_not_touch_the_others() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    zero, five, *rest = safe_rms(rows, dim=1).flatten().tolist()
    assert zero == 0
    assert five == pytest.approx(12.5**0.5, rel=1e-7)
    assert torch.tensor(rest).isnan().all()
    assert safe_rms(torch.ones(4, 0), dim=1).tolist() == [[0.0]] * 4
    assert safe_rms(torch.ones(0, 4), dim=1).shape == (0, 1)


def test_the_root_mean_square_of_bfloat16_is_computed_in_float32() -> None:
    entries = torch.tensor([1.0, 129 / 128]).bfloat16().repeat(1000)
    assert safe_rms(entries, dim=0).dtype == torch.float32
    assert safe_rms(entries, dim=0).item() == pytest.approx(float(entries.double().square().mean().sqrt()), rel=1e-6)

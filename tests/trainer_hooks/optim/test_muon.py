"""Muon against float64 recursions written here, and against torch and PyPI where conventions match."""

from __future__ import annotations

import math

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.trainer_hooks.optim.streams import distance, gradients, run, run_new
from trainer_hooks.kernels import EXACT, NEWTON_SCHULZ_5
from trainer_hooks.optim import Muon, Shampoo

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of Jordan's polynomial."""


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps in float64, with an SVD instead of products: p acts on singular values alone."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = A * values + B * values**3 + C * values**5
    return (left * values) @ right


def recursion(grads: list[Tensor], scale: float, *, nesterov: bool = True, start: float = 1.0) -> Tensor:
    weight, momentum = torch.full_like(grads[0], start), torch.zeros_like(grads[0])
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        direction = 0.05 * grad + 0.95 * momentum if nesterov else momentum
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * scale * newton_schulz(direction)
    return weight


def muon(parameters: list[nn.Parameter], **settings: object) -> Muon:
    published = {"lr": 0.02, "weight_decay": 0.1, "schedule": NEWTON_SCHULZ_5, "dtype": None}
    return Muon(parameters, **{**published, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_muon_follows_its_recursion(shape: tuple[int, int]) -> None:
    grads = gradients(*shape)
    expected = recursion(grads, max(1, shape[0] / shape[1]) ** 0.5)
    assert distance(run_new(muon, grads), expected) < 1e-12
    # From zero, so that the distance travelled is not lost in the rounding of weights near 1.
    expected = recursion(grads, max(1, shape[0] / shape[1]) ** 0.5, start=0.0)
    weights = run_new(muon, grads, start=torch.zeros(shape), dtype=torch.float32)
    assert distance(weights, expected, start=0.0) < 1e-6
    plain = run_new(lambda p: muon(p, nesterov=False), grads)
    assert distance(plain, recursion(grads, max(1, shape[0] / shape[1]) ** 0.5, nesterov=False)) < 1e-12


@pytest.mark.parametrize(
    ("scale", "factor"),
    [("spectral", math.sqrt(12 / 4)), ("rms_match", 0.2 * math.sqrt(12)), ("shape", math.sqrt(3)), ("none", 1.0)],
)
def test_scales_multiply_the_orthogonal_update(scale: str, factor: float) -> None:
    grads = gradients(12, 4)
    assert distance(run_new(lambda p: muon(p, scale=scale), grads), recursion(grads, factor)) < 1e-12


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_agrees_with_the_one_in_torch(adjust: str) -> None:
    # Both iterate in bfloat16, in another order of rounding, amplified by five steep steps.
    grads = gradients(16, 24, steps=5)
    settings = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1}
    scale = {"original": "shape", "match_rms_adamw": "rms_match"}[adjust]
    start = torch.zeros(16, 24)
    weights = run_new(
        lambda p: Muon(p, scale=scale, schedule=NEWTON_SCHULZ_5, **settings), grads, start=start, dtype=torch.float32
    )
    expected = run_new(
        lambda p: torch.optim.Muon(p, adjust_lr_fn=adjust, **settings), grads, start=start, dtype=torch.float32
    )
    assert float(torch.nn.functional.cosine_similarity(weights.flatten(), expected.flatten(), dim=0)) > 0.999
    assert float(weights.norm()) == pytest.approx(float(expected.norm()), rel=0.02)


def test_muon_agrees_with_the_one_of_pytorch_optimizer() -> None:
    # In older versions its momentum is a sum, m <- beta m + g: the same orthogonal factor as of an average; bfloat16.
    grads = gradients(16, 24, steps=5)
    start = torch.zeros(16, 24)

    def theirs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return pytorch_optimizer.Muon(
            [{"params": parameters, "use_muon": True}], lr=0.02, momentum=0.95, weight_decay=0.0
        )

    expected = run_new(theirs, grads, start=start, dtype=torch.float32)
    weights = run_new(lambda p: Muon(p, lr=0.02, schedule=NEWTON_SCHULZ_5), grads, start=start, dtype=torch.float32)
    assert float(torch.nn.functional.cosine_similarity(weights.flatten(), expected.flatten(), dim=0)) > 0.999


def test_equal_shapes_in_one_batch_move_as_they_would_alone() -> None:
    grads = gradients(2, 5, 8)
    together = [nn.Parameter(torch.ones(5, 8, dtype=torch.float64)) for _ in range(2)]
    both = muon(together)
    for grad in grads:
        for parameter, piece in zip(together, grad, strict=True):
            parameter.grad = piece.clone()
        both.step()
    for index, parameter in enumerate(together):
        expected = run_new(muon, [grad[index] for grad in grads])
        assert torch.allclose(parameter.detach(), expected, atol=1e-10)


def test_fused_projections_heads_and_experts_move_like_matrices_of_their_own() -> None:
    whole = gradients(16, 6)
    cut = run_new(lambda p: muon([{"params": p, "split_sizes": (8, 4, 4)}]), whole)
    heads = run_new(lambda p: muon([{"params": p, "split_sizes": (8, 4, 4), "num_heads": 2}]), whole)
    for rows in (slice(0, 8), slice(8, 12), slice(12, 16)):
        alone = run_new(muon, [grad[rows] for grad in whole])
        assert torch.allclose(cut[rows], alone, atol=1e-10)
    for first in range(0, 16, 4):
        alone = run_new(muon, [grad[first : first + 4] for grad in whole])
        assert torch.allclose(heads[first : first + 4], alone, atol=1e-10)
    experts = gradients(3, 4, 6)
    stacked = run_new(lambda p: muon([{"params": p, "batched": True}]), experts)
    for number in range(3):
        assert torch.allclose(stacked[number], run_new(muon, [grad[number] for grad in experts]), atol=1e-10)


def test_a_convolution_is_a_matrix_of_its_output_channels() -> None:
    grads = gradients(6, 2, 3, 3)
    flat = run_new(muon, [grad.flatten(1) for grad in grads])
    assert torch.allclose(run_new(muon, grads).flatten(1), flat, atol=1e-12)


def test_cautious_decay_spares_entries_that_the_update_grows() -> None:
    (grad,) = gradients(4, 4, steps=1)
    start = torch.ones(4, 4, dtype=torch.float64)
    bare = run_new(lambda p: muon(p, weight_decay=0.0), [grad], start=start)
    cautious = run_new(lambda p: muon(p, weight_decay=5.0, cautious=True), [grad], start=start)
    shrinks = bare < start
    assert 0 < int(shrinks.sum()) < 16
    assert torch.allclose(cautious, torch.where(shrinks, bare - 0.02 * 5.0 * start, bare), atol=1e-12)


def test_independent_decay_does_not_follow_the_peak_learning_rate() -> None:
    (grad,) = gradients(3, 5, steps=1)
    start = torch.full((3, 5), 2.0, dtype=torch.float64)
    for rate in (0.01, 0.04):
        bare = run_new(lambda p, r=rate: muon(p, lr=r, weight_decay=0.0), [grad], start=start)
        weights = run_new(lambda p, r=rate: muon(p, lr=r, decay="independent", weight_decay=0.3), [grad], start=start)
        assert torch.allclose(weights, bare - 0.3 * start, atol=1e-12)


def test_maximizing_is_descending_along_the_negated_gradients() -> None:
    grads = gradients(4, 6)
    up = run_new(lambda p: muon(p, maximize=True), grads)
    assert torch.allclose(up, run_new(muon, [-grad for grad in grads]), rtol=0, atol=1e-15)


def test_a_saved_optimizer_goes_on_as_if_never_stopped() -> None:
    grads = gradients(4, 6)
    expected = run_new(muon, grads)
    first = nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
    before = muon([first])
    run(before, first, grads[:10])
    second = nn.Parameter(first.detach().clone())
    after = muon([second], lr=0.7)
    after.load_state_dict(before.state_dict())
    assert torch.equal(run(after, second, grads[10:]), expected)


def test_a_parameter_without_gradient_is_left_alone_until_it_has_one() -> None:
    still, moving = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = muon([still, moving])
    moving.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(3, 4))
    still.requires_grad_(False)
    still.requires_grad_(True)
    still.grad = torch.ones(3, 4)
    optimizer.step()
    assert not torch.equal(still.detach(), torch.ones(3, 4))


def test_muon_refuses_the_checkpoint_of_another_optimizer_by_name() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    parameter.grad = torch.ones(3, 4)
    other = Shampoo([parameter])
    other.step()
    saved = other.state_dict()
    with pytest.raises(InvalidInputError, match="written by Shampoo, and Muon cannot"):
        Muon([parameter]).load_state_dict(saved)
    del saved["optimizer_class"]
    with pytest.raises(InvalidInputError, match=r"not Muon's: its groups hold .*grafting"):
        Muon([parameter]).load_state_dict(saved)


def test_muon_refuses_parameters_and_settings_that_do_not_fit() -> None:
    with pytest.raises(GeometryError, match="give it to AdamW"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(InvalidInputError, match="0 <= momentum < 1"):
        Muon([nn.Parameter(torch.zeros(3, 3))], momentum=1.0)
    with pytest.raises(InvalidInputError, match="rms_match"):
        Muon([nn.Parameter(torch.zeros(3, 3))], scale="width")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="dtype=None"):
        Muon([nn.Parameter(torch.zeros(3, 3))], schedule=EXACT)
    with pytest.raises(InvalidInputError, match="float16"):
        Muon([nn.Parameter(torch.zeros(3, 3, dtype=torch.float16))])
    with pytest.raises(InvalidInputError, match="POLAR_EXPRESS_4"):
        Muon([nn.Parameter(torch.zeros(3, 3))], schedule="newton_schulz")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="no spectral_normalization"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "spectral_normalization": True}])
    with pytest.raises(GeometryError, match="sum to 7"):
        Muon([{"params": [nn.Parameter(torch.zeros(6, 3))], "split_sizes": (4, 3)}])
    with pytest.raises(GeometryError, match="equal heads"):
        Muon([{"params": [nn.Parameter(torch.zeros(6, 3))], "num_heads": 4}])

"""Rules against numbers worked out by hand, and against what they are for: changes that do not depend on the width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim import Muon, Shampoo
from trainer_hooks.optim.grouping.parameter_groups import parameter_groups
from trainer_hooks.optim.grouping.width_transfer import (
    epsilon_multiplier,
    learning_rate_multiplier,
    residual_multiplier,
    scale_in_words,
    weight_decay_multiplier,
)
from trainer_hooks.optim.known_optimizers import TransferRule

# A matrix whose outputs grew 2 x and inputs 8 x: dout = 2, din = 8. In blocks of 512, n_out = 1 and n_in = 4.
BASE, WIDE = (256, 256), (512, 2048)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (TransferRule("adam"), 1 / 8),
        (TransferRule("grafted_shampoo"), 1 / 8),
        (TransferRule("muon"), 1 / 2),  # sqrt(2/8)
        (TransferRule("sgd"), 3 / 4),  # 3 layers for one, 2/8
        (TransferRule("spectral"), 1.0),
        (TransferRule("shampoo", exponent=0.25), 1 / 2),  # E = 1/2: 3^0 (2/8)^(1/2)
        (TransferRule("shampoo", exponent=0.25, block_size=512), 1 / 4),  # ... 4^(-1/2)
        (TransferRule("shampoo", exponent=0.5), 1 / 3),  # E = 1: 3^-1 (2/8)^0
        (TransferRule("shampoo", exponent=0.5, block_size=512), 1 / 12),  # ... 4^-1
        (TransferRule("soap"), 1 / 2),
        (TransferRule("soap", block_size=512), 1 / 4),  # sqrt(2/8) / sqrt(4)
        (TransferRule("soap", block_size=1024), 1 / math.sqrt(8)),  # 2 blocks of inputs for 1
    ],
)
def test_learning_rates_of_a_matrix_follow_the_published_table(rule: TransferRule, expected: float) -> None:
    multiplier = learning_rate_multiplier(rule, role="linear", shape=WIDE, base_shape=BASE, depth=6, base_depth=2)
    assert multiplier == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "base_shape", "expected"),
    [
        # Rows above 1000 in both: only the inputs are preconditioned. dout = 2, din = 4.
        ("shampoo", (4096, 512), (2048, 128), math.sqrt(3) * (2 / 4) ** 0.75),  # E = 1/4: 3^(1/2) (1/2)^(3/4)
        ("soap", (4096, 512), (2048, 128), 1 / 2),  # 4^(-1/2)
        # Columns above: only the outputs. dout = 4, din = 2.
        ("shampoo", (512, 4096), (128, 2048), math.sqrt(3) * 2**0.75),
        ("soap", (512, 4096), (128, 2048), 1.0),  # sqrt(4) / 2
        # Both above: Shampoo is left with the gradient, SOAP with Adam.
        ("shampoo", (4096, 4096), (2048, 1024 + 1), 3 * 2 / (4096 / 1025)),
        ("soap", (4096, 4096), (2048, 1025), 1025 / 4096),
    ],
)
def test_one_sided_rules_follow_the_published_table(
    name: str, shape: tuple[int, int], base_shape: tuple[int, int], expected: float
) -> None:
    rule = TransferRule(name, largest_side=1000)
    multiplier = learning_rate_multiplier(
        rule, role="linear", shape=shape, base_shape=base_shape, depth=3, base_depth=1
    )
    assert multiplier == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("role", "shape", "base_shape", "adam", "sgd"),
    [
        ("embedding", (1000, 512), (1000, 64), 1.0, 8.0),
        ("tied", (1000, 512), (1000, 64), 1.0, 8.0),
        ("embedding", (2000, 512), (1000, 64), 1.0, 8.0),  # more words are not more width
        ("head", (1000, 512), (1000, 64), 1 / 8, 1 / 8),
        ("norm", (512,), (64,), 1.0, 8.0),
        ("bias", (512,), (64,), 1.0, 8.0),
        ("scalar", (), (), 1.0, 1.0),
        ("expert", (16, 256, 512), (4, 32, 64), 1 / 8, 1.0),  # nor are more experts
        ("conv", (64, 32, 3, 3), (16, 8, 3, 3), 1 / 4, 1.0),
        ("transposed_conv", (32, 64, 2, 2), (8, 32, 2, 2), 1 / 4, 1 / 2),
        ("tensor", (2, 3, 4, 5), (2, 3, 4, 5), 1.0, 1.0),
    ],
)
def test_sides_depend_on_the_role(
    role: str, shape: tuple[int, ...], base_shape: tuple[int, ...], adam: float, sgd: float
) -> None:
    for name, expected in (("adam", adam), ("sgd", sgd)):
        multiplier = learning_rate_multiplier(TransferRule(name), role=role, shape=shape, base_shape=base_shape)
        assert multiplier == pytest.approx(expected, rel=1e-12)


def test_blocks_count_on_the_side_that_is_preconditioned() -> None:
    one_sided = TransferRule("soap", block_size=128, largest_side=1000)
    multiplier = learning_rate_multiplier(one_sided, role="linear", shape=(4096, 512), base_shape=(2048, 128))
    assert multiplier == pytest.approx(1 / 4, rel=1e-12)  # din = 4, n_in = 4
    multiplier = learning_rate_multiplier(one_sided, role="linear", shape=(512, 4096), base_shape=(128, 2048))
    assert multiplier == pytest.approx(1 / 2, rel=1e-12)  # dout = 4, n_out = 4, din = 2


def test_a_factor_that_the_optimizer_puts_on_its_update_is_not_counted_twice() -> None:
    # Total factor on the wide update over that on the base's must be sqrt(dout / din) = 1/2 whatever the convention.
    shape, base = (512, 4096), (128, 256)  # relative 4 and 16
    own = {"none": (1.0, 1.0), "spectral": (math.sqrt(512 / 4096), math.sqrt(128 / 256)), "shape": (1.0, 1.0)}
    for scale, (wide_factor, base_factor) in own.items():
        rule = TransferRule("muon", scale=scale)
        multiplier = learning_rate_multiplier(rule, role="linear", shape=shape, base_shape=base)
        assert multiplier * wide_factor / base_factor == pytest.approx(1 / 2, rel=1e-12)
    tall = learning_rate_multiplier(
        TransferRule("muon", scale="shape"), role="linear", shape=(1024, 64), base_shape=(64, 64)
    )
    assert tall == pytest.approx(1.0)  # sqrt(16) wanted, and sqrt(max(1, 1024/64)) is there


def test_equal_rms_and_transfer_exclude_each_other() -> None:
    rule = TransferRule("muon", scale="rms_match")
    with pytest.raises(InvalidInputError, match=r"spectral norm of updates of fixed RMS grows with sqrt\(width\)"):
        learning_rate_multiplier(rule, role="linear", shape=WIDE, base_shape=BASE)


def test_rules_refuse_tensors_that_they_do_not_cover() -> None:
    with pytest.raises(GeometryError, match="'muon' is for matrices, got role 'norm'"):
        learning_rate_multiplier(TransferRule("muon"), role="norm", shape=(8,), base_shape=(4,))
    with pytest.raises(GeometryError, match="give it a role that has them"):
        learning_rate_multiplier(TransferRule("adam"), role="tensor", shape=(2, 2, 2, 2), base_shape=(1, 1, 1, 1))
    with pytest.raises(InvalidInputError, match="differ in dimensions"):
        learning_rate_multiplier(TransferRule("adam"), role="linear", shape=(2, 2), base_shape=(2,))
    one_sided = TransferRule("soap", largest_side=300)
    with pytest.raises(InvalidInputError, match="preconditioned on different sides"):
        learning_rate_multiplier(one_sided, role="linear", shape=WIDE, base_shape=BASE)


def test_decay_per_step_falls_with_the_width_at_any_rate() -> None:
    for role, shape, base, width in (
        ("linear", (512, 512), (64, 64), 8),
        ("linear", (512, 32), (64, 32), 8),  # the first layer: its inputs are the data's
        ("head", (1000, 512), (1000, 64), 8),
        ("embedding", (1000, 512), (1000, 64), 8),
        ("linear", (64, 64), (512, 512), 1 / 8),
        ("head", (1000, 64), (1000, 512), 1 / 8),
    ):
        for rate in (1.0, 0.125):
            decay = weight_decay_multiplier(role=role, shape=shape, base_shape=base, learning_rate_multiplier=rate)
            assert decay * rate == pytest.approx(1 / width, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "shape", "base_shape", "expected"),
    [
        (TransferRule("soap"), WIDE, BASE, 2 / 3),  # sqrt(8/2) / 3
        (TransferRule("soap", block_size=512), WIDE, BASE, 1 / 3),  # sqrt(8 / (2 * 4)) / 3
        (TransferRule("soap", largest_side=1000), (4096, 512), (2048, 128), 1 / 3),  # inputs: sqrt(4) / 2 / 3
        (TransferRule("soap", largest_side=1000), (512, 4096), (128, 2048), 1 / 6),  # outputs: 1 / sqrt(4) / 3
        (TransferRule("adam"), WIDE, BASE, 1 / 6),
        (TransferRule("muon"), WIDE, BASE, 1.0),
    ],
)
def test_epsilons_follow_the_published_table(
    rule: TransferRule, shape: tuple[int, int], base_shape: tuple[int, int], expected: float
) -> None:
    multiplier = epsilon_multiplier(rule, role="linear", shape=shape, base_shape=base_shape, depth=3, base_depth=1)
    assert multiplier == pytest.approx(expected, rel=1e-12)


def test_residual_branches_shrink_with_the_depth_itself() -> None:
    assert residual_multiplier(depth=24, base_depth=6) == 0.25


def test_scales_are_shown_with_their_value() -> None:
    assert scale_in_words("rms_match", [(768, 256)]) == "rms_match 0.2*sqrt(768)=5.54"
    assert scale_in_words("shape", [(4, 4), (16, 4), (4, 4)]) == "shape 1.00/2.00"
    assert scale_in_words("none", [(4, 4)]) == "-"


class Perceptron(nn.Module):
    """Three hidden layers; initialized so that hidden activations are of order 1 and outputs shrink with the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, width, bias=False)
        self.middle = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 4, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer, power in ((self.first, 0.5), (self.middle, 0.5), (self.last, 0.5), (self.head, 1.0)):
                normal = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(normal * layer.in_features**-power)

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden = [torch.tanh(self.first(inputs))]
        for layer in (self.middle, self.last):
            hidden.append(torch.tanh(layer(hidden[-1])))
        return self.head(hidden[-1]), hidden


WIDTHS = (64, 128, 256)

Builder = Callable[[nn.Module], Sequence[torch.optim.Optimizer]]


def changes(build: Builder, width: int) -> list[float]:
    """RMS change of each hidden layer's activations after five steps on one batch."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(32, 16, generator=generator), torch.randn(32, 4, generator=generator)
    model = Perceptron(width)
    optimizers = build(model)
    with torch.no_grad():
        before = model(inputs)[1]
    for _ in range(5):
        loss = (model(inputs)[0] - targets).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        after = model(inputs)[1]
    return [float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True)]


def growth(build: Builder) -> list[float]:
    """Change at the largest width over that at the smallest, layer by layer."""
    narrow, wide = changes(build, WIDTHS[0]), changes(build, WIDTHS[-1])
    return [b / a for a, b in zip(narrow, wide, strict=True)]


def of_one_kind(kind: type[torch.optim.Optimizer], learning_rate: float, base: nn.Module | None) -> Builder:
    options = {"lr": learning_rate}
    return lambda model: (
        parameter_groups(
            model, hidden=kind, hidden_options=options, fallback=kind, fallback_options=options, base_shapes=base
        ).optimizers
    )


CONSTANT = (0.8, 1.25)
"""Room for the random weights' own fluctuation, of order 1 / sqrt(width), 1/8 at width 64, in both directions."""


def test_adam_changes_hidden_activations_alike_at_every_width_only_with_transfer() -> None:
    base = Perceptron(WIDTHS[0])
    for factor in growth(of_one_kind(torch.optim.AdamW, 2e-4, base)):
        assert CONSTANT[0] < factor < CONSTANT[1]
    first, *others = growth(of_one_kind(torch.optim.AdamW, 2e-4, None))
    # The inputs of the first layer do not grow. The others' changes grow with their inputs, x4, until tanh bends.
    assert CONSTANT[0] < first < CONSTANT[1]
    assert all(2.5 < factor <= 4 for factor in others)


def test_gradient_descent_needs_a_larger_rate_in_the_first_layer_of_a_wide_model() -> None:
    for factor in growth(of_one_kind(torch.optim.SGD, 0.05, Perceptron(WIDTHS[0]))):
        assert CONSTANT[0] < factor < CONSTANT[1]
    # Gradients of the first layer's entries fall with the width, x1/4; what the head does meanwhile is of order 1.
    assert growth(of_one_kind(torch.optim.SGD, 0.05, None))[0] < 0.5


def with_hidden(kind: type[torch.optim.Optimizer], options: dict[str, Any], base: nn.Module | None) -> Builder:
    """An optimizer on the hidden layers, and a head that stands still."""
    still = {"fallback": torch.optim.SGD, "fallback_options": {"lr": 0.0}}
    return lambda model: (
        parameter_groups(model, hidden=kind, hidden_options=options, base_shapes=base, **still).optimizers
    )


def with_muon(scale: str, base: nn.Module | None) -> Builder:
    return with_hidden(Muon, {"lr": 0.005, "scale": scale, "dtype": None}, base)


def test_muon_changes_hidden_activations_alike_at_every_width_but_with_rms_match() -> None:
    base = Perceptron(WIDTHS[0])
    for scale in ("none", "spectral", "shape"):
        for factor in growth(with_muon(scale, base)):
            assert CONSTANT[0] < factor < CONSTANT[1], scale
    # Without a base, "none" moves the first layer, whose outputs alone grow, by sqrt(1/4) as much.
    assert growth(with_muon("none", None))[0] == pytest.approx(0.5, rel=0.1)
    # Equal RMS: the spectral norm of the update grows with sqrt(width), x2, until tanh bends.
    assert all(1.4 < factor <= 2 for factor in growth(with_muon("rms_match", None))[1:])
    with pytest.raises(InvalidInputError, match=r"first.weight: rms_match and transfer"):
        growth(with_muon("rms_match", base))


@pytest.mark.parametrize(
    "options",
    [
        # As Adam: x4 in the inner layers, until tanh bends.
        {"lr": 2e-4, "grafting": "adam"},
        # Blocks of 32: 16 times as many in the inner layers, each with factors of its own: (n_in n_out)^(1/2) = 4.
        {"lr": 2e-3, "grafting": "none", "max_preconditioner_dim": 32},
    ],
)
def test_shampoo_changes_hidden_activations_alike_at_every_width_only_with_transfer(options: dict[str, Any]) -> None:
    options = options | {"precondition_frequency": 1}
    for factor in growth(with_hidden(Shampoo, options, Perceptron(WIDTHS[0]))):
        assert CONSTANT[0] < factor < CONSTANT[1]
    assert all(2.5 < factor <= 4 for factor in growth(with_hidden(Shampoo, options, None))[1:])

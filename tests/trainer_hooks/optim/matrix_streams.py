"""Gradient streams for optimizers of matrices, and properties that every such optimizer has on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer

SHAPES = [(6, 6), (12, 5), (5, 12)]

Make = Callable[[list[torch.nn.Parameter]], MatrixOptimizer]


def stream(rows: int, columns: int, *, steps: int = 20, seed: int = 0) -> list[Tensor]:
    """A fixed gradient, and noise of the same size, with columns of sizes 1 to 1/e. Float32 holds it exactly.

    The average Gram matrix of one side has a condition of about 100; the first one of the longer side lacks full rank.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed, *noise = (torch.randn(rows, columns, generator=generator) for _ in range(steps + 1))
    return [((fixed + draw) * torch.linspace(0, -1, columns).exp()).double() for draw in noise]


def start(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(100)
    return torch.nn.Parameter(torch.randn(rows, columns, generator=generator).to(dtype))


def follow(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, grads: Sequence[Tensor]) -> Tensor:
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype).clone()
        optimizer.step()
    return parameter.detach().double().clone()


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the distance of two ends of a way that began at start, over the length of the way."""
    begin = start(*expected.shape).detach()
    return float((actual - expected).norm() / (expected - begin).norm())


def goes_on_as_if_never_stopped(make: Make) -> bool:
    """Bit by bit, when saved after 7 of 20 steps and loaded into an optimizer made anew."""
    grads = stream(6, 9)
    straight = start(6, 9, torch.float32)
    expected = follow(make([straight]), straight, grads)
    first = start(6, 9, torch.float32)
    before = make([first])
    second = torch.nn.Parameter(follow(before, first, grads[:7]).float())
    after = make([second])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    return torch.equal(follow(after, second, grads[7:]), expected)


def mirrors_when_maximizing(descend: Make, ascend: Make) -> bool:
    down, up = start(6, 9), start(6, 9)
    ascended = follow(ascend([up]), up, [-grad for grad in stream(6, 9)])
    return torch.equal(follow(descend([down]), down, stream(6, 9)), ascended)


def leaves_alone_what_has_no_gradient(make: Make) -> bool:
    moving, resting = start(6, 9), start(6, 9)
    optimizer = make([moving, resting])
    follow(optimizer, moving, stream(6, 9, steps=3))
    return torch.equal(resting, start(6, 9)) and not torch.equal(moving, start(6, 9)) and not optimizer.state[resting]


def keeps_float32_beside_bfloat16(make: Make) -> bool:
    """State of matrices in float32 after loading, bit by bit what was saved; and it goes on."""
    parameter = start(6, 9, torch.bfloat16)
    before = make([parameter])
    follow(before, parameter, stream(6, 9, steps=3))
    copied = torch.nn.Parameter(parameter.detach().clone())
    after = make([copied])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    saved, loaded = before.state[parameter], after.state[copied]
    alike = all(loaded[name].dtype == value.dtype and torch.equal(loaded[name], value) for name, value in saved.items())
    wide = all(value.dtype != torch.bfloat16 for value in loaded.values())
    return alike and wide and bool(follow(after, copied, stream(6, 9, steps=3)).isfinite().all())

"""Against a float64 recursion written here, and against what defines a linear minimization oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.trainer_hooks.optim.streams import gradients, run
from trainer_hooks.kernels import EXACT
from trainer_hooks.optim.scion import Scion

WIDE, TALL, SQUARE, VECTOR = (4, 12), (12, 4), (6, 6), (7,)
CASES = [
    *[(norm, shape) for norm in ("spectral", "sign", "row", "column") for shape in (WIDE, TALL, SQUARE)],
    ("sign", VECTOR),
    ("bias_rms", VECTOR),
]


def oracle(norm: str, average: Tensor) -> Tensor:
    """The table of the paper for a (M, N) matrix or a vector."""
    match norm:
        case "spectral":
            left, _, right = torch.linalg.svd(average, full_matrices=False)
            return (average.shape[0] / average.shape[1]) ** 0.5 * left @ right
        case "sign":
            return average.sign() / (average.shape[1] if average.ndim == 2 else 1)
        case "row":
            return average / average.square().mean(1, keepdim=True).sqrt()
        case "column":
            return average / average.square().mean(0, keepdim=True).sqrt()
        case _:
            return average / average.square().mean().sqrt()


def ball_norm(norm: str, weight: Tensor) -> float:
    """The norm whose unit ball the oracle answers for."""
    match norm:
        case "spectral":
            rows, columns = weight.shape
            return (columns / rows) ** 0.5 * float(torch.linalg.matrix_norm(weight, 2))
        case "sign":
            return (weight.shape[1] if weight.ndim == 2 else 1) * float(weight.abs().max())
        case "row":
            return float(weight.square().mean(1).sqrt().max())
        case "column":
            return float(weight.square().mean(0).sqrt().max())
        case _:
            return float(weight.square().mean().sqrt())


@pytest.mark.parametrize(("norm", "shape"), CASES)
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scion_follows_its_recursion(norm: Any, shape: tuple[int, ...], constrained: bool, dtype: torch.dtype) -> None:
    moving = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    settings = {"lr": 0.05, "momentum": 0.8, "scale": 3.0, "weight_decay": float(constrained)}
    weights = run(Scion([moving], norm=norm, schedule=EXACT, dtype=None, **settings), moving, gradients(*shape))
    weight, average = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for grad in gradients(*shape):
        average = 0.8 * average + 0.2 * grad
        weight = (1 - 0.05 * constrained) * weight - 0.05 * 3.0 * oracle(norm, average)
    # spectral: condition of the orthogonal factor, about 100, times 20 roundings; the others are far below that.
    assert (weights - weight).norm() < 2000 * torch.finfo(dtype).eps * (weight - 1).norm()


@pytest.mark.parametrize(("norm", "shape"), CASES)
def test_steps_reach_the_dual_norm_and_weights_stay_in_the_ball(norm: Any, shape: tuple[int, ...]) -> None:
    # <g, P(g)> is the most that any point of the unit ball reaches, so no random point of the ball does better.
    grads = gradients(*shape, steps=40)
    moving = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    step = -run(Scion([moving], lr=1.0, momentum=0.0, norm=norm, schedule=EXACT, dtype=None), moving, grads[:1])
    assert ball_norm(norm, step) == pytest.approx(1, rel=1e-12)
    for other in grads[1:]:
        assert float((grads[0] * other).sum()) / ball_norm(norm, other) < float((grads[0] * step).sum())
    optimizer = Scion([moving], lr=0.3, norm=norm, scale=2.0, schedule=EXACT, dtype=None)
    norms = [ball_norm(norm, run(optimizer, moving, [grad])) for grad in grads]
    assert max(norms) <= 2 * (1 + 1e-12)
    run(optimizer, moving, [grads[0]] * 60)
    assert ball_norm(norm, moving.detach()) == pytest.approx(2, rel=1e-3)  # 0.7^60 and 0.9^60 of the past are left


@pytest.mark.parametrize(("norm", "shape"), CASES)
def test_zeros_stay_zero_and_the_smallest_gradients_step_as_far(norm: Any, shape: tuple[int, ...]) -> None:
    settings: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "norm": norm, "schedule": EXACT, "dtype": None}
    grad = gradients(*shape)[0]
    grad[0] = 0
    if grad.ndim == 2:
        grad[:, 1] = 0
    one, small, none = (torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(3))
    step = run(Scion([one], **settings), one, [grad])
    rounding = 1e-14 if norm == "spectral" else 0.0
    assert float(step[grad == 0].abs().max()) <= rounding
    assert torch.allclose(run(Scion([small], **settings), small, [1e-20 * grad]), step, rtol=1e-9)
    assert torch.equal(run(Scion([none], **settings), none, [torch.zeros_like(grad)]), torch.zeros_like(grad))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-24, 1e-20, 1.0, 1e20, 1e25, 8e37])
@pytest.mark.parametrize(("norm", "shape"), [("row", WIDE), ("column", TALL), ("bias_rms", VECTOR)])
def test_float32_gradients_of_every_size_step_as_far(norm: Any, shape: tuple[int, ...], scale: float) -> None:
    moving = torch.nn.Parameter(torch.zeros(shape))
    grad = (scale * gradients(*shape)[0]).float()
    step = run(Scion([moving], lr=1.0, momentum=0.0, norm=norm), moving, [grad])
    # A sum of up to 12 squares, a root, three quotients; at 1e-38 the size is known to 1.4e-45, 1e-7 of it.
    torch.testing.assert_close(step, -oracle(norm, grad.double()), rtol=1e-6, atol=0)


def test_groups_have_norms_of_their_own_over_convolutions_and_experts() -> None:
    shapes = {"sign": (5, 2, 3, 3), "row": (5, 2, 3), "column": (2, 5, 4), "spectral": (2, 4, 5)}
    grads = {norm: gradients(*shape)[0] for norm, shape in shapes.items()}
    moving = {norm: torch.nn.Parameter(torch.zeros_like(grad)) for norm, grad in grads.items()}
    batched = ("column", "spectral")
    optimizer = Scion(
        [{"params": [moving[norm]], "norm": norm, "batched": norm in batched} for norm in shapes],
        lr=1.0,
        momentum=0.0,
        schedule=EXACT,
        dtype=None,
    )
    for norm, parameter in moving.items():
        parameter.grad = grads[norm].clone()
    optimizer.step()
    for norm, parameter in moving.items():
        matrices = list(grads[norm]) if norm in batched else [grads[norm].flatten(1)]
        expected = torch.stack([oracle(norm, matrix) for matrix in matrices]).view(parameter.shape)
        assert torch.allclose(parameter, -expected, rtol=0, atol=1e-13)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("norm", "placement", "is_gathered"),
    [
        ("row", Shard(0), False),
        ("row", Shard(-2), False),
        ("row", Replicate(), False),
        ("row", Shard(1), True),
        ("sign", Shard(1), False),
        ("column", Shard(0), True),
        ("spectral", Shard(0), True),
    ],
)
def test_only_what_is_cut_across_its_norm_is_gathered(
    mesh: DeviceMesh, norm: Any, placement: Any, is_gathered: bool
) -> None:
    whole = torch.ones(6, 4, dtype=torch.float64)
    sharded = torch.nn.Parameter(DTensor.from_local(whole.clone(), mesh, [placement], run_check=False))
    plain = torch.nn.Parameter(whole.clone())
    settings: dict[str, Any] = {"lr": 0.1, "norm": norm, "schedule": EXACT, "dtype": None}
    optimizer, reference = Scion([sharded], **settings), Scion([plain], **settings)
    for grad in gradients(6, 4, steps=5):
        plain.grad = grad.clone()
        sharded.grad = DTensor.from_local(grad.clone(), mesh, [placement], run_check=False)
        optimizer.step()
        reference.step()
    assert isinstance(sharded, DTensor)
    assert torch.equal(sharded.to_local(), plain)
    assert bool(optimizer._divided()) == is_gathered


def test_a_sharded_bias_is_normalized_as_a_whole(mesh: DeviceMesh) -> None:
    moving = torch.nn.Parameter(distribute_tensor(torch.zeros(7, dtype=torch.float64), mesh, [Shard(0)]))
    grad = gradients(*VECTOR)[0]
    moving.grad = distribute_tensor(grad, mesh, [Shard(0)])
    Scion([moving], lr=1.0, norm="bias_rms").step()
    assert isinstance(moving, DTensor)
    assert torch.allclose(moving.to_local(), -oracle("bias_rms", grad), rtol=1e-14)


@pytest.mark.parametrize(("norm", "shape"), [("spectral", WIDE), ("row", TALL), ("bias_rms", VECTOR)])
def test_a_saved_scion_goes_on_bit_for_bit_and_maximizes_as_a_mirror(norm: Any, shape: tuple[int, ...]) -> None:
    straight, moving, up, still = (torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(4))
    grads = gradients(*shape)
    expected = run(Scion([straight], lr=0.1, norm=norm), straight, grads)
    before = Scion([moving], lr=0.1, norm=norm)
    run(before, moving, grads[:7])
    after = Scion([moving], lr=0.7, norm=norm)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert torch.equal(run(after, moving, grads[7:]), expected)
    assert torch.equal(run(Scion([up, still], lr=0.1, norm=norm, maximize=True), up, grads), -expected)
    assert torch.equal(still, torch.zeros_like(still))


def test_scion_refuses_norms_and_settings_that_do_not_fit() -> None:
    matrix, vector = torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidInputError, match="norm='nuclear'; there are spectral, sign"):
        Scion([matrix], norm="nuclear")  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="'bias_rms' or 'sign'"):
        Scion([vector])
    with pytest.raises(GeometryError, match="'spectral', 'sign', 'row' or 'column'"):
        Scion([matrix], norm="bias_rms")
    with pytest.raises(GeometryError, match="sum to 5"):
        Scion([{"params": [matrix], "split_sizes": (2, 3)}])
    with pytest.raises(InvalidInputError, match="leave it out"):
        Scion([{"params": [matrix], "decay": "independent"}])
    with pytest.raises(InvalidInputError, match="0 <= momentum < 1"):
        Scion([matrix], momentum=1.0)
    half = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float16))
    with pytest.raises(InvalidInputError, match=r"Scion cannot iterate parameters of torch\.float16"):
        Scion([half])
    with pytest.raises(InvalidInputError, match=r"Scion cannot iterate parameters of torch\.bfloat16"):
        Scion([half.bfloat16().detach()], schedule=EXACT)
    rows = Scion([half], norm="row")
    with pytest.raises(InvalidInputError, match=r"Scion cannot iterate parameters of torch\.float16"):
        rows.add_param_group({"params": [half.detach().clone()], "norm": "spectral"})

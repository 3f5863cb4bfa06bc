"""Against eigenvalues that are known by construction, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.benchmarks.kernels import gaussian
from trainer_hooks.kernels import InverseRootMethod, inverse_root

METHODS: tuple[InverseRootMethod, ...] = ("eigh", "newton", "polar_express")
ITERATIVE: tuple[InverseRootMethod, ...] = ("newton", "polar_express")


def rotation(side: int, seed: int = 0) -> Tensor:
    basis: Tensor = torch.linalg.qr(gaussian(side, side, seed=seed))[0]
    return basis


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    basis = rotation(len(values), seed)
    return (basis * values) @ basis.mT


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


VALUES = torch.logspace(-3, 0, 40, dtype=torch.float64)


@pytest.mark.parametrize("root", [1, 2, 3, 4, 8, 4 / 3, 0.5])
def test_eigh_takes_any_root(root: float) -> None:
    inverse = inverse_root(with_eigenvalues(VALUES), root=root, epsilon=1e-4)
    expected = with_eigenvalues((VALUES + 1e-4) ** (-1 / root))
    assert relative_error(inverse, expected) < 1e-11  # 2^-52, times a condition of 1e3 taken to at most the square


@pytest.mark.parametrize("root", [1, 2, 3, 4, 8])
def test_newton_takes_whole_roots(root: int) -> None:
    inverse = inverse_root(with_eigenvalues(VALUES), root=root, epsilon=1e-4, method="newton")
    assert relative_error(inverse, with_eigenvalues((VALUES + 1e-4) ** (-1 / root))) < 1e-11  # likewise


def test_polar_express_takes_square_roots() -> None:
    inverse = inverse_root(with_eigenvalues(VALUES), root=2, epsilon=1e-4, method="polar_express")
    assert relative_error(inverse, with_eigenvalues((VALUES + 1e-4) ** -0.5)) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_every_matrix_of_a_batch_has_a_scale_of_its_own(method: InverseRootMethod) -> None:
    scales = torch.tensor([[1e-12, 1.0], [1e12, 1e-3]], dtype=torch.float64)
    batch = scales[:, :, None, None] * with_eigenvalues(VALUES)
    inverse = inverse_root(batch, root=2, epsilon=0.0, method=method)
    expected = scales[:, :, None, None] ** -0.5 * with_eigenvalues(VALUES**-0.5)
    assert inverse.shape == (2, 2, 40, 40)
    for index in range(4):
        assert relative_error(inverse.flatten(0, 1)[index], expected.flatten(0, 1)[index]) < 1e-10


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("method", METHODS)
def test_factors_whose_squares_leave_float32_have_their_roots(
    method: InverseRootMethod, scale: float, relative: bool
) -> None:
    epsilon = 1e-3 if relative else 1e-3 * scale
    factor = (scale * with_eigenvalues(VALUES)).float()
    inverse = inverse_root(factor, root=2, epsilon=epsilon, relative=relative, method=method)
    expected = with_eigenvalues((scale * (VALUES + 1e-3)) ** -0.5)
    # Rounding is as at scale 1, below 5e-4 for this damping; the iterations know the largest eigenvalue to a tenth, and
    # the square root passes on half of it.
    assert relative_error(inverse, expected) < (5e-2 if relative and method != "eigh" else 5e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_factor_has_the_root_of_any_epsilon(method: InverseRootMethod) -> None:
    for epsilon in (1e-30, 1.0, 1e30):
        inverse = inverse_root(torch.zeros(3, 3), root=2, epsilon=epsilon, method=method)
        assert torch.allclose(inverse, epsilon**-0.5 * torch.eye(3), rtol=1e-5)  # float32, after 35 iterations


@pytest.mark.parametrize(("epsilon", "bound"), [(1e-3, 5e-4), (1e-5, 3e-2)])
@pytest.mark.parametrize("method", METHODS)
def test_float32_keeps_what_the_damping_protects(method: InverseRootMethod, epsilon: float, bound: float) -> None:
    # Eigenvalues are off by about 3e-7 of the largest, a share 3e-7 / epsilon of the smallest, half of which the square
    # root passes on; bounds are three times that.
    values = torch.logspace(-6, 0, 128, dtype=torch.float64)
    inverse = inverse_root(with_eigenvalues(values).float(), root=2, epsilon=epsilon, method=method)
    assert inverse.dtype == torch.float32
    assert relative_error(inverse, with_eigenvalues((values + epsilon) ** -0.5)) < bound


@pytest.mark.parametrize("method", METHODS)
def test_null_directions_get_the_root_of_epsilon(method: InverseRootMethod) -> None:
    values = torch.cat([torch.zeros(20, dtype=torch.float64), torch.ones(4, dtype=torch.float64)])
    inverse = inverse_root(with_eigenvalues(values), root=2, epsilon=1e-4, method=method)
    assert relative_error(inverse, with_eigenvalues((values + 1e-4) ** -0.5)) < 1e-9


def test_epsilon_is_added_after_clamping_at_zero() -> None:
    factor = torch.diag(torch.tensor([4.0, -1e-3, 0.0]))
    inverse = inverse_root(factor, root=2, epsilon=1e-2)
    assert torch.allclose(inverse.diagonal(), torch.tensor([4.01**-0.5, 10.0, 10.0]))


def test_a_relative_epsilon_scales_with_the_largest_eigenvalue() -> None:
    values = torch.tensor([100.0, 1.0, 0.0], dtype=torch.float64)
    inverse = inverse_root(torch.diag(values), root=2, epsilon=1e-2, relative=True)
    assert torch.allclose(inverse.diagonal(), (values + 1.0) ** -0.5)


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("gap", [0.5, 0.05, 0.0])
def test_iterative_methods_estimate_the_largest_eigenvalue_to_ten_percent(
    gap: float, method: InverseRootMethod
) -> None:
    # Everything else is (1 - gap) of the largest or below; a null direction shows the damping alone.
    values = torch.linspace(0, 1 - gap, 60, dtype=torch.float64)
    values[-1] = 1.0
    for seed in range(5):
        inverse = inverse_root(with_eigenvalues(values, seed), root=2, epsilon=1e-2, relative=True, method=method)
        damping = float(torch.linalg.eigvalsh(inverse)[-1]) ** -2 / 1e-2
        assert 0.9 < damping < 1 + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_without_a_finite_root_is_nan_and_leaves_its_batch_alone(method: InverseRootMethod) -> None:
    good = with_eigenvalues(VALUES)
    holed, infinite = good.clone(), good.clone()
    holed[3, 5] = math.nan
    infinite[0, 0] = math.inf
    batch = torch.stack([holed, good, infinite, torch.zeros_like(good)])
    inverse = inverse_root(batch, root=2, epsilon=0.0, method=method)
    assert inverse[[0, 2, 3]].isnan().all()
    assert relative_error(inverse[1], with_eigenvalues(VALUES**-0.5)) < 1e-10


@pytest.mark.parametrize("smallest", [-0.5, 1e-25])
def test_newton_gives_nan_where_it_does_not_converge(smallest: float) -> None:
    # A negative eigenvalue runs away; 1e-25 is 1e-4 after all iterations, and what is found by then finite and wrong.
    factor = torch.diag(torch.tensor([1.0, smallest, 0.3], dtype=torch.float64))
    assert inverse_root(factor, root=2, epsilon=0.0, method="newton").isnan().all()


@pytest.mark.parametrize(("dtype", "exponent", "bound"), [(torch.float32, -6, 0.1), (torch.float64, -14, 0.1)])
def test_newton_goes_on_until_the_smallest_eigenvalues_have_converged(
    dtype: torch.dtype, exponent: int, bound: float
) -> None:
    values = torch.logspace(exponent, 0, 20, dtype=torch.float64)
    inverse = inverse_root(torch.diag(values).to(dtype), root=1, epsilon=0.0, method="newton")
    # Rounding is that of one entry of a diagonal matrix: the condition times 2^-24 or 2^-53.
    assert relative_error(inverse, torch.diag(1 / values)) < bound


def test_a_nan_does_not_send_its_batch_through_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = torch.linalg.eigh, []

    def recorded(matrix: Tensor) -> Any:
        seen.append(matrix.dtype)
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", recorded)
    inverse_root(torch.stack([torch.eye(3), torch.full((3, 3), math.nan)]), root=2, epsilon=1e-4)
    assert seen == [torch.float32]


def test_a_float32_decomposition_that_fails_is_repeated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def failing_in_float32(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing_in_float32)
    inverse = inverse_root(with_eigenvalues(VALUES).float(), root=2, epsilon=1e-4)
    assert inverse.dtype == torch.float32
    assert relative_error(inverse, with_eigenvalues((VALUES + 1e-4) ** -0.5)) < 1e-4


def test_a_decomposition_that_fails_for_good_is_nan_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def failing_on_identities(matrix: Tensor) -> Any:
        if bool((matrix / matrix[..., :1, :1] == torch.eye(40)).all(-1).all(-1).any()):
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing_on_identities)
    good = with_eigenvalues(VALUES)
    inverse = inverse_root(torch.stack([torch.eye(40).double(), good]), root=2, epsilon=0.0)
    assert inverse[0].isnan().all()
    assert relative_error(inverse[1], with_eigenvalues(VALUES**-0.5)) < 1e-10


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("relative", [False, True])
def test_iterative_methods_read_nothing_on_the_host(method: InverseRootMethod, relative: bool) -> None:
    # A fake tensor has no values: reading one raises.
    with FakeTensorMode():
        factor = torch.empty(3, 30, 30)
        assert inverse_root(factor, root=2, epsilon=1e-4, relative=relative, method=method).shape == (3, 30, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": 0}, "root > 0"),
        ({"epsilon": -1.0}, "epsilon >= 0"),
        ({"epsilon": math.nan}, "epsilon >= 0"),
        ({"method": "schur"}, "none of eigh, newton, polar_express"),
        ({"method": "newton", "root": 1.5}, "takes a whole root"),
        ({"method": "polar_express", "root": 4}, "takes root=2"),
    ],
)
def test_inverse_root_refuses_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        inverse_root(torch.eye(3), **{"root": 2, "epsilon": 1e-4, **change})


def test_inverse_root_refuses_shapes_that_are_not_square() -> None:
    with pytest.raises(GeometryError, match="square"):
        inverse_root(torch.ones(3, 4), root=2, epsilon=1e-4)
    with pytest.raises(InvalidInputError, match="bfloat16: convert"):
        inverse_root(torch.eye(3, dtype=torch.bfloat16), root=2, epsilon=1e-4)

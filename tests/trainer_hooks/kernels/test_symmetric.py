"""Against float64 products of torch, which do not use symmetry."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.benchmarks.kernels import gaussian
from tests.benchmarks.report import ROOT
from trainer_hooks.kernels import symmetric

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and "REQUIRE_ALL" not in os.environ, reason="Triton is not installed"
)
SHAPES = [(5, 7), (3, 40, 24), (511, 300), (512, 700), (600, 64), (2, 530, 40)]


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X, and a symmetric matrix with norm near 1."""
    X = gaussian(*shape).to(dtype)
    square = gaussian(*shape[:-1], shape[-2], seed=1)
    return X, ((square + square.mT) / (4 * shape[-2] ** 0.5)).to(dtype)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_products_are_those_of_the_whole_matrices(shape: tuple[int, ...], dtype: torch.dtype, rounding: float) -> None:
    # One rounding of the result in bfloat16, 2^-8; sums of up to 700 terms in the others.
    X, A = operands(shape, dtype)
    X64, A64 = X.double(), A.double()
    assert distance(symmetric.gram(X), X64 @ X64.mT) < rounding
    assert distance(symmetric.gram(X, out=torch.empty_like(A)), X64 @ X64.mT) < rounding
    assert distance(symmetric.symmetric_product(A, A), A64 @ A64) < rounding
    result = symmetric.symmetric_polynomial(A, linear=-3.0, square=2.0)
    assert distance(result, -3 * A64 + 2 * A64 @ A64) < rounding


def test_products_take_transposed_arguments_and_strided_results() -> None:
    X = gaussian(700, 520).float().mT
    out = torch.empty(520, 1040)[:, ::2]
    assert distance(symmetric.gram(X, out=out), X.double() @ X.double().mT) < 1e-6  # sums of 700 float32 terms


def test_blocks_compute_the_upper_half_and_mirror_it() -> None:
    # Of no symmetric product: what is far below the diagonal can only be a mirror image.
    first, second = gaussian(600, 50), gaussian(50, 600, seed=1)
    result, whole = symmetric.symmetric_product(first, second), first @ second
    below = torch.ones(600, 600).tril(-300).bool()
    assert torch.allclose(result[below], whole.mT[below])
    assert torch.allclose(result.triu(), whole.triu())
    assert symmetric.in_blocks(first)


def test_triton_is_not_chosen_where_it_was_not_measured() -> None:
    assert symmetric.TRITON_FROM_SIDE == {}
    assert not symmetric.on_triton(torch.empty(4096, 4096, device="meta"))


# ------------------------------------------------------------------ Triton

INTERPRETED = """
import torch
from tests.benchmarks.kernels import gaussian, textbook_newton_schulz
from trainer_hooks.kernels import orthogonalize, symmetric
from trainer_hooks.kernels.triton_symmetric import symmetric_multiply_add

def distance(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())

def check(distance, bound):
    assert distance < bound, (dtype, side, distance, bound)

for dtype, rounding in ((torch.float32, 3e-6), (torch.float16, 1e-3)):
    for batch, side, depth in ((1, 5, 7), (3, 130, 70), (1, 257, 300)):
        X = gaussian(batch, side, depth).to(dtype)
        strided = gaussian(batch, depth, 2 * side, seed=1).to(dtype).mT[:, ::2]
        for given in (X, strided):
            exact = given.double() @ given.double().mT
            result = torch.full((batch, side, side), 9.0, dtype=dtype)
            check(distance(symmetric_multiply_add(given, given.mT, result), exact), rounding)
            assert torch.equal(result[:, 128:, :128], result[:, :128, 128:].mT)
            A = (exact / exact.abs().amax()).to(dtype)
            turned = torch.empty(batch, side, side, dtype=dtype).mT
            symmetric_multiply_add(A, A, turned, added=A, scale=-2.5, product_scale=1.5)
            check(distance(turned, -2.5 * A.double() + 1.5 * A.double() @ A.double()), rounding)

# The whole way through orthogonalize, as on a GPU.
symmetric.on_triton = lambda matrix: True
for shape in ((140, 160), (2, 30, 40)):
    matrix = gaussian(*shape).float()
    for evaluation in ("direct", "gram"):
        found = orthogonalize(matrix, evaluation=evaluation)
        assert distance(found, textbook_newton_schulz(matrix.double())) < 1e-4
print("compared")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trainer_hooks.kernels import triton_symmetric

kernel = triton_symmetric._upper_tiles
types = {name: "i32" for name in kernel.arg_names}
types |= {name: "*bf16" for name in ("first", "second", "added", "result")}
types |= {name: "fp32" for name in ("scale", "product_scale")}
types |= {name: "constexpr" for name in ("HAS_ADDED", "TILE", "DEPTH")}
source = ASTSource(kernel, types, {"HAS_ADDED": True, "TILE": 128, "DEPTH": 64})
found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
assert "wgmma" in found.asm["ptx"] and "bf16" in found.asm["ptx"]
print("compiled")
"""


def run(script: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    return finished.stdout + finished.stderr


@needs_triton
@pytest.mark.slow
def test_the_triton_kernel_agrees_with_float64_in_the_interpreter() -> None:
    # Relative to the largest entry: sums of 300 roundings of 2^-24 in float32, one rounding of 2^-11 in float16; within
    # orthogonalize, five steep steps. The interpreter has no bfloat16 products.
    assert "compared" in run(INTERPRETED, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_the_triton_kernel_compiles_to_tensor_core_instructions(tmp_path: os.PathLike[str]) -> None:
    # bfloat16 on Hopper; compiling needs no GPU.
    assert "compiled" in run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [(1000, 1500), (3, 257, 300)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_the_triton_kernel_agrees_with_float64_on_a_gpu(
    shape: tuple[int, ...], dtype: torch.dtype, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, A = (tensor.cuda() for tensor in operands(shape, dtype))
    monkeypatch.setitem(symmetric.TRITON_FROM_SIDE, torch.cuda.get_device_capability(), 1)
    assert symmetric.on_triton(X)
    assert distance(symmetric.gram(X), X.double() @ X.double().mT) < rounding
    result = symmetric.symmetric_polynomial(A, linear=-3.0, square=2.0)
    assert distance(result, -3 * A.double() + 2 * A.double() @ A.double()) < rounding


def test_the_module_loads_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "gram" in runpy.run_path(symmetric.__file__)

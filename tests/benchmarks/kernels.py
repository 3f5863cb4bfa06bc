"""How far orthogonalization is from U V^T and inverse roots are from theirs, and how long both take.

The truth is a float64 decomposition made here, or known by construction. docs/reference/kernels.md holds the tables.

    python -m tests.benchmarks.kernels accuracy
    python -m tests.benchmarks.kernels speed
    python -m tests.benchmarks.kernels roots
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from trainer_hooks import kernels
from trainer_hooks.kernels import InverseRootMethod, OrthogonalizationSchedule, inverse_root, orthogonalize

SCHEDULES: dict[str, OrthogonalizationSchedule] = {
    name: getattr(kernels, name)
    for name in (
        "NEWTON_SCHULZ_5",
        "POLAR_EXPRESS_4",
        "POLAR_EXPRESS_5",
        "POLAR_EXPRESS_7",
        "POLAR_EXPRESS_8",
        "DEEPSEEK_10",
        "EXACT",
    )
}
DTYPES = (torch.float32, torch.bfloat16)
SPEED_SHAPES = ((8, 128, 128), (256, 1024), (512, 512), (768, 768), (768, 3072), (1024, 1024), (1024, 4096))


# ------------------------------------------------------------------ matrices


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Independent standard normal entries, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: Tensor, rows: int, columns: int) -> Tensor:
    """These singular values, random singular vectors."""
    left, _ = torch.linalg.qr(gaussian(rows, len(values), seed=0))
    right, _ = torch.linalg.qr(gaussian(columns, len(values), seed=1))
    matrix: Tensor = (left * values) @ right.mT
    return matrix


KINDS: dict[str, Callable[[], Tensor]] = {
    "well conditioned": lambda: with_singular_values(torch.linspace(0.1, 1, 192, dtype=torch.float64), 192, 400),
    "square Gaussian": lambda: gaussian(256, 256),
    "low rank and noise": lambda: gaussian(96, 6) @ gaussian(6, 300, seed=1) + 0.3 * gaussian(96, 300, seed=2),
    "condition 1e6": lambda: with_singular_values(torch.logspace(-6, 0, 256, dtype=torch.float64), 256, 256),
}


# ------------------------------------------------------------------ accuracy


def distances(matrix: Tensor, found: Tensor) -> tuple[float, float, float]:
    """max |s - 1|, mean |s - 1| over s_i = u_i^T found v_i, and the cosine between found and U V^T."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = found.double()
    values = (left.mT @ found @ right.mT).diagonal()
    off = (values - 1).abs()
    # <found, U V^T> is the sum of the s_i, and ||U V^T||_F^2 their number.
    cosine = values.sum() / (found.norm() * len(values) ** 0.5)
    return float(off.max()), float(off.mean()), float(cosine)


def measured(schedule: OrthogonalizationSchedule, dtype: torch.dtype, kind: str) -> tuple[float, float, float]:
    """Distances of a float32 matrix of this kind, iterated in dtype."""
    matrix = KINDS[kind]().float()
    iterated = dtype if schedule.coefficients else None
    return distances(matrix, orthogonalize(matrix, schedule=schedule, dtype=iterated))


def accuracy() -> list[dict[str, Any]]:
    """One row per schedule and dtype, one cell per kind of matrix: rounded to the side that bounds it."""
    rows = []
    for name, schedule in SCHEDULES.items():
        for dtype in DTYPES if schedule.coefficients else DTYPES[:1]:
            row: dict[str, Any] = {"schedule": name, "dtype": str(dtype).removeprefix("torch.")}
            for kind in KINDS:
                worst, mean, cosine = measured(schedule, dtype, kind)
                row[kind] = f"{_above(worst)} {_above(mean)} {math.floor(cosine * 1e4) / 1e4:.4f}"
            rows.append(row)
    return rows


def _above(distance: float) -> str:
    """Three decimals, or one digit of what is smaller than a hundredth."""
    if distance >= 0.01:
        return f"{math.ceil(distance * 1e3 - 1e-4) / 1e3:.3f}"
    unit = 10.0 ** math.floor(math.log10(distance))
    return f"{math.ceil(distance / unit) * unit:.0e}"


# ------------------------------------------------------------------ the fit of POLAR_EXPRESS_4


def minimax_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """The odd quintic closest to 1 on [low, high], by Remez exchange, and its largest distance from 1."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, distance = np.linalg.solve(system, np.ones(4))
        # Extrema between the ends: roots of a + 3 b x^2 + 5 c x^4.
        spread = np.sqrt(9 * b * b - 20 * a * c)
        moved = np.sqrt(np.array([-3 * b - spread, -3 * b + spread]) / (10 * c))
        if np.abs(moved - inner).max() < 1e-14:
            break
        inner = moved
    return (float(a), float(b), float(c)), abs(float(distance))


def fitted_schedule(*, low: float, num_steps: int, safety: float) -> list[tuple[float, float, float]]:
    """Each step is minimax on what the one before leaves of [low, 1]; all but the last then see x / safety.

    Source: arXiv:2505.16932, where the greedy choice is shown to be the best composition.
    """
    found, high = [], 1.0
    for _ in range(num_steps):
        coefficients, distance = minimax_quintic(low, high)
        found.append(coefficients)
        low, high = 1 - distance, 1 + distance
    return [(a / safety, b / safety**3, c / safety**5) for a, b, c in found[:-1]] + [found[-1]]


# ------------------------------------------------------------------ speed


def textbook_newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps as they are usually written, float32."""
    X: Tensor = matrix / torch.linalg.matrix_norm(matrix, keepdim=True)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
    return X


def speed(repetitions: int = 5) -> list[dict[str, Any]]:
    """Process time on one thread, as multiples of the textbook's: medians of interleaved repetitions."""
    torch.set_num_threads(1)
    rows = []
    for shape in SPEED_SHAPES:
        matrix = gaussian(*shape).float()
        candidates: dict[str, Callable[[], Tensor]] = {"textbook": partial(textbook_newton_schulz, matrix)}
        for name, evaluation, dtype in (
            ("NEWTON_SCHULZ_5", "direct", torch.float32),
            ("NEWTON_SCHULZ_5", "gram", torch.float32),
            ("NEWTON_SCHULZ_5", "direct", torch.bfloat16),
            ("POLAR_EXPRESS_4", "direct", torch.float32),
            ("POLAR_EXPRESS_4", "gram", torch.float32),
            ("POLAR_EXPRESS_4", "direct", torch.bfloat16),
            ("POLAR_EXPRESS_7", "direct", torch.bfloat16),
        ):
            options: dict[str, Any] = {"schedule": SCHEDULES[name], "dtype": dtype, "evaluation": evaluation}
            label = f"{name} {evaluation if dtype == torch.float32 else 'bfloat16'}"
            candidates[label] = partial(orthogonalize, matrix, **options)
        seconds = interleaved(candidates, repetitions)
        base = seconds.pop("textbook")
        row: dict[str, Any] = {"shape": "x".join(map(str, shape)), "textbook_ms": round(base * 1e3, 1)}
        rows.append(row | {label: round(found / base, 2) for label, found in seconds.items()})
    return rows


def interleaved(candidates: dict[str, Callable[[], Tensor]], repetitions: int) -> dict[str, float]:
    """Median process time of each, one after another within a repetition, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {label: [] for label in candidates}
    for repetition in range(repetitions + 1):
        for label, run in candidates.items():
            start = time.process_time()
            run()
            if repetition:
                seconds[label].append(time.process_time() - start)
    return {label: statistics.median(found) for label, found in seconds.items()}


# ------------------------------------------------------------------ inverse roots


def root_error(method: InverseRootMethod, dtype: torch.dtype, epsilon: float, *, root: int = 2) -> float:
    """||found - root||_F / ||root||_F for eigenvalues from 1e-6 to 1, 128 of them."""
    values = torch.logspace(-6, 0, 128, dtype=torch.float64)
    basis, _ = torch.linalg.qr(gaussian(128, 128))
    factor = (basis * values) @ basis.mT
    expected = (basis * (values + epsilon) ** (-1 / root)) @ basis.mT
    found = inverse_root(factor.to(dtype), root=root, epsilon=epsilon, method=method)
    return float((found.double() - expected).norm() / expected.norm())


def roots(repetitions: int = 5) -> list[dict[str, Any]]:
    """One row per method and dtype: errors by epsilon, and process time on one thread for four factors of side 256."""
    torch.set_num_threads(1)
    candidates: dict[str, Callable[[], Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for method in get_args(InverseRootMethod):
        for dtype in (torch.float32, torch.float64):
            name = str(dtype).removeprefix("torch.")
            row: dict[str, Any] = {"method": method, "dtype": name}
            rows.append(row | {f"epsilon {e:.0e}": _above(root_error(method, dtype, e)) for e in (1e-3, 1e-5, 1e-7)})
            gradients = gaussian(4, 256, 300).to(dtype)
            factors = gradients @ gradients.mT / 300
            candidates[f"{method} {name}"] = partial(inverse_root, factors, root=2, epsilon=1e-5, method=method)
    seconds = interleaved(candidates, repetitions)
    base = seconds["eigh float32"]
    return [row | {"time": round(seconds[f"{row['method']} {row['dtype']}"] / base, 1)} for row in rows]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("accuracy", "speed", "roots"), help="which table")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    from tests.benchmarks.report import environment, show

    rows = {"accuracy": accuracy, "speed": speed, "roots": roots}[options.what]()
    result = {"environment": environment(torch=torch.__version__), "rows": rows, "summary": {}}
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()

"""Estimated over true noise scale, for true noise scales from a hundredth of the batch to a hundred batches.

python -m tests.benchmarks.estimator_accuracy [--json] [--plot FILE]

Each trial is the plain mean of 40 measurements of 64 samples (the closed form: of more where its noise scale cannot be
made small enough), noise_sq and signal_sq apart, ratio last; 50 independent trials per case. An estimator is compared
with its own estimand, computed without it (tests.benchmarks.problems):

    rank_variance   textbook noise^2 / ||grad L||^2
    split           (sqrt(B) E||gbar - grad L||)^2 / ||grad L||^2

and "true G/B" is set by that estimand. Unresolved means what the service calls so: for split, a mean signal_sq below
two of its standard errors; for rank_variance, a reading above 0.7 of what pure noise reads.

Summary, over the closed form, normal noise and real gradients, all layouts and geometries, true G/B of 0.1 to 10:
split_worst_resolved_error is the worst |median over a case's resolved trials / truth - 1|, cases with less than 5
resolved trials left out; split_unresolved_share the share of all trials flagged; published_worst_ratio the smallest
median of rank_variance over truth. The signals made to mislead (flat, sparse, low rank) are rows, not in the summary.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gns_controller.core.contract import RESOLVED_STANDARD_ERRORS, SATURATED_RESOLUTION, Estimator, Geometry
from tests.benchmarks.problems import (
    GEOMETRIES,
    GaussianNoise,
    LinearRegression,
    Population,
    Problem,
    byte_llama_gradients,
    signal,
    step_noise,
    textbook_noise,
)
from trainer_hooks.estimators import choose_patterns, pure_noise_reading

NOISE_SCALES_PER_BATCH = (0.01, 0.1, 0.32, 1.0, 3.2, 10.0, 100.0)
TRIALS, MEASUREMENTS, BATCH, BLOCKS, CHUNK = 50, 40, 64, 8, 50
LAYOUTS = {"2x1": 2, "4x1": 4, "1x8": 8, "8x8": 64}
"""Ranks x micro-batches: sample groups."""
PATTERNS = (1, 3, 7)
LAYOUTS_OF_PATTERNS = {1: "all", 3: "4x1 1x8 8x8", 7: "1x8 8x8"}
"""Samples are exchangeable, so the same halves, quarters and eighths of the batch serve every layout that has them."""
SUMMARISED = ("closed form", "normal", "llama")
IN_SUMMARY = (0.1 / 1.05, 10.0 * 1.05)
"""Within 5 %, because the closed form's noise scales are only near the round numbers."""
MIN_RESOLVED_TRIALS = 5
STRICT_STANDARD_ERRORS = 5.0
"""For the columns `..._strict`: what a stricter flag would do."""
LLAMA_TENSORS = ("blocks.1.attention.out.weight", "blocks.1.feed_forward.down.weight")


Case = tuple[str, Geometry, int]
"""Layout, or "split"; geometry; which of the true noise scales."""


@dataclass(frozen=True)
class Readings:
    """Dual norms, not squared, (readings,) or (readings, patterns)."""

    noise: Tensor
    signal: Tensor
    progress: Tensor | None = None


@dataclass(frozen=True)
class Truth:
    """Of one estimator in one geometry: dual norms, not squared, of the noise as the problem has it."""

    noise: float
    signal: float

    def factor(self, noise_scale: float) -> float:
        """What the noise must be multiplied by for this noise scale."""
        return math.sqrt(noise_scale) * self.signal / self.noise


# ------------------------------------------------------------------ both estimators, batched over readings


def norm_and_direction(tensors: Sequence[Tensor], geometry: Geometry) -> tuple[Tensor, list[Tensor]]:
    """Dual norm and p(.) of (..., M, N) tensors taken together."""
    if geometry == "euclidean":
        norm = _total(tensor.square() for tensor in tensors).sqrt()
        return norm, [tensor / norm[..., None, None] for tensor in tensors]
    if geometry == "sign":
        return _total(tensor.abs() for tensor in tensors), [tensor.sign() for tensor in tensors]
    norm, directions = torch.zeros(()), []
    for tensor in tensors:
        wide = tensor if tensor.shape[-2] <= tensor.shape[-1] else tensor.mT
        values, vectors = torch.linalg.eigh(wide @ wide.mT)
        roots = values.clamp_min(values[..., -1:] * 1e-24).sqrt()
        matsign = (vectors / roots.unsqueeze(-2)) @ (vectors.mT @ wide)
        norm = norm + roots.sum(-1)
        directions.append(matsign if wide is tensor else matsign.mT)
    return norm, directions


def batched_split(mean: Sequence[Tensor], differences: Sequence[Tensor], *, batch: int, geometry: Geometry) -> Readings:
    """The split estimator of equal halves gbar + d and gbar - d: (readings, 1, M, N) and (readings, P, M, N)."""
    noise, _ = norm_and_direction(differences, geometry)
    halves_a = [gbar + d for gbar, d in zip(mean, differences, strict=True)]
    halves_b = [gbar - d for gbar, d in zip(mean, differences, strict=True)]
    norm_a, direction_a = norm_and_direction(halves_a, geometry)
    norm_b, direction_b = norm_and_direction(halves_b, geometry)
    inner_ab = _total(p * g for p, g in zip(direction_a, halves_b, strict=True))
    inner_ba = _total(p * g for p, g in zip(direction_b, halves_a, strict=True))
    return Readings(noise * batch**0.5, 0.5 * (norm_a + norm_b), 0.5 * (inner_ab + inner_ba))


def batched_spread(groups: Sequence[Tensor], *, size: int, geometry: Geometry) -> Tensor:
    """rank_variance's noise of (readings, K, M, N) group means."""
    count = groups[0].shape[1]
    total = torch.zeros(())
    for tensor in groups:
        deviations = tensor - tensor.mean(1, keepdim=True)
        if geometry == "spectral":
            wide = deviations if tensor.shape[-2] <= tensor.shape[-1] else deviations.mT
            stacked = wide.transpose(1, 2).flatten(2)
            values = torch.linalg.eigvalsh(stacked @ stacked.mT * (size / (count - 1)))
            total = total + values.clamp_min(0).sqrt().sum(-1)
        else:
            variance = deviations.square().sum(1) * (size / (count - 1))
            total = total + (variance if geometry == "euclidean" else variance.sqrt()).sum((-1, -2))
    return total.sqrt() if geometry == "euclidean" else total


def _total(parts: Iterator[Tensor]) -> Tensor:
    return torch.stack([part.sum((-1, -2)) for part in parts]).sum(0)


def block_signs() -> Tensor:
    """(7, 8): the patterns of 8 blocks of samples, the first one the halves of two ranks, the first 3 those of four."""
    chosen = choose_patterns(BLOCKS - 1, num_ranks=1, num_micro_batches=BLOCKS)
    reversed_bits = [int(f"{block:03b}"[::-1], 2) for block in range(BLOCKS)]
    rows = [[pattern.sign(rank=0, micro_batch=block) for block in reversed_bits] for pattern in chosen]
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------ readings of one problem


def read(
    problem: Problem, *, batch: int, factors: Mapping[tuple[Estimator, Geometry], Sequence[float]]
) -> dict[Case, Readings]:
    """All readings of both estimators, with the noise multiplied by each factor."""
    signs = block_signs() / BLOCKS
    chunks: dict[Case, list[Readings]] = {}
    for _ in range(TRIALS * MEASUREMENTS // CHUNK):
        drawn = problem.groups(CHUNK, BATCH, batch // BATCH)
        noise = [groups - mean for groups, mean in zip(drawn, problem.gradient, strict=True)]
        common = [tensor.mean(1, keepdim=True) for tensor in noise]
        blocks = [merged(tensor, BLOCKS) for tensor in noise]
        differences = [torch.einsum("pk,tkmn->tpmn", signs, tensor) for tensor in blocks]
        for (estimator, geometry), sizes in factors.items():
            spreads = {}
            if estimator == "rank_variance":
                for layout, count in LAYOUTS.items():
                    groups = [merged(tensor, count) for tensor in noise]
                    spreads[layout] = batched_spread(groups, size=batch // count, geometry=geometry)
            for index, factor in enumerate(sizes):
                mean = [gradient + factor * tensor for gradient, tensor in zip(problem.gradient, common, strict=True)]
                if estimator == "split":
                    scaled = [factor * tensor for tensor in differences]
                    found = batched_split(mean, scaled, batch=batch, geometry=geometry)
                    chunks.setdefault(("split", geometry, index), []).append(found)
                else:
                    norm = norm_and_direction(mean, geometry)[0][:, 0]
                    for layout, spread in spreads.items():
                        chunks.setdefault((layout, geometry, index), []).append(Readings(factor * spread, norm))
    return {case: _joined(found) for case, found in chunks.items()}


def merged(tensor: Tensor, count: int) -> Tensor:
    """(readings, K, M, N) group means -> (readings, count, M, N), neighbours together."""
    return tensor.reshape(len(tensor), count, -1, *tensor.shape[2:]).mean(2)


def _joined(found: Sequence[Readings]) -> Readings:
    progress = [readings.progress for readings in found if readings.progress is not None]
    return Readings(
        torch.cat([readings.noise for readings in found]),
        torch.cat([readings.signal for readings in found]),
        torch.cat(progress) if progress else None,
    )


# ------------------------------------------------------------------ from readings to rows


def rows_of(
    name: str,
    problem: Problem,
    *,
    geometries: Sequence[Geometry] = GEOMETRIES,
    estimators: Sequence[Estimator] = ("split", "rank_variance"),
    noise_scales_per_batch: Sequence[float] | None = NOISE_SCALES_PER_BATCH,
    batch: int = BATCH,
) -> list[dict[str, Any]]:
    """Every row of one problem. None: its noise as it is."""
    truths: dict[tuple[Estimator, Geometry], Truth] = {}
    for norm in geometries:
        if "split" in estimators:
            truths["split", norm] = Truth(step_noise(problem, norm, batch=batch), signal(problem, norm))
        if "rank_variance" in estimators:
            truths["rank_variance", norm] = Truth(textbook_noise(problem, norm), signal(problem, norm))
    factors = {
        key: [1.0] if noise_scales_per_batch is None else [truth.factor(g * batch) for g in noise_scales_per_batch]
        for key, truth in truths.items()
    }
    shapes = [(tensor.shape[0], tensor.shape[1]) for tensor in problem.gradient]
    rows = []
    for (what, geometry, index), readings in read(problem, batch=batch, factors=factors).items():
        estimator: Estimator = "split" if what == "split" else "rank_variance"
        truth = truths[estimator, geometry]
        scaled = Truth(factors[estimator, geometry][index] * truth.noise, truth.signal)
        labels: dict[str, Any] = {"problem": name, "geometry": geometry, "estimator": estimator}
        if estimator == "split":
            assert readings.progress is not None
            for count in PATTERNS:
                averaged = Readings(
                    readings.noise[:, :count].mean(1),
                    readings.signal[:, :count].mean(1),
                    readings.progress[:, :count].mean(1),
                )
                cells = labels | {"layouts": LAYOUTS_OF_PATTERNS[count], "patterns": count}
                rows.append(cells | _figures(averaged, scaled, batch=batch, ceiling=None))
        else:
            ceiling = pure_noise_reading(geometry, global_batch_size=batch, num_groups=LAYOUTS[what], shapes=shapes)
            cells = labels | {"layouts": what, "patterns": "-"}
            rows.append(cells | _figures(readings, scaled, batch=batch, ceiling=ceiling))
    return rows


def _figures(readings: Readings, true: Truth, *, batch: int, ceiling: float | None) -> dict[str, Any]:
    """One case: quantiles over its trials, for split over the resolved ones."""
    noise, norm = readings.noise, readings.signal
    progress = norm if readings.progress is None else readings.progress
    noise_sq, signal_sq = true.noise**2, true.signal**2
    truth = noise_sq / signal_sq
    noises, signals = _trials(noise.square()).mean(1), _trials(norm * progress)
    ratios = noises / signals.mean(1) / truth
    errors = signals.mean(1) / (signals.std(1) / MEASUREMENTS**0.5)
    if ceiling is None:
        unresolved, strictly = errors < RESOLVED_STANDARD_ERRORS, errors < STRICT_STANDARD_ERRORS
        kept, sure = ratios[~unresolved], ratios[~strictly]
    else:
        unresolved = ratios * truth > SATURATED_RESOLUTION * ceiling
        kept, sure, strictly = ratios, ratios, unresolved
    means = [_trials(part).mean(1) for part in (noise, norm, progress)]
    low, middle, high = _quantiles(kept)
    return {
        "true_over_batch": truth / batch,
        "median": middle,
        "p16": low,
        "p84": high,
        "unresolved": float(unresolved.double().mean()),
        "within_10_percent": float(((kept - 1).abs() <= 0.1).double().mean()) if len(kept) else None,
        "noise_sq": float(noises.mean() / noise_sq),
        "signal_sq": float(signals.mean() / signal_sq),
        "standard_errors": _quantiles(errors)[1],
        "median_strict": _quantiles(sure)[1],
        "unresolved_strict": float(strictly.double().mean()),
        "median_of_roots": _quantiles((means[0] ** 2 / (means[1] * means[2]) / truth)[~unresolved])[1],
        "signal_sq_by_exponent": None if ceiling else _quantiles(by_exponent(*means, batch=batch) / signal_sq)[1],
    }


def by_exponent(noise: Tensor, norm: Tensor, progress: Tensor, *, batch: int) -> Tensor:
    """Another signal_sq of the same averages, for comparison: H^2 (P/H)^(2/q), q = log(1 - P/H) / log(noise / H).

    H = E||g_half|| and P obey P = H - s dH/ds for noise of length s. signal_sq = H P continues H to s = 0 along
    H^2 = a^2 + b^2 s^2; this one along H^q = a^q + (noise)^q, with the measured noise and q from P.
    """
    share = (progress / norm).clamp(1e-9, 1 - 1e-9)
    exponent = torch.log1p(-share) / (noise * (2 / batch) ** 0.5 / norm).clamp(1e-9, 1 - 1e-9).log()
    signal_sq: Tensor = norm**2 * share ** (2 / exponent)
    return signal_sq


def _trials(readings: Tensor) -> Tensor:
    return readings.view(TRIALS, MEASUREMENTS)


def _quantiles(values: Tensor) -> tuple[float | None, float | None, float | None]:
    if not len(values):
        return None, None, None
    low, middle, high = torch.quantile(values, torch.tensor([0.16, 0.5, 0.84], dtype=values.dtype)).tolist()
    return low, middle, high


# ------------------------------------------------------------------ the problems


def closed_form_rows() -> list[dict[str, Any]]:
    """Linear regression. Its noise grows with its signal, so small noise scales need more samples, not more signal."""
    shape = _normal(16, 24)
    length, least = float(shape.norm()), shape.shape[1] + 1
    rows = []
    for ratio in NOISE_SCALES_PER_BATCH:
        batch = BATCH * max(1, math.ceil(1.5 * least / ratio / BATCH))
        # tr C / |D|^2 = n + 1 + m n s^2 / |D|^2
        size = (shape.numel() / (ratio * batch - least)) ** 0.5 / length
        problem = LinearRegression(size * shape, noise=1.0)
        rows += rows_of("closed form", problem, noise_scales_per_batch=None, batch=batch)
    return rows


def llama_rows(train_steps: int) -> list[dict[str, Any]]:
    """512 real per-sequence gradients of two weight matrices."""
    gradients = byte_llama_gradients(num_samples=512, train_steps=train_steps, tensors=LLAMA_TENSORS)
    return rows_of(f"llama, {train_steps} steps", Population(gradients))


def misleading_rows() -> list[dict[str, Any]]:
    """Signals shaped unlike the noise."""
    sparse = _normal(16, 24) * (torch.rand(16, 24, generator=torch.Generator().manual_seed(2)) < 1 / 16)
    factors = _normal(16 + 24, 4)
    rows = []
    for name, gradient, geometry in (
        ("flat", _normal(16, 24).sign(), "sign"),
        ("1 entry in 16", sparse, "sign"),
        ("flat", torch.linalg.qr(_normal(24, 16))[0].mT, "spectral"),
        ("rank 4 of 16", factors[:16] @ factors[16:].mT, "spectral"),
        ("rank 1 of 16", factors[:16, :1] @ factors[16:, :1].mT, "spectral"),
    ):
        rows += rows_of(name, GaussianNoise(gradient), geometries=[cast(Geometry, geometry)], estimators=["split"])
    return rows


JOBS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "llama at initialisation": partial(llama_rows, 0),
    "llama trained": partial(llama_rows, 300),
    "closed form": closed_form_rows,
    "normal": lambda: rows_of("normal", GaussianNoise(_normal(16, 24))),
    "misleading": misleading_rows,
}


def run_job(name: str) -> list[dict[str, Any]]:
    """One job on one core: small matrices gain nothing from more threads."""
    torch.set_num_threads(1)
    return JOBS[name]()


def measure() -> list[dict[str, Any]]:
    """All rows, two jobs at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(run_job, JOBS) for row in rows]


def _normal(*dims: int) -> Tensor:
    return torch.randn(dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures asked for."""
    low, high = IN_SUMMARY
    inside = [row for row in rows if row["problem"].startswith(SUMMARISED) and low <= row["true_over_batch"] <= high]
    split = [row for row in inside if row["estimator"] == "split"]
    resolved = [row for row in split if (1 - row["unresolved"]) * TRIALS >= MIN_RESOLVED_TRIALS]
    return {
        "split_worst_resolved_error": max(abs(row["median"] - 1) for row in resolved),
        "split_worst_error_mostly_resolved": max(abs(r["median"] - 1) for r in resolved if r["unresolved"] <= 0.5),
        "split_worst_error_never_flagged": max(abs(r["median"] - 1) for r in resolved if r["unresolved"] == 0),
        "split_share_of_cases_within_10_percent": sum(abs(r["median"] - 1) <= 0.1 for r in resolved) / len(resolved),
        "split_unresolved_share": statistics.mean(row["unresolved"] for row in split),
        "published_worst_ratio": min(row["median"] for row in inside if row["estimator"] == "rank_variance"),
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Median and 16 to 84 % of estimate over truth against true G/B, one panel per problem and geometry."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(row["problem"] for row in rows) if name.startswith(SUMMARISED)]
    figure = Figure(figsize=(12, 2.6 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), len(GEOMETRIES), sharex=True, sharey=True, squeeze=False)
    for line, name in zip(panels, names, strict=True):
        for panel, geometry in zip(line, GEOMETRIES, strict=True):
            for label, colour, chosen in (
                ("split, 1 pattern", "tab:green", {"estimator": "split", "patterns": 1}),
                ("split, 7 patterns", "tab:blue", {"estimator": "split", "patterns": 7}),
                ("rank_variance, 2 groups", "tab:orange", {"layouts": "2x1"}),
                ("rank_variance, 64 groups", "tab:red", {"layouts": "8x8"}),
            ):
                wanted = {"problem": name, "geometry": geometry, **chosen}
                found = [row for row in rows if wanted.items() <= row.items() and row["median"] is not None]
                x = [row["true_over_batch"] for row in found]
                panel.fill_between(x, [r["p16"] for r in found], [r["p84"] for r in found], color=colour, alpha=0.15)
                panel.plot(x, [row["median"] for row in found], color=colour, label=label, linewidth=1)
                for row in found:
                    flagged = row["unresolved"] > 0.5
                    panel.plot(
                        row["true_over_batch"],
                        row["median"],
                        "o",
                        color=colour,
                        markersize=4,
                        mfc="white" if flagged else colour,
                    )
            panel.axhspan(0.9, 1.1, color="black", alpha=0.08)
            panel.set(xscale="log", yscale="log", ylim=(0.008, 3), title=f"{name}: {geometry}")
            panel.grid(alpha=0.3)
        line[0].set_ylabel("estimate / truth")
    for panel in panels[-1]:
        panel.set_xlabel("true noise scale / batch")
    panels[0][0].legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, print, and draw if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, help="also draw the rows into this PNG file")
    options = parser.parse_args()
    from tests.benchmarks.report import environment, show

    rows = measure()
    more = {"torch": torch.__version__, "measurements": MEASUREMENTS, "trials": TRIALS}
    show({"environment": environment(**more), "rows": rows, "summary": summarise(rows)}, as_json=options.json)
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()

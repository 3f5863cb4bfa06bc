"""Critical batch and noise scale over samples, and what each batch cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gns_controller.experiments.calibration.results import CheckpointResult
from gns_controller.experiments.figures import ESTIMATOR_COLOURS, new_figure, save_figure


def plot_results(results: Sequence[CheckpointResult], path: Path, *, tolerance: float) -> None:
    """Draw the results and write a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(width=12, height=4.5)
    over_samples, over_batches = figure.subplots(1, 2)
    samples = [result.samples for result in results]
    if results[0].critical_batch_size is not None:
        critical = [float(result.critical_batch_size or 0) for result in results]
        upper = [float(result.next_batch_size or value) for result, value in zip(results, critical, strict=True)]
        reach = [[0.0] * len(results), [high - low for low, high in zip(critical, upper, strict=True)]]
        over_samples.errorbar(
            samples,
            critical,
            yerr=reach,
            fmt="o",
            color="#2a2f36",
            capsize=4,
            label="critical batch, to the next tried",
        )
    for estimator, colour in ESTIMATOR_COLOURS.items():
        for is_resolved in (True, False):
            points = [
                (result.samples, scale.noise_scale)
                for result in results
                for scale in result.noise_scales
                if scale.estimator == estimator and scale.unresolved != is_resolved and scale.noise_scale
            ]
            if points:
                face = colour if is_resolved else "none"
                label = f"noise scale, {estimator}" + ("" if is_resolved else " (unresolved)")
                over_samples.scatter(*zip(*points, strict=True), edgecolors=colour, facecolors=face, label=label)
    over_samples.set_yscale("log", base=2)
    over_samples.set_xlabel("samples seen")
    over_samples.set_ylabel("samples")
    for result in results:
        own = result.branches[0].loss
        batches = [branch.global_batch_size for branch in result.branches]
        label = f"{result.samples} samples, seed {result.seed}"
        over_batches.plot(batches, [branch.loss - own for branch in result.branches], marker="o", label=label)
    over_batches.axhline(tolerance, color="#9aa3ad", linestyle="--", linewidth=1.2, label=f"tolerance {tolerance:g}")
    over_batches.set_xscale("log", base=2)
    over_batches.set_xlabel("global batch size of the branch (samples)")
    over_batches.set_ylabel("smoothed loss above the checkpoint's batch (nats)")
    for axes in (over_samples, over_batches):
        axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path)

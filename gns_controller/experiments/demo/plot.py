"""Loss over samples and over steps, batch size, and noise scale with its ceiling."""

from __future__ import annotations

from pathlib import Path

from gns_controller.experiments.demo.results import RunResult
from gns_controller.experiments.figures import ESTIMATOR_COLOURS, new_figure, save_figure

COLOURS = ("#5b6573", "#9aa3ad", ESTIMATOR_COLOURS["rank_variance"], ESTIMATOR_COLOURS["split"], "#2a8c5a")
"""Baselines grey, published orange, split blue, open loop green."""


def plot_results(results: list[RunResult], path: Path, *, subtitle: str) -> None:
    """Draw the results and write a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(width=12, height=8)
    (over_samples, over_steps), (batches, scales) = figure.subplots(2, 2)
    floor = min(result.best_loss for result in results)
    top = max(result.evaluations[len(result.evaluations) // 6]["validation_loss"] for result in results)
    for result, colour in zip(results, COLOURS, strict=False):
        losses = [entry["validation_loss"] for entry in result.evaluations]
        style = {"color": colour, "label": result.title, "linewidth": 1.8}
        over_samples.plot([entry["samples"] for entry in result.evaluations], losses, **style)
        over_steps.plot([entry["optimizer_step"] for entry in result.evaluations], losses, **style)
        samples = [entry["samples_seen"] for entry in result.decisions]
        batches.step(samples, [entry["plan"]["global_batch_size"] for entry in result.decisions], where="post", **style)
        if result.name in ("published", "split"):
            scales.plot(samples, [entry["noise_scale"] or float("nan") for entry in result.decisions], **style)
            ceilings = [entry["ceiling_samples"] or float("nan") for entry in result.decisions]
            scales.plot(samples, ceilings, color=colour, linestyle="--", linewidth=1.2, label="its ceiling")
    for axes in (over_samples, over_steps):
        axes.set_ylim(floor - 0.02 * (top - floor), top)
        axes.set_ylabel("validation loss (nats per byte)")
    over_samples.set_title("Loss at equal samples")
    over_steps.set_title("Loss at equal optimizer steps")
    batches.set_title("Global batch size")
    scales.set_title("Noise scale, and the largest one that could be told from noise")
    batches.set_yscale("log", base=2)
    scales.set_yscale("log")
    for axes in (batches, scales):
        axes.set_ylabel("samples")
    for axes in (over_samples, batches, scales):
        axes.set_xlabel("samples seen")
    over_steps.set_xlabel("optimizer steps")
    over_steps.legend(frameon=False)
    scales.legend(frameon=False, fontsize="small")
    figure.suptitle(subtitle, fontsize="medium")
    save_figure(figure, path)

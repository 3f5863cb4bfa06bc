"""The tables on the terminal, and the sentences under them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gns_controller.experiments.calibration.results import (
    ESTIMATORS,
    CheckpointResult,
    NoiseScaleResult,
    remarks,
    typical_theta,
)

_SIGNS = {"": "", "at_least": ">= ", "at_most": "<= "}


def print_results(results: Sequence[CheckpointResult], console: Console, *, tolerance: float) -> None:
    """Print the tables and the remarks under them."""
    is_price = results[0].price is not None
    console.print(_prices(results) if is_price else _critical_batches(results))
    console.print(_noise_scales(results))
    for sentence in remarks(results):
        console.print(sentence, highlight=False)
    if is_price:
        console.print(
            "Price: (loss at 2 B - loss at B) / steps saved, over the same samples; below zero the larger batch was "
            "better, too. One pair of branches: differences of a few thousandths of a nat are chance.",
            highlight=False,
        )
        return
    console.print(
        f"Critical batch: the largest that loses at most {tolerance:g} nats against every smaller one. "
        "theta = sqrt(kappa * noise scale / critical batch), kappa = pi/2 for split and 1 for rank_variance. "
        "A question mark: unresolved. One branch per batch: differences of a few thousandths of a nat are chance.",
        highlight=False,
    )
    for estimator in ESTIMATORS:
        theta = typical_theta(results, estimator)
        if theta is not None:
            console.print(f"theta for {estimator}, geometric mean of resolved readings: {theta:.2f}", highlight=False)


def critical_text(result: CheckpointResult) -> str:
    """The critical batch with the side from which it is known."""
    return f"{_SIGNS[result.bound]}{result.critical_batch_size}"


def _critical_batches(results: Sequence[CheckpointResult]) -> Table:
    table = Table(
        title="Smoothed validation loss (nats) by batch, and the critical batch",
        title_justify="left",
        title_style="bold",
    )
    multiples = [branch.multiple for branch in results[0].branches]
    for heading in ("samples", "seed", "batch", *(f"x{multiple}" for multiple in multiples), "critical"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            *(str(result.samples), str(result.seed), str(result.global_batch_size)),
            *(f"{branch.loss:.4f}" for branch in result.branches),
            critical_text(result),
        )
    return table


def _prices(results: Sequence[CheckpointResult]) -> Table:
    table = Table(title="Price of doubling the batch B", title_justify="left", title_style="bold")
    for heading in ("samples", "seed", "B", "loss at B", "at 2 B", "steps saved", "nats per step"):
        table.add_column(heading, justify="right")
    for result in results:
        one, two = result.branches
        table.add_row(
            *(str(result.samples), str(result.seed), str(result.global_batch_size)),
            *(f"{one.loss:.4f}", f"{two.loss:.4f}", str(result.steps_saved), f"{result.price:.2e}"),
        )
    return table


def _noise_scales(results: Sequence[CheckpointResult]) -> Table:
    table = Table(title="Noise scale at the checkpoint's batch, in samples", title_justify="left", title_style="bold")
    for heading in ("samples", "seed", "estimator", "noise scale", "two standard errors", "theta"):
        table.add_column(heading, justify="left" if heading == "estimator" else "right")
    for result in results:
        for scale in result.noise_scales:
            mark = "?" if scale.unresolved else ""
            table.add_row(
                *(str(result.samples), str(result.seed), scale.estimator),
                "-" if scale.noise_scale is None else f"{scale.noise_scale:.4g}{mark}",
                _interval_text(scale),
                "-" if scale.theta is None else f"{scale.theta:.2f}{mark}",
            )
    return table


def _interval_text(scale: NoiseScaleResult) -> str:
    if scale.noise_scale_low is None:
        return "-"
    low = f"{scale.noise_scale_low:.4g}"
    return f"{low} or more" if scale.noise_scale_high is None else f"{low} to {scale.noise_scale_high:.4g}"

"""The figures of the experiments: drawn without a display, with plain axes, written as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gns_controller.core.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ESTIMATOR_COLOURS = {"split": "#1f6feb", "rank_variance": "#c2571a"}


def new_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure; sizes in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("the plot needs matplotlib: pip install 'gns-controller[demo]'.") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Give all axes a faint grid and two spines, and write the figure."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)

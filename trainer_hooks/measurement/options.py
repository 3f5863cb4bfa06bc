"""Measurement options: what is measured, how often, and how finely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from gns_controller.core.contract import Direction, Estimator, Geometry, Span
from gns_controller.core.errors import InvalidInputError
from trainer_hooks.estimators.spectral import SpectralNorms
from trainer_hooks.measurement.groups import DEFAULT_EXCLUDE

MOST_SIGN_PATTERNS = 63

DEFAULT_BUDGET = 0.01
"""Share of the run's time that measuring may take where neither an interval nor a budget is given."""


@dataclass(frozen=True, kw_only=True)
class MeasurementOptions:
    """Choice of what is measured, how often, and how finely. Every default follows the policy or the budget.

    Raises:
        InvalidInputError: a value is out of its range; the message names the option.
    """

    interval: Span | None = None
    """Shortest distance between two measured steps, `Span(steps=...)` or `Span(samples=...)`. Default: as the budget
    allows."""
    budget: float | None = None
    """Largest share of the run's time that measuring may take, 0 to 1. The interval, the number of sign patterns and,
    if need be, the measured layers follow from measured costs. Default: 0.01, or no budget if an interval is given."""
    num_sign_patterns: int | None = None
    """Pairs of halves per measurement, each with a buffer of the gradient's size. Default: 1, or what the budget finds
    best."""
    estimators: Sequence[Estimator] | None = None
    """Estimators to measure with, "split" and "rank_variance". Default: the one that the policy follows."""
    directions: Sequence[Direction] | None = None
    """Directions to measure along: "gradient", "update" (momentum included), or both. Default: the policy's."""
    spectral_norms: SpectralNorms | None = None
    """How nuclear norms are computed: "exact" (eigenvalues in float64) or "polar_express" (matrix products alone; low
    by less than 0.1 % on ordinary layers). Default: polar_express on CUDA, exact elsewhere, the faster one in each
    case."""
    progress_curve: bool = False
    """Also measure progress at quarters, eighths, ... of the batch, as far as sign patterns go."""
    background_eigenvalues: bool = False
    """Take the eigenvalues of rank_variance on the CPU, in a thread, while training goes on. Its readings come one
    measurement late."""
    geometries: Mapping[str, Geometry] | None = None
    """Optimizer class name -> geometry, for optimizers that are not known or to overrule what is known."""
    exclude: str = DEFAULT_EXCLUDE
    """Regular expression; parameters whose name it matches are not measured beside a spectral group. Default:
    embeddings and heads."""
    min_sample_groups: int = 2
    """Fewest micro-batches, over all ranks, that a measured step is cut into."""
    self_test: bool = True
    """Send known gradients through the real backward path at attach, before anything is measured."""

    def __post_init__(self) -> None:
        """Check every option alone; what depends on the policy or the model is checked in `requirements`."""
        for name, known in (("estimators", get_args(Estimator)), ("directions", get_args(Direction))):
            chosen = getattr(self, name)
            if isinstance(chosen, str):
                raise InvalidInputError(f"{name}={chosen!r} is not a list of names, like [{known[0]!r}].")
            unknown = sorted(set(chosen or ()) - set(known))
            if unknown:
                raise InvalidInputError(f"{name} {unknown} do not exist; there are {', '.join(known)}.")
        if self.interval is not None and not isinstance(self.interval, Span):
            raise InvalidInputError(f"interval={self.interval!r} is not a Span: Span(steps=...) or Span(samples=...).")
        if self.budget is not None and (not isinstance(self.budget, int | float) or not 0 < self.budget < 1):
            raise InvalidInputError(f"budget={self.budget!r} is not a share of time between 0 and 1, like 0.01.")
        if self.spectral_norms not in (None, *get_args(SpectralNorms)):
            known_norms = ", ".join(get_args(SpectralNorms))
            raise InvalidInputError(f"spectral_norms={self.spectral_norms!r} does not exist; there are {known_norms}.")
        if self.num_sign_patterns is not None and not 1 <= self.num_sign_patterns <= MOST_SIGN_PATTERNS:
            raise InvalidInputError(
                f"num_sign_patterns={self.num_sign_patterns} is not between 1 and {MOST_SIGN_PATTERNS}: each needs a "
                "buffer of the gradient's size."
            )

    @property
    def effective_budget(self) -> float | None:
        """The budget in force: the given one, DEFAULT_BUDGET without an interval, else none."""
        return DEFAULT_BUDGET if self.budget is None and self.interval is None else self.budget

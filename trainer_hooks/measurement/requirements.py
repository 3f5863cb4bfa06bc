"""Requirements of a policy: what has to be measured for it, and where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gns_controller.core.contract import Direction, Estimator, Geometry
from gns_controller.core.errors import GeometryError, InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.estimators.spectral import SpectralNorms
from trainer_hooks.measurement.groups import MeasuredGroup
from trainer_hooks.measurement.sums_row import Measured

_CURVE_PATTERNS = 3
"""Two points of a progress curve, a quarter and a half of the batch, take three patterns over four sample groups."""
_CURVE_GROUPS = 4


class Needs(NamedTuple):
    """What to measure, and how finely."""

    measured: Measured
    num_sign_patterns: int | None
    """None: one, or as the budget allows."""
    min_sample_groups: int


def needs_of(
    policy: AnyPolicyConfig,
    *,
    groups: Sequence[MeasuredGroup],
    layout: Layout,
    estimators: Sequence[Estimator] | None,
    directions: Sequence[Direction] | None,
    spectral_norms: SpectralNorms | None,
    progress_curve: bool,
    background_eigenvalues: bool,
    num_sign_patterns: int | None,
    min_sample_groups: int,
) -> Needs:
    """Return what to measure: what attach was given, and what the policy needs besides.

    A progress curve takes three sign patterns always, and not as many as the budget finds best, because its averages
    begin anew when the points move. A policy in the euclidean geometry reads the l2 norm of groups that are
    measured in another one as well.

    Raises:
        GeometryError: the policy follows a geometry, other than euclidean, that no group has.
        InvalidInputError: too few patterns for the policy, or inner products where no rank holds a whole gradient.
    """
    found: list[Geometry] = sorted({group.geometry for group in groups})
    also_euclidean = policy.geometry == "euclidean" and "euclidean" not in found
    if policy.geometry is not None and policy.geometry not in found and not also_euclidean:
        raise GeometryError(
            f"the policy follows geometry {policy.geometry!r}, and no parameter group has it; "
            f"groups have {', '.join(found)}. Name one of these, or 'euclidean', or set geometry to null."
        )
    inner_products = policy.needs.inner_products
    if inner_products and policy.geometry != "euclidean" and found != ["euclidean"]:
        raise GeometryError(
            f"{policy.policy} reads inner products, which belong to the l2 norm: give it geometry='euclidean'."
        )
    if inner_products and (layout.averages_in_backward or layout.model_parallel_size > 1):
        raise InvalidInputError(
            f"{policy.policy} needs every micro-batch's whole gradient until the mean over ranks is known, and with "
            f"{layout.name} no rank holds one. Use norm_test, or DistributedDataParallel."
        )
    if policy.needs.progress_curve:
        progress_curve = True
        if num_sign_patterns is not None and num_sign_patterns < _CURVE_PATTERNS:
            raise InvalidInputError(
                f"the policy {policy.policy} needs num_sign_patterns={_CURVE_PATTERNS} or more, got "
                f"{num_sign_patterns}: progress at two sub-batches takes so many. Leave the argument out."
            )
        num_sign_patterns = num_sign_patterns or _CURVE_PATTERNS
        min_sample_groups = max(min_sample_groups, _CURVE_GROUPS)
    measured = Measured(
        estimators=tuple(dict.fromkeys(estimators or [policy.estimator])),
        directions=tuple(dict.fromkeys(directions or [policy.direction])),
        spectral_norms=spectral_norms or ("polar_express" if layout.ranks.device.type == "cuda" else "exact"),
        progress_curve=progress_curve,
        background=background_eigenvalues,
        also_euclidean=also_euclidean,
        inner_products=inner_products,
    )
    return Needs(measured, num_sign_patterns, min_sample_groups)

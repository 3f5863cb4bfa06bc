"""Requirements: what a policy needs measured, beside what the caller asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gns_controller.core.contract import Geometry
from gns_controller.core.errors import GeometryError, InvalidInputError
from gns_controller.core.policies import AnyPolicyConfig
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.measurement.groups import MeasuredGroup
from trainer_hooks.measurement.options import MeasurementOptions
from trainer_hooks.measurement.sums_row import Measured

_CURVE_PATTERNS = 3
"""Two points of a progress curve, a quarter and a half of the batch, take three patterns over four sample groups."""
_CURVE_GROUPS = 4


class Requirements(NamedTuple):
    """Quantities to measure, and how finely."""

    measured: Measured
    num_sign_patterns: int | None
    """Pairs of halves per measurement. None: one, or as the budget allows."""
    min_sample_groups: int
    """Fewest micro-batches of a measured step, over all ranks."""


def requirements_of(
    policy: AnyPolicyConfig, options: MeasurementOptions, *, groups: Sequence[MeasuredGroup], layout: Layout
) -> Requirements:
    """Combine what the caller asks to measure with what the policy cannot do without.

    A progress curve takes three sign patterns always, and not as many as the budget finds best, because its averages
    begin anew when the points move. A policy in the euclidean geometry reads the l2 norm of groups that are
    measured in another one as well.

    Raises:
        GeometryError: the policy follows a geometry, other than euclidean, that no group has.
        InvalidInputError: the policy follows an estimator or a direction that the options leave out; too few patterns
            for the policy; or inner products where no rank holds a whole gradient.
    """
    _check_followed(policy, options)

    # Geometry: a policy in the l2 norm reads every group in it, besides the group's own.
    geometries: list[Geometry] = sorted({group.geometry for group in groups})
    also_euclidean = policy.geometry == "euclidean" and "euclidean" not in geometries
    if policy.geometry is not None and policy.geometry not in geometries and not also_euclidean:
        raise GeometryError(
            f"the policy follows geometry {policy.geometry!r}, and no parameter group has it; "
            f"groups have {', '.join(geometries)}. Name one of these, or 'euclidean', or set geometry to null."
        )

    # Inner products need every micro-batch's whole gradient until the mean is known.
    inner_products = policy.needs.inner_products
    if inner_products and policy.geometry != "euclidean" and geometries != ["euclidean"]:
        raise GeometryError(
            f"{policy.policy} reads inner products, which belong to the l2 norm: give it geometry='euclidean'."
        )
    if inner_products and (layout.averages_in_backward or layout.model_parallel_size > 1):
        raise InvalidInputError(
            f"{policy.policy} needs every micro-batch's whole gradient until the mean over ranks is known, and with "
            f"{layout.name} no rank holds one. Use norm_test, or DistributedDataParallel."
        )

    # A progress curve needs enough patterns and sample groups for two points.
    num_sign_patterns, min_sample_groups = options.num_sign_patterns, options.min_sample_groups
    needs_curve = policy.needs.progress_curve
    if needs_curve:
        if num_sign_patterns is not None and num_sign_patterns < _CURVE_PATTERNS:
            raise InvalidInputError(
                f"the policy {policy.policy} needs num_sign_patterns={_CURVE_PATTERNS} or more, got "
                f"{num_sign_patterns}: progress at two sub-batches takes so many. Leave the option out."
            )
        num_sign_patterns = num_sign_patterns or _CURVE_PATTERNS
        min_sample_groups = max(min_sample_groups, _CURVE_GROUPS)
    measured = Measured(
        estimators=tuple(dict.fromkeys(options.estimators or [policy.estimator])),
        directions=tuple(dict.fromkeys(options.directions or [policy.direction])),
        spectral_norms=options.spectral_norms or ("polar_express" if layout.ranks.device.type == "cuda" else "exact"),
        progress_curve=options.progress_curve or needs_curve,
        background=options.background_eigenvalues,
        also_euclidean=also_euclidean,
        inner_products=inner_products,
    )
    return Requirements(measured, num_sign_patterns, min_sample_groups)


def _check_followed(policy: AnyPolicyConfig, options: MeasurementOptions) -> None:
    """Check that the policy's estimator and direction are among the measured ones, and go together."""
    if options.directions and policy.direction not in options.directions:
        raise InvalidInputError(
            f"the policy follows the {policy.direction}, and directions={list(options.directions)} does not measure it."
        )
    if policy.estimator == "rank_variance" and policy.direction == "update":
        raise InvalidInputError("the update direction is measured by the split estimator only.")
    if options.estimators and policy.estimator not in options.estimators:
        raise InvalidInputError(
            f"the policy follows {policy.estimator}, and estimators={list(options.estimators)} does not measure it."
        )

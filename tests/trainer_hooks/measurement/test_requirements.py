"""Measuring follows the policy: what it needs is switched on, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gns_controller.core.contract import Decision, GroupReading, Span
from gns_controller.core.errors import GeometryError, InvalidInputError
from gns_controller.core.policies import (
    HoldPolicyConfig,
    InnerProductTestPolicyConfig,
    NoiseScalePolicyConfig,
    NormTestPolicyConfig,
    ProgressPolicyConfig,
)
from tests.trainer_hooks.measurement.test_scheduler import Rows, attach, deep_network, loss_of
from trainer_hooks import AdaptiveBatch, MeasurementOptions
from trainer_hooks.distributed.collectives import RankGroup
from trainer_hooks.distributed.layout import DataParallel, Layout
from trainer_hooks.measurement.groups import find_groups
from trainer_hooks.measurement.requirements import Requirements, requirements_of
from trainer_hooks.optim import Muon, Signum


def trained(session: AdaptiveBatch, *, steps: int) -> list[list[GroupReading]]:
    """Readings of each step."""
    found = []
    for step in session.steps(Rows()):
        for rows in step:
            step.backward(loss_of(session.model, rows))
        step.apply()
        found.append(session.last_readings)
        if session.optimizer_step == steps:
            break
    return found


def needs(layout: Layout, policy: Any, optimizer: torch.optim.Optimizer, **changes: Any) -> Requirements:
    model = deep_network()
    made = type(optimizer)(model.parameters(), lr=0.1)
    groups = find_groups(model, [made])
    return requirements_of(policy, MeasurementOptions(**changes), groups=groups, layout=layout)


@pytest.mark.parametrize("budget", [{"measurement_interval": Span(steps=1)}, {"measurement_budget": 0.5}])
def test_the_progress_policy_gets_its_curve_without_being_told(budget: dict[str, Any]) -> None:
    decisions: list[Decision] = []
    session = attach(
        deep_network(),
        global_batch_size=16,
        policy=ProgressPolicyConfig(),
        on_decision=lambda decision, source: decisions.append(decision),
        **budget,
    )
    readings = [found for found in trained(session, steps=30) if found][-1]
    assert readings[0].num_sign_patterns == 3
    assert [point.samples for point in readings[0].progress_curve] == [4, 8]
    assert readings[0].num_groups >= 4
    assert decisions
    assert not any("measure with progress_curve" in decision.explanation for decision in decisions)


def test_fewer_patterns_than_the_curve_needs_are_refused_and_more_are_kept() -> None:
    with pytest.raises(InvalidInputError, match="needs num_sign_patterns=3 or more, got 1"):
        attach(deep_network(), policy=ProgressPolicyConfig(), num_sign_patterns=1)
    session = attach(
        deep_network(),
        global_batch_size=32,
        policy=ProgressPolicyConfig(),
        num_sign_patterns=7,
        measurement_interval=Span(steps=1),
    )
    [readings] = trained(session, steps=1)
    assert [point.samples for point in readings[0].progress_curve] == [4, 8, 16]


@pytest.mark.parametrize("background", [False, True])
def test_a_euclidean_policy_reads_the_l2_norm_of_groups_that_are_measured_in_their_own(background: bool) -> None:
    model = deep_network()
    muon = Muon([layer.weight for layer in list(model)[:-1]], lr=1e-3)
    adamw = torch.optim.AdamW(model[-1].parameters(), lr=1e-3)
    decisions: list[Decision] = []
    session = attach(
        model,
        optimizer=[muon, adamw],
        policy=NormTestPolicyConfig(),
        estimators=["rank_variance", "split"],
        measurement_interval=Span(steps=1),
        background_eigenvalues=background,
        on_decision=lambda decision, source: decisions.append(decision),
    )
    described = [(group.name, group.geometry) for group in session.specification.parameter_groups]
    assert described == [
        ("matrices", "spectral"),
        ("others", "sign"),
        ("matrices, euclidean", "euclidean"),
        ("others, euclidean", "euclidean"),
    ]
    assert "also=euclidean" in session.describe()
    second = trained(session, steps=3)[1]
    both = {reading.group: reading for reading in second if reading.estimator == "rank_variance"}
    assert [both[name].geometry for name, _ in described] == [geometry for _, geometry in described]
    assert [both[name].repeats for name, _ in described] == [None, None, "matrices", "others"]
    # One matrix as a vector: the nuclear norm is at least the l2 norm, the l1 norm at least that.
    assert both["others, euclidean"].signal < both["others"].signal
    assert both["matrices, euclidean"].signal < both["matrices"].signal
    assert any(decision.noise_scale is not None for decision in decisions)


def test_the_l2_norm_besides_is_that_of_an_optimizer_measured_in_it_alone() -> None:
    found = {}
    for optimizer in (Muon, Signum, torch.optim.SGD):
        model = deep_network()
        session = attach(
            model,
            optimizer=optimizer(model.parameters(), lr=0.0),
            policy=InnerProductTestPolicyConfig(growth_cap=1.5),
            estimators=["rank_variance", "split"],
            measurement_interval=Span(steps=1),
            min_sample_groups=4,
            progress_curve=True,
            num_sign_patterns=3,
        )
        [readings] = trained(session, steps=1)
        found[optimizer.__name__] = {r.estimator: r for r in readings if r.geometry == "euclidean"}
    for name in ("Muon", "Signum"):
        for estimator, expected in found["SGD"].items():
            reading = found[name][estimator]
            assert reading.noise == pytest.approx(expected.noise, rel=1e-6)
            assert reading.signal == pytest.approx(expected.signal, rel=1e-6)
            assert reading.ceiling_samples == expected.ceiling_samples
            assert len(reading.progress_curve) == len(expected.progress_curve)
            if estimator == "rank_variance":
                assert expected.inner_product_variance is not None
                assert reading.inner_product_variance == pytest.approx(expected.inner_product_variance, rel=1e-6)
            else:
                assert reading.progress == pytest.approx(expected.progress, rel=1e-5)


def test_the_inner_product_test_decides_by_its_own_statistic() -> None:
    decisions: list[Decision] = []
    session = attach(
        deep_network(),
        policy=InnerProductTestPolicyConfig(),
        measurement_interval=Span(steps=1),
        on_decision=lambda decision, source: decisions.append(decision),
    )
    readings = trained(session, steps=4)[1]
    assert [reading.inner_product_variance is None for reading in readings] == [True, False]
    assert all("inner-product test" in decision.explanation for decision in decisions)


def test_a_gradient_that_is_not_finite_has_no_inner_products_and_training_goes_on() -> None:
    model = deep_network()
    session = attach(
        model,
        optimizer=Signum(model.parameters(), lr=0.0),
        policy=InnerProductTestPolicyConfig(),
        measurement_interval=Span(steps=1),
    )
    step = next(session.steps(Rows()))
    for rows in step:
        step.backward(loss_of(model, rows) * float("nan"))
    euclidean = session.measure()[1]
    assert (euclidean.geometry, euclidean.inner_product_variance) == ("euclidean", None)
    assert not euclidean.is_finite


def test_other_geometries_that_no_group_has_stay_refused() -> None:
    model = deep_network()
    with pytest.raises(GeometryError, match="follows geometry 'spectral', and no parameter group has it"):
        attach(model, optimizer=Signum(model.parameters()), policy=NoiseScalePolicyConfig(geometry="spectral"))
    with pytest.raises(GeometryError, match="give it geometry='euclidean'"):
        attach(model, policy=InnerProductTestPolicyConfig(geometry=None))
    assert attach(model, policy=HoldPolicyConfig()).specification.parameter_groups[0].geometry == "spectral"


@pytest.mark.parametrize("model_parallel_size", [1, 2])
def test_inner_products_are_refused_where_no_rank_holds_a_whole_gradient(model_parallel_size: int) -> None:
    ranks = RankGroup.find(torch.device("cpu"))
    modules: Any = () if model_parallel_size > 1 else (object(),)
    layout = Layout("FSDP2", ranks, DataParallel(0, 1), model_parallel_size, modules)
    with pytest.raises(InvalidInputError, match="with FSDP2 no rank holds one"):
        needs(layout, InnerProductTestPolicyConfig(), Signum(deep_network().parameters()))
    assert needs(layout, NormTestPolicyConfig(), Signum(deep_network().parameters())).measured.also_euclidean

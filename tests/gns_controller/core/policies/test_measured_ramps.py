"""Policies that measure: their arithmetic against vectors, brute force and closed forms."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, GroupReading, NoiseScaleMeasurement, ProgressPoint, Span
from gns_controller.core.policies import (
    GoodputPolicyConfig,
    InnerProductTestPolicyConfig,
    NoiseScalePolicyConfig,
    NormTestPolicyConfig,
    ProgressPolicyConfig,
    RunFacts,
    decide,
    initial_state,
)
from gns_controller.core.policies.base import ProgressAverage, StepTiming
from gns_controller.core.policies.rules.goodput import fitted_cost
from gns_controller.core.policies.rules.progress import elasticity
from gns_controller.core.statistics import SignedAverage
from tests.gns_controller.core.measurements import decisions, measurement, reading, specification

VECTORS = [(3.0, 1.0), (1.0, 3.0), (3.0, 3.0), (1.0, 1.0)]
"""Gradients of four samples: mean (2, 2)."""


def mean_of(vectors: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in vectors) / len(vectors), sum(y for _, y in vectors) / len(vectors)


def of_vectors(vectors: list[tuple[float, float]]) -> GroupReading:
    """What rank_variance reads where each sample is a group of its own."""
    gx, gy = mean_of(vectors)
    free = len(vectors) - 1
    variance = sum((x - gx) ** 2 + (y - gy) ** 2 for x, y in vectors) / free
    products = [x * gx + y * gy for x, y in vectors]
    mean_product = sum(products) / len(products)
    return reading(
        noise_scale=1.0,
        geometry="euclidean",
        noise=math.sqrt(variance),
        signal=math.hypot(gx, gy),
        inner_product_variance=sum((p - mean_product) ** 2 for p in products) / free,
        num_groups=len(vectors),
        samples_per_group=1,
    )


def test_the_norm_test_asks_for_the_variance_over_theta_squared_times_the_squared_norm() -> None:
    # By hand: V = (2 + 2 + 2 + 2) / 3 = 8/3, |g|^2 = 8. theta = 0.1: V / (0.01 * 8) = 33.3, up to 34 on two ranks.
    policy = NormTestPolicyConfig(theta=0.1)
    [decision] = decisions(policy, [measurement(1, of_vectors(VECTORS))])
    assert decision.requested_batch_size == pytest.approx(100 / 3)
    assert (decision.plan.global_batch_size, decision.reason) == (34, "grow")
    # On whole passes of 8: up to 40, never below what is needed.
    [coarse] = decisions(policy, [measurement(1, of_vectors(VECTORS))], micro_batch_size=4, micro_batch_granularity=4)
    assert coarse.plan.global_batch_size == 40
    # theta = 0.5: V / (0.25 * 8) = 1.33 <= 16, the test passes.
    [passed] = decisions(NormTestPolicyConfig(theta=0.5), [measurement(1, of_vectors(VECTORS))])
    assert (passed.plan.global_batch_size, passed.reason) == (16, "hold_below_deadband")
    assert "the test passes" in passed.explanation
    # Exactly reachable stays: 2 / 0.25^2 = 32.
    [exact] = decisions(
        NormTestPolicyConfig(theta=0.25), [measurement(1, reading(noise_scale=2, geometry="euclidean"))]
    )
    assert exact.plan.global_batch_size == 32


def test_the_norm_test_looks_at_each_reading_alone_and_shrinks_only_if_it_may() -> None:
    high, low = reading(noise_scale=10, geometry="euclidean"), reading(noise_scale=1, geometry="euclidean")
    run = [measurement(1, high), measurement(2, low)]
    assert [d.plan.global_batch_size for d in decisions(NormTestPolicyConfig(), run)] == [40, 40]
    free = decisions(NormTestPolicyConfig(monotone=False), run)
    assert [(d.plan.global_batch_size, d.reason) for d in free] == [(40, "grow"), (4, "shrink")]
    [zero] = decisions(NormTestPolicyConfig(), [measurement(1, reading(noise_scale=1, geometry="euclidean", signal=0))])
    assert zero.reason == "hold_unresolved"


@pytest.mark.parametrize(
    ("theta", "nu", "batch_size"),
    [
        # By hand: Var<g_i, g> = (0 + 0 + 16 + 16) / 3 = 32/3, |g|^4 = 64: 1 / (6 theta^2) = 66.7 -> 64 by the cap of 4
        (0.05, 5.84, 64),
        (0.06, 5.84, 48),  # 46.3, in passes of 8
        # V - Var / |g|^2 = 8/3 - 4/3 = 4/3, over 8 nu^2: 1 / (6 nu^2)
        (0.9, 0.06, 48),
        (0.06, 0.07, 48),  # the larger of 46.3 and 34.0
        (0.07, 0.06, 48),
        (0.9, 5.84, 16),  # 0.21 and 0.005: both pass
    ],
)
def test_the_inner_product_test_takes_the_larger_of_its_two_batches(theta: float, nu: float, batch_size: int) -> None:
    policy = InnerProductTestPolicyConfig(theta=theta, nu=nu)
    run = [measurement(1, of_vectors(VECTORS))]
    [decision] = decisions(policy, run, micro_batch_size=4, micro_batch_granularity=4)
    assert decision.plan.global_batch_size == batch_size
    assert decision.requested_batch_size == pytest.approx(max(1 / (6 * theta**2), 1 / (6 * nu**2)))


vectors = st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=3, max_size=8)


@settings(max_examples=60, deadline=None)
@given(found=vectors, theta=st.floats(0.05, 2), nu=st.floats(0.05, 10), scale=st.sampled_from([1.0, 1e-45, 1e40]))
def test_the_inner_product_test_equals_its_definition(
    found: list[tuple[float, float]], theta: float, nu: float, scale: float
) -> None:
    gx, gy = mean_of(found)
    norm_sq = gx * gx + gy * gy
    assume(norm_sq > 1e-6)
    along, across = [], []
    for x, y in found:
        product = x * gx + y * gy
        along.append(product)
        across.append((x - product / norm_sq * gx, y - product / norm_sq * gy))
    mean_along, (cx, cy) = sum(along) / len(along), mean_of(across)
    free = len(found) - 1
    needed_along = sum((p - mean_along) ** 2 for p in along) / free / (theta**2 * norm_sq**2)
    needed_across = sum((x - cx) ** 2 + (y - cy) ** 2 for x, y in across) / free / (nu**2 * norm_sq)
    # Another unit of the loss changes nothing, down to where |g|^4 is no float64 any more.
    scaled = [(x * scale, y * scale) for x, y in found]
    [decision] = decisions(InnerProductTestPolicyConfig(theta=theta, nu=nu), [measurement(1, of_vectors(scaled))])
    if scale != 1e-45:  # there the variance of the products itself is no float64
        assert decision.requested_batch_size == pytest.approx(max(needed_along, needed_across), rel=1e-6, abs=1e-6)


def test_the_inner_product_test_needs_its_own_reading() -> None:
    plain = reading(noise_scale=9, geometry="euclidean")
    assert decisions(InnerProductTestPolicyConfig(), [measurement(1, plain)])[0].reason == "hold_no_reading"
    zero = reading(noise_scale=9, geometry="euclidean", signal=0.0, inner_product_variance=1.0)
    assert decisions(InnerProductTestPolicyConfig(), [measurement(1, zero)])[0].reason == "hold_unresolved"
    endless = reading(noise_scale=9, geometry="euclidean", inner_product_variance=math.inf)
    assert decisions(InnerProductTestPolicyConfig(), [measurement(1, endless)])[0].reason == "hold_unresolved"
    with pytest.raises(ValidationError):
        InnerProductTestPolicyConfig.model_validate({"aggregation": "sum_of_norms"})


# goodput


def goodput(
    *,
    noise_scale: float,
    fixed: float,
    per_sample: float,
    geometry: str = "spectral",
    estimator: Literal["split", "rank_variance"] = "rank_variance",
    timed: tuple[int, ...] = (16, 32),
    config: dict[str, Any] | None = None,
    **rules: Any,
) -> Decision:
    """The decision where steps were timed at these batches."""
    settings = {"min_improvement": 0.0, "growth_cap": None, "monotone": False, "explore_factor": None, **(config or {})}
    policy = GoodputPolicyConfig(estimator=estimator, **settings)
    seen = reading(noise_scale=noise_scale, estimator=estimator, geometry=geometry, ceiling=1e30)
    asked = specification(policy, **rules)
    times = timings({size: fixed + per_sample * size for size in timed})
    state = initial_state(asked.batch, data_parallel_size=2).model_copy(update={"timings": times})
    for step in range(1, 6):  # a split reading is resolved from five on; until then the batch is held by a warmup
        early = policy.model_copy(update={"warmup": Span(steps=6)})
        state, _ = decide(early, state, measurement(step, seen), facts=asked.facts, follow_trainer=False)
    return decide(policy, state, measurement(6, seen), facts=asked.facts, follow_trainer=False)[1]


@settings(max_examples=40, deadline=None)
@given(
    noise_scale=st.floats(1, 3000),
    fixed=st.floats(0.01, 2),
    per_sample=st.floats(1e-4, 1e-2),
    sample_price=st.sampled_from([0.0, 1e-3, 0.1]),
    micro=st.integers(1, 12),
    granularity=st.integers(1, 4),
    geometry=st.sampled_from(["euclidean", "sign", "spectral"]),
    estimator=st.sampled_from(["split", "rank_variance"]),
)
def test_goodput_takes_the_cheapest_of_all_reachable_batches(
    noise_scale: float,
    fixed: float,
    per_sample: float,
    sample_price: float,
    micro: int,
    granularity: int,
    geometry: str,
    estimator: Literal["split", "rank_variance"],
) -> None:
    full, finest = 2 * micro, 2 * min(granularity, micro)
    start = 16 // full * full or 16 // finest * finest
    decision = goodput(
        noise_scale=noise_scale,
        fixed=fixed,
        per_sample=per_sample,
        config={"sample_price_seconds": sample_price},
        geometry=geometry,
        estimator=estimator,
        timed=(start, start + 4 * full),
        global_batch_size=start,
        micro_batch_size=micro,
        micro_batch_granularity=granularity,
    )
    kappa = math.pi / 2 if estimator == "split" and geometry != "euclidean" else 1.0
    reachable = [*range(finest, full, finest), *range(full, 20_000, full)]

    def price(batch: int) -> float:  # steps needed x (seconds of a step + price of its samples)
        return (1 + kappa * noise_scale / batch) * (fixed + (per_sample + sample_price) * batch)

    taken = decision.plan.global_batch_size
    assert taken in reachable
    assert price(taken) <= min(price(batch) for batch in reachable) * (1 + 1e-9)
    optimum = math.sqrt(kappa * noise_scale * fixed / (per_sample + sample_price))
    assert decision.requested_batch_size == pytest.approx(optimum, rel=1e-6)


def test_goodput_by_hand() -> None:
    # noise scale 400, t = 0.4 + 0.001 B seconds: sqrt(400 * 400) = 400.
    at = goodput(noise_scale=400, fixed=0.4, per_sample=0.001, micro_batch_size=1)
    assert at.plan.global_batch_size == 400
    # A sample worth 3 ms: sqrt(400 * 0.4 / 0.004) = 200. Worth 1 s: sqrt(400 * 0.4) = 12.6, and samples are saved.
    priced = {"sample_price_seconds": 0.003}
    assert goodput(noise_scale=400, fixed=0.4, per_sample=0.001, config=priced).plan.global_batch_size == 192
    dear = {"sample_price_seconds": 1.0, "monotone": True}
    assert goodput(noise_scale=400, fixed=0.4, per_sample=0.001, config=dear).reason == "hold_monotone"
    # Stated instead of measured: 100 samples cost as much as the fixed part.
    stated = {"step_overhead_samples": 100.0}
    found = goodput(noise_scale=400, fixed=1, per_sample=1, config=stated, timed=(16,), micro_batch_size=1)
    assert found.plan.global_batch_size == 200


def test_a_saving_below_five_percent_changes_nothing() -> None:
    # phi = overhead = 16: price at 16 is (1 + 1)(32) = 64. At B = 16 k: 16 (1 + 1/k)(1 + k).
    def found(noise_scale: float) -> Decision:
        config = {"min_improvement": 0.05, "step_overhead_samples": 16.0}
        return goodput(noise_scale=noise_scale, fixed=1, per_sample=1, config=config, timed=(16,))

    # phi 36: optimum 24, price (1 + 36/24)(40) = 100 of (1 + 36/16)(32) = 104: 3.8 % saved.
    assert found(36.0).reason == "hold_below_deadband"
    assert "3.8% cheaper, less than 5%" in found(36.0).explanation
    # phi 49: optimum 28, price (1 + 49/28)(44) = 121 of 130: 6.9 % saved.
    assert found(49.0).plan.global_batch_size == 28


def test_an_unresolved_noise_scale_is_not_optimised() -> None:
    saturated = reading(noise_scale=20.0, ceiling=21.0)
    policy = GoodputPolicyConfig(estimator="rank_variance", step_overhead_samples=1000)
    assert decisions(policy, [measurement(1, saturated)])[0].reason == "hold_unresolved"
    assert decisions(policy, [measurement(1)])[0].reason == "hold_no_reading"


def test_goodput_explores_once_and_only_where_the_noise_scale_allows_it() -> None:
    high = reading(noise_scale=100.0)
    policy = GoodputPolicyConfig(estimator="rank_variance")

    def batches(run: list[NoiseScaleMeasurement]) -> list[int]:
        return [d.plan.global_batch_size for d in decisions(policy, run)]

    # Nobody times steps: nothing to explore, however often it is asked.
    assert batches([measurement(k, high) for k in range(1, 9)]) == [16] * 8
    # One growth, then it waits until steps are timed there.
    timed = [measurement(k, high, step_seconds=1.0) for k in range(1, 9)]
    assert batches(timed) == [32] * 8
    assert decisions(policy, timed)[-1].reason == "hold"
    there = [*timed, measurement(9, high, batch=32, samples=400, step_seconds=1.1)]
    # t = 0.9 + B / 160: overhead 144 samples, sqrt(100 * 144) = 120, 96 is nearer than 128 on whole passes of 32
    assert decisions(policy, there, micro_batch_size=16)[-1].requested_batch_size == pytest.approx(120)
    low = [measurement(k, reading(noise_scale=15.9), step_seconds=1.0) for k in range(1, 9)]
    assert batches(low) == [16] * 8
    assert decisions(GoodputPolicyConfig(estimator="rank_variance", explore_factor=None), timed)[-1].reason == "hold"


def test_step_times_of_other_ranks_are_forgotten() -> None:
    run = specification(GoodputPolicyConfig())
    state = initial_state(run.batch, data_parallel_size=2)
    two, four = (measurement(k, batch=16, ranks=ranks, step_seconds=1.0) for k, ranks in ((10, 2), (20, 4)))
    state, _ = decide(run.policy, state, two, facts=run.facts)
    assert [timing.num_reports for timing in state.timings] == [1]
    state, _ = decide(run.policy, state, two.model_copy(update={"optimizer_step": 15}), facts=run.facts)
    assert [timing.num_reports for timing in state.timings] == [2]
    state, _ = decide(run.policy, state, four, facts=run.facts)
    assert [timing.num_reports for timing in state.timings] == [1]


def timings(line: dict[int, float]) -> tuple[StepTiming, ...]:
    return tuple(StepTiming(global_batch_size=b, step_seconds=t, num_reports=1) for b, t in sorted(line.items()))


@settings(max_examples=60, deadline=None)
@given(
    fixed=st.floats(1e-3, 100),
    per_sample=st.floats(1e-5, 10),
    sizes=st.sets(st.integers(1, 10_000), min_size=2, max_size=10),
)
def test_the_fit_of_an_exact_line_is_that_line(fixed: float, per_sample: float, sizes: set[int]) -> None:
    assume(max(sizes) >= 1.1 * min(sizes))
    cost = fitted_cost(timings({size: fixed + per_sample * size for size in sizes}))
    assert cost is not None
    for size in (1, 10_000):  # the line, rather than its parts: one of them may be lost beside the other
        expected = fixed + per_sample * size
        slack = 1e-6 * max(fixed + per_sample * other for other in (size, *sizes))
        assert cost.fixed_seconds + cost.per_sample_seconds * size == pytest.approx(expected, rel=1e-5, abs=slack)


def test_the_fit_of_noisy_times_is_near_and_has_no_negative_part() -> None:
    rng = random.Random(1)
    sizes = (64, 128, 256, 512, 1024, 2048)
    found = []
    for _ in range(200):
        cost = fitted_cost(timings({b: (0.2 + 0.001 * b) * (1 + rng.gauss(0, 0.02)) for b in sizes}))
        assert cost is not None
        found.append(cost)
    # Linear least squares with weights 1 / t^2 and 2 % of noise: standard deviations of 2.3 % and 1.6 %.
    assert sum(c.fixed_seconds for c in found) / 200 == pytest.approx(0.2, rel=0.01)
    assert sum(c.per_sample_seconds for c in found) / 200 == pytest.approx(0.001, rel=0.01)
    assert max(abs(c.fixed_seconds / 0.2 - 1) for c in found) < 0.12
    # Steeper than through the origin: (16 + 32 / 2.5) / (16^2 + (32 / 2.5)^2) a sample. Falling: (1/2 + 1) / (1/4 + 1).
    assert fitted_cost(timings({16: 1.0, 32: 2.5})) == pytest.approx((0.0, 28.8 / 419.84))
    assert fitted_cost(timings({16: 2.0, 32: 1.0})) == pytest.approx((1.2, 0.0))
    assert fitted_cost(timings({16: 2.0})) is None
    assert fitted_cost(()) is None


# progress


def curve(noise_scale: float, *sizes: float) -> tuple[ProgressPoint, ...]:
    """Euclidean, closed form: P(S) = (1 + N / S)^(-1/2)."""
    return tuple(ProgressPoint(samples=s, progress=(1 + noise_scale / s) ** -0.5) for s in sizes)


def progressing(points: Sequence[tuple[ProgressPoint, ...]], **changes: Any) -> list[Decision]:
    run = [
        measurement(k + 1, reading(noise_scale=1, estimator="split", progress_curve=found))
        for k, found in enumerate(points)
    ]
    return decisions(ProgressPolicyConfig(**changes), run)


def test_the_elasticity_of_euclidean_progress_is_a_quarter_where_the_sub_batches_enclose_the_noise_scale() -> None:
    # e(S) = N / (2 (N + S)). Between S and 2 S: log2((1 + N/S) / (1 + N/2S)) / 2 = 1/4 at S = N / sqrt(2).
    def measured(noise_scale: float, low: float, high: float) -> float:
        averages = [
            ProgressAverage(samples=p.samples, progress=SignedAverage(mean=p.progress, count=9, sum_weights_sq=0.1))
            for p in curve(noise_scale, low, high)
        ]
        found = elasticity(*averages)
        assert found is not None
        assert found[1] == 0.0
        return found[0]

    for noise_scale in (1.0, 10.0, 1e4):
        assert measured(noise_scale, noise_scale / math.sqrt(2), noise_scale * math.sqrt(2)) == pytest.approx(0.25)
        for size in (0.01, 1.0, 100.0):  # the derivative, between sub-batches that nearly touch
            share = size / noise_scale
            close = measured(noise_scale, size * (1 - 1e-5), size * (1 + 1e-5))
            assert close == pytest.approx(1 / (2 * (1 + share)), rel=1e-4, abs=1e-6)
    assert measured(1e9, 1, 2) == pytest.approx(0.5, rel=1e-6)
    assert measured(1e-9, 1, 2) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("noise_scale", "grows"), [(5.7, True), (5.6, False)])
def test_a_quarter_and_a_half_of_the_batch_grow_up_to_2_83_noise_scales(noise_scale: float, grows: bool) -> None:
    # B = 16: sub-batches 4 and 8 enclose 4 sqrt(2) = 5.66 = 16 / 2.83.
    found = progressing([curve(noise_scale, 4, 8)] * 5)
    assert [d.reason for d in found[:4]] == ["hold_unresolved"] * 4
    assert found[-1].reason == ("grow" if grows else "hold_below_deadband")
    assert found[-1].plan.global_batch_size == (32 if grows else 16)


def test_progress_that_is_not_resolved_never_grows() -> None:
    # Signs at random: positive now and then, never two standard errors above zero.
    rng = random.Random(4)
    noisy = [
        (ProgressPoint(samples=4, progress=rng.gauss(0.01, 1)), ProgressPoint(samples=8, progress=rng.gauss(0.02, 1)))
        for _ in range(40)
    ]
    assert {d.plan.global_batch_size for d in progressing(noisy)} == {16}
    assert "grow" not in {d.reason for d in progressing(noisy)}
    assert {d.reason for d in progressing([()] * 6)} == {"hold_no_reading"}
    assert {d.reason for d in progressing([curve(100, 8)] * 6)} == {"hold_no_reading"}


def test_a_new_batch_begins_a_new_curve_so_that_growth_waits_for_what_is_seen_there() -> None:
    # Measurements that hold no curve, or the old one, do not grow the batch a second time.
    steady = curve(1e6, 4, 8)
    found = progressing([*[steady] * 5, (), (), *[steady] * 5, ()])
    assert [d.plan.global_batch_size for d in found] == [16] * 4 + [32] * 7 + [64] * 2
    assert [d.reason for d in found[5:7]] == ["hold_no_reading"] * 2


def test_a_curve_begins_anew_where_another_group_is_followed() -> None:
    # "max" goes from a noisy group (e = 1/2, progress 100) to a noiseless one: nothing of the first is left.
    noisy = [ProgressPoint(samples=4, progress=100.0), ProgressPoint(samples=8, progress=141.4)]
    flat = [ProgressPoint(samples=4, progress=1.0), ProgressPoint(samples=8, progress=1.0)]
    other = reading(noise_scale=50, estimator="split", progress_curve=flat, group="other")
    run = [
        measurement(k, reading(noise_scale=100 if k < 4 else 1e-3, estimator="split", progress_curve=noisy), other)
        for k in range(1, 100)
    ]
    policy = ProgressPolicyConfig(aggregation="max", standard_errors=0, noise_beta=0.5)
    assert {d.plan.global_batch_size for d in decisions(policy, run)} == {16}


def test_growing_averages_forget_early_progress() -> None:
    # Flat at first (e = 0), then N = 100 (e = 0.47). With weights 4 / (n + 3) the first five of 60 values keep a share
    # of (5 6 7 8) / (60 61 62 63) = 1e-4; with beta = 0.99 they keep 0.99^55 = 0.58.
    run = [curve(1e-6, 4, 8)] * 5 + [curve(100, 4, 8)] * 55
    growing, exponential = (
        progressing(run, averaging=averaging, signal_beta=0.99) for averaging in ("growing", "exponential")
    )
    assert growing[4].reason == "hold_below_deadband"
    assert "grow" in {decision.reason for decision in growing[5:]}
    assert {decision.plan.global_batch_size for decision in exponential} == {16}


def test_a_curve_of_the_other_kind_of_average_begins_anew() -> None:
    # Stored while curves were exponential beside growing averages of noise and signal.
    rules = BatchRules(global_batch_size=16, micro_batch_size=32)
    state = initial_state(rules, data_parallel_size=2)
    config = ProgressPolicyConfig(averaging="growing")
    found = reading(noise_scale=1, estimator="split", progress_curve=curve(1, 4, 8))
    counts = []
    for step in range(1, 6):
        if step == 4:
            old = tuple(
                average.model_copy(update={"progress": SignedAverage(mean=9.0, count=3)}) for average in state.curve
            )
            state = state.model_copy(update={"curve": old})
        state, _ = decide(config, state, measurement(step, found), facts=RunFacts(rules))
        counts.append([average.progress.count for average in state.curve])
    assert counts == [[1, 1], [2, 2], [3, 3], [1, 1], [2, 2]]


def test_odd_curves_leave_the_policy_standing() -> None:
    inf, nan = math.inf, math.nan
    good = curve(1e6, 4, 8)
    twice = (good[0], good[1], good[1].model_copy(update={"progress": 0.9}))
    endless = (*good, ProgressPoint(samples=inf, progress=1.0))
    broken = (good[0], good[1].model_copy(update={"progress": nan}))
    huge = (good[0], good[1].model_copy(update={"progress": 1e200}))
    for odd in (twice, endless, broken, huge):
        found = progressing([good, odd, good, odd, good, good, odd, good])
        assert found[-1].plan.global_batch_size in (16, 32)
    assert progressing([endless] * 5)[-1].plan.global_batch_size == 32  # the endless point is left out
    # One reading that is no number does not begin the averages anew.
    assert progressing([good, good, broken, good, good, good])[-1].reason == "grow"


def test_several_groups_add_their_progress() -> None:
    # 1 x 1e6-noise group (e = 1/2) and a noiseless one (e = 0) of progress 3 each: between.
    noisy = reading(noise_scale=1, estimator="split", progress_curve=curve(1e6, 4, 8))
    flat = reading(
        noise_scale=1,
        estimator="split",
        group="rest",
        progress_curve=(ProgressPoint(samples=4, progress=0.002), ProgressPoint(samples=8, progress=0.002)),
    )
    run = [measurement(k, noisy, flat) for k in range(1, 6)]
    matrices = decisions(ProgressPolicyConfig(), run)[-1]
    together = decisions(ProgressPolicyConfig(aggregation="sum_of_norms", least_elasticity=0.3), run)[-1]
    assert matrices.reason == "grow"
    low, high = (0.002 + (1 + 1e6 / size) ** -0.5 for size in (4, 8))
    assert f"elasticity of progress {math.log2(high / low):.2f}" in together.explanation
    assert together.reason == "hold_below_deadband"


# noise_scale


def test_the_lower_bound_waits_for_an_interval_and_asks_for_less() -> None:
    values = [38.0, 42.0, 40.0, 39.0, 41.0, 40.0, 40.0]
    run = [measurement(k + 1, reading(noise_scale=value)) for k, value in enumerate(values)]
    policy = NoiseScalePolicyConfig(estimator="rank_variance", bound="low", noise_tolerance=1.0, growth_cap=None)
    found = decisions(policy, run)
    assert [d.reason for d in found[:4]] == ["hold_unresolved"] * 4
    assert "no lower end before 5 measurements" in found[0].explanation
    for decision in found[4:]:
        assert decision.requested_batch_size == decision.noise_scale_low
        assert decision.noise_scale is not None
        assert decision.noise_scale_low is not None
        assert decision.noise_scale_low < decision.noise_scale
    plain = decisions(policy.model_copy(update={"bound": "estimate"}), run)
    assert found[4].plan.global_batch_size <= plain[4].plan.global_batch_size
    # By hand, beta 0.9 started by the first value: the averages' own numbers.
    mean, spread, weights = values[0], 0.0, 1.0
    for value in values[1:5]:
        spread = 0.9 * (spread + 0.1 * (value - mean) ** 2)
        weights = 0.81 * weights + 0.01
        mean += 0.1 * (value - mean)
    error = 2 * math.sqrt(spread * weights / (1 - weights))
    assert found[4].noise_scale_low == pytest.approx(mean - error)  # the signal is 1 each time, without spread


def test_the_report_of_the_very_step_where_a_plan_begins_does_not_undo_it() -> None:
    # Decided at step 100, in force for the steps after 101: the report at 101 tells of a step at the old batch.
    rules = BatchRules(global_batch_size=16, micro_batch_size=32)
    policy = NoiseScalePolicyConfig.published(noise_tolerance=0.5, noise_beta=0.0, signal_beta=0.0)
    state = initial_state(rules, data_parallel_size=2)
    facts = RunFacts(rules)
    state, decision = decide(policy, state, measurement(100, reading(noise_scale=16.0)), facts=facts)
    assert (decision.plan.global_batch_size, decision.plan.effective_step) == (64, 101)
    state, decision = decide(policy, state, measurement(101), facts=facts)
    assert decision.plan.global_batch_size == 64
    state, decision = decide(policy, state, measurement(102), facts=facts)
    assert decision.plan.global_batch_size == 16  # by now the trainer is believed

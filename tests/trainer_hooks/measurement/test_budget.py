"""The ledger of measuring: arithmetic on seconds, against sums done by hand and against a simulated run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_hooks.measurement.budget import (
    SMALLEST_LAYER_SHARE,
    MeasurementCost,
    MeasurementLedger,
    affordable_layer_share,
    best_num_patterns,
)


def test_the_next_measurement_waits_until_the_budget_covers_both() -> None:
    ledger = MeasurementLedger(0.01)
    # 2 s spent after 12 s; another 2 s: 4 s are 1 % of 400 s, of which 12 + 2 have passed or will: 386 steps of 1 s.
    steps = ledger.settle(MeasurementCost(extra_seconds=2.0, norm_seconds=1.0, step_seconds=1.0, elapsed_seconds=12.0))
    assert steps == 386
    assert ledger.share == pytest.approx(2 / 12)


@settings(max_examples=50, deadline=None)
@given(
    budget=st.floats(0.002, 0.2),
    step_seconds=st.floats(0.01, 10.0),
    costs=st.lists(st.floats(0.001, 5.0), min_size=3, max_size=40),
)
def test_a_steady_run_never_spends_more_than_its_budget(budget: float, step_seconds: float, costs: list[float]) -> None:
    ledger = MeasurementLedger(budget)
    cost = max(costs) * step_seconds  # as dear as any: a cost that jumps is caught up with later, not foreseen
    elapsed, spent, wait = 10 * step_seconds, 0.0, 0
    for _ in costs:
        elapsed += wait * step_seconds + cost
        spent += cost
        wait = ledger.settle(MeasurementCost(cost, 0.5 * cost, step_seconds, elapsed - ledger.elapsed_seconds))
        assert ledger.spent_seconds == pytest.approx(spent)
        # Just before the next measurement is done, the budget holds with it included.
        assert spent + cost <= budget * (elapsed + wait * step_seconds + cost) * (1 + 1e-9)


def test_a_dear_measurement_is_remembered_for_three() -> None:
    ledger = MeasurementLedger(0.5)
    costs = (40.0, 1.0, 1.0, 1.0)
    waits = [ledger.settle(MeasurementCost(cost, 0.0, 1.0, 100.0)) for cost in costs]
    # At one half, a measurement of c seconds needs c seconds of other work: 40 for three times, then 1.
    assert waits == [40, 40, 40, 1]


def test_the_first_measurement_is_not_judged_by_and_then_the_cheapest_of_three_is() -> None:
    ledger = MeasurementLedger(0.5)
    first, slow, quick = (MeasurementCost(seconds, 0.1, 1.0, 100.0) for seconds in (9.0, 5.0, 2.0))
    ledger.settle(first)
    assert ledger.typical is None
    ledger.settle(slow)
    assert ledger.typical == slow
    ledger.settle(quick)
    assert ledger.typical == quick


def test_the_ledger_goes_on_after_a_checkpoint() -> None:
    ledger, resumed = MeasurementLedger(0.01), MeasurementLedger(0.01)
    first = MeasurementCost(1.0, 0.5, 1.0, 50.0)
    ledger.settle(first)
    resumed.load_state_dict(ledger.state_dict())
    assert resumed.settle(first) == ledger.settle(first)


@pytest.mark.parametrize("rest", [0.1, 1.0, 4.0, 9.0, 30.0])
def test_the_number_of_patterns_is_the_cheapest_way_to_a_small_error(rest: float) -> None:
    per_pattern = 1.0
    cost = MeasurementCost(rest + 3 * per_pattern, 3 * per_pattern, 1.0, 1.0, num_patterns=3)
    chosen = best_num_patterns(cost, available=20)

    def price(number: int) -> float:
        return (1 + 1 / number) * (rest + number * per_pattern)

    best = min(range(1, 21), key=price)
    assert price(chosen) <= 1.02 * price(best)
    assert best_num_patterns(cost, available=1) == 1


def test_layers_are_left_out_only_as_far_as_the_longest_interval_needs() -> None:
    step = 1.0  # budget 1 % of 200 steps of 1 s: 2 s per measurement
    cheap = MeasurementCost(extra_seconds=1.5, norm_seconds=1.0, step_seconds=step, elapsed_seconds=1.0)
    assert affordable_layer_share(cheap, budget=0.01, present_share=1.0) == 1.0
    dear = MeasurementCost(extra_seconds=6.5, norm_seconds=6.0, step_seconds=step, elapsed_seconds=1.0)
    assert affordable_layer_share(dear, budget=0.01, present_share=1.0) == 0.25  # 0.5 + 6/4 = 2
    not_the_norms = MeasurementCost(extra_seconds=3.0, norm_seconds=0.01, step_seconds=step, elapsed_seconds=1.0)
    assert affordable_layer_share(not_the_norms, budget=0.01, present_share=1.0) == 1.0
    hopeless = MeasurementCost(extra_seconds=1e3, norm_seconds=1e3, step_seconds=step, elapsed_seconds=1.0)
    assert affordable_layer_share(hopeless, budget=0.01, present_share=1.0) == SMALLEST_LAYER_SHARE
    assert affordable_layer_share(cheap, budget=0.01, present_share=0.25) == 0.25  # never grows


def test_a_step_that_takes_no_time_does_not_divide_by_it() -> None:
    assert MeasurementLedger(0.01).settle(MeasurementCost(0.0, 0.0, 0.0, 0.0)) == 1
    assert math.isfinite(MeasurementLedger(0.01).share)

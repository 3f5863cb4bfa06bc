"""What the ramp so far was worth, in steps and in seconds, against sums by hand."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.policies import (
    GoodputPolicyConfig,
    HoldPolicyConfig,
    PolicyState,
    RunFacts,
    decide,
    initial_state,
)
from gns_controller.core.projection import savings
from tests.gns_controller.core.measurements import measurement

FACTS = RunFacts(BatchRules(global_batch_size=16, micro_batch_size=64), 10**6)
POLICY = HoldPolicyConfig()


def after(reports: Iterable[NoiseScaleMeasurement], *, follow_trainer: bool = True) -> PolicyState:
    state = initial_state(FACTS.rules, data_parallel_size=2)
    for report in reports:
        state, _ = decide(POLICY, state, report, facts=FACTS, follow_trainer=follow_trainer)
    return state


def timed(step: int, seconds: float | None, **changes: Any) -> NoiseScaleMeasurement:
    return measurement(step, step_seconds=seconds, **changes)


def test_steps_saved_are_those_of_the_first_batch_less_those_taken() -> None:
    # 100 steps of 16, 50 of 64: 1600 + 3200 samples. Constantly: 300 steps.
    state = initial_state(FACTS.rules, data_parallel_size=2)
    found = savings(state, measurement(150, samples=4800), facts=FACTS)
    assert (found.constant_batch_size, found.constant_steps, found.steps_saved) == (16, 300, 150)
    assert (found.steps_saved_share, found.seconds_saved) == (0.5, None)
    smaller = savings(state, measurement(600, samples=4800), facts=FACTS)
    assert (smaller.steps_saved, smaller.steps_saved_share) == (-300, -1.0)


@pytest.mark.parametrize("follow_trainer", [True, False])
@pytest.mark.parametrize("times", [[2.0] * 10 + [1.0] * 40, [0.1, 0.3, 0.2, 1e-3, 7.7], [None, 3.0, None, 1.0]])
def test_a_run_that_keeps_its_first_batch_saves_no_time_however_its_steps_go(
    times: list[float | None], follow_trainer: bool
) -> None:
    reports = [timed(20 * (k + 1), seconds) for k, seconds in enumerate(times)]
    assert after(reports, follow_trainer=follow_trainer).seconds_saved == 0.0
    # Nor does a restart on one rank save anything, where steps take another time.
    again = [timed(20 * (len(times) + k), 4.0 + k, ranks=1) for k in range(1, 4)]
    last = again[-1]
    state = after([*reports, *again], follow_trainer=follow_trainer)
    assert savings(state, last, facts=FACTS).seconds_saved == 0.0


def test_seconds_saved_by_hand() -> None:
    # 100 steps of 16 at 1 s, then 50 of 64 at 2.5 s and 10 at 6 s: 50 (4 * 1 - 2.5) + 10 (4 - 6).
    reports = [
        timed(100, 1.0),
        timed(150, 2.5, batch=64, samples=4800),
        timed(160, 6.0, batch=64, samples=5440),
        timed(170, None, batch=64, samples=6080),  # how long those took is not known
    ]
    assert after(reports).seconds_saved == 50 * 1.5 - 10 * 2
    # Smaller than at the start: 10 steps of 8 at 0.8 s do the work of 5 s in 8.
    assert after([timed(100, 1.0), timed(110, 0.8, batch=8, samples=1680)]).seconds_saved == pytest.approx(5 - 8)


def test_time_is_not_known_before_the_first_batch_was_timed() -> None:
    reports = [measurement(100), timed(150, 2.0, batch=64, samples=4800)]
    assert after(reports).seconds_saved is None
    # Back at 16 a step takes 1 s: from there on it is known, and what went before is left out.
    reports += [timed(200, 1.0, samples=5600), timed(210, 2.0, batch=64, samples=6240)]
    assert [after(reports[:n]).seconds_saved for n in (3, 4)] == [0.0, 10 * (4 * 1 - 2)]


@pytest.mark.parametrize("follow_trainer", [True, False])
def test_on_other_ranks_time_is_counted_once_the_first_batch_was_timed_there(follow_trainer: bool) -> None:
    reports = [
        timed(100, 1.0),
        timed(150, 2.0, batch=64, samples=4800),  # + 50 (4 * 1 - 2)
        timed(200, 1.0, batch=64, samples=8000, ranks=4),  # 16 on four ranks: nobody knows
        timed(250, 0.4, samples=8800, ranks=4),
        timed(300, 1.0, batch=64, samples=12_000, ranks=4),  # + 50 (4 * 0.4 - 1)
    ]
    found = [after(reports[:n], follow_trainer=follow_trainer).seconds_saved for n in (2, 3, 4, 5)]
    assert found == pytest.approx([100, 100, 100, 130])


def test_step_times_of_other_ranks_are_forgotten_in_shadow_mode_too() -> None:
    """Also by a what-if, and by a state that was stored before states knew their ranks."""
    policy = GoodputPolicyConfig()
    state = initial_state(FACTS.rules, data_parallel_size=2)
    for step in range(10, 60, 10):
        state, _ = decide(policy, state, timed(step, 1.0), facts=FACTS, follow_trainer=False)
    assert [(timing.step_seconds, timing.num_reports) for timing in state.timings] == [(1.0, 5)]
    older = state.model_copy(update={"data_parallel_size": None})
    for before in (state, older):
        on_four = before
        for count in (1, 2):
            on_four, _ = decide(policy, on_four, timed(60 + count, 0.25, ranks=4), facts=FACTS, follow_trainer=False)
            assert [(timing.step_seconds, timing.num_reports) for timing in on_four.timings] == [(0.25, count)]


def test_a_state_with_the_times_that_were_kept_before_still_loads() -> None:
    document = after([timed(20, 1.0)]).model_dump(mode="json")
    for gone in ("seconds_saved", "data_parallel_size"):
        del document[gone]
    before = PolicyState.model_validate({**document, "timed_steps": 20, "timed_seconds": 20.0})
    assert (before.seconds_saved, before.data_parallel_size) == (None, None)
    assert before.timings == after([timed(20, 1.0)]).timings
    state, _ = decide(POLICY, before, timed(30, 2.0, batch=64, samples=960), facts=FACTS)
    assert state.seconds_saved == 10 * (4 * 1.0 - 2.0)
    # What is written from now on is read as it is, and unknown fields are refused as ever.
    assert PolicyState.model_validate_json(state.model_dump_json()) == state
    with pytest.raises(ValueError, match="timed_minutes"):
        PolicyState.model_validate({**document, "timed_minutes": 1})


def test_savings_never_jump_while_the_batch_stays_the_first() -> None:
    reports = [timed(10 * k, 1.0 + (k % 3)) for k in range(1, 20)]
    values = [after(reports[:n]).seconds_saved for n in range(1, 20)]
    assert all(one == other == 0.0 for one, other in pairwise(values))

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns_controller.core.batch_arithmetic import BatchGrid
from gns_controller.core.coupling import learning_rate_factor
from gns_controller.core.errors import BatchShapeError

ARITHMETIC = {
    "micro_batch_size": st.integers(1, 64),
    "data_parallel_size": st.integers(1, 64),
    "micro_batch_granularity": st.integers(1, 8),
}


def test_the_ladder_of_the_recorded_runs_is_reachable() -> None:
    # 8 ranks, 16 sequences each, cut in fours below one full pass: 64, 96, 128, 256, 384 (published runs at 160M).
    grid = BatchGrid(micro_batch_size=16, data_parallel_size=8, micro_batch_granularity=4)
    rungs, batch = [64], 64
    while batch < 384:
        batch = grid.next(batch)
        rungs.append(batch)
    assert rungs == [64, 96, 128, 256, 384]


def test_an_unreachable_batch_names_its_neighbours() -> None:
    with pytest.raises(BatchShapeError, match=r"8 \* 8 = 64. Nearest reachable: 960 or 1024"):
        BatchGrid(micro_batch_size=8, data_parallel_size=8).factor(1000)
    with pytest.raises(BatchShapeError, match=r"4 \* 8 = 32. Nearest reachable: 64 or 96"):
        BatchGrid(micro_batch_size=16, data_parallel_size=8, micro_batch_granularity=4).factor(65)
    with pytest.raises(BatchShapeError, match=r"Nearest reachable: 8\."):
        BatchGrid(micro_batch_size=16, data_parallel_size=8).factor(3)


@given(batch=st.integers(1, 100_000), **ARITHMETIC)
def test_a_floored_batch_is_reachable_and_the_next_one_is_above(
    batch: int, micro_batch_size: int, data_parallel_size: int, micro_batch_granularity: int
) -> None:
    grid = BatchGrid(
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        micro_batch_granularity=micro_batch_granularity,
    )
    floor = grid.floor(batch)
    made = grid.factor(floor)
    assert made.micro_batch_size * made.gradient_accumulation_steps * data_parallel_size == floor
    assert made.micro_batch_size <= micro_batch_size
    above = grid.next(floor)
    assert above > batch or floor > batch
    grid.factor(above)


@pytest.mark.parametrize(("coupling", "expected"), [("sqrt", 2.0), ("linear", 4.0), ("none", 1.0)])
def test_a_batch_four_times_as_large_scales_the_learning_rate_as_named(coupling: str, expected: float) -> None:
    factor = learning_rate_factor(coupling, global_batch_size=64, initial_batch_size=16)  # type: ignore[arg-type]
    assert math.isclose(factor, expected)

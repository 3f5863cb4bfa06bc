"""Sign patterns against the Hadamard matrix of Sylvester's construction, and what makes them useful."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns_controller.core.errors import InvalidInputError, TooFewGroupsError
from trainer_hooks.estimators import SignPattern, choose_patterns


def signs(pattern: SignPattern, num_ranks: int, num_micro_batches: int) -> list[int]:
    groups = product(range(num_ranks), range(num_micro_batches))
    return [pattern.sign(rank=rank, micro_batch=micro) for rank, micro in groups]


def matrix(num_patterns: int, num_ranks: int, num_micro_batches: int) -> np.ndarray:
    chosen = choose_patterns(num_patterns, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    return np.array([signs(pattern, num_ranks, num_micro_batches) for pattern in chosen])


@pytest.mark.parametrize("layout", [(1, 8), (8, 1), (2, 4), (4, 4), (8, 8)])
def test_all_patterns_of_powers_of_two_are_the_rows_of_a_hadamard_matrix(layout: tuple[int, int]) -> None:
    num_groups = layout[0] * layout[1]
    sylvester: np.ndarray = np.ones((1, 1))
    while len(sylvester) < num_groups:
        sylvester = np.kron(sylvester, [[1, 1], [1, -1]])
    found = matrix(1000, *layout)
    assert {tuple(row) for row in found} == {tuple(row) for row in sylvester[1:]}
    assert np.array_equal(found @ found.T, num_groups * np.eye(num_groups - 1))
    assert not found.sum(axis=1).any()


@pytest.mark.parametrize("count", [1, 3, 7, 15])
def test_one_three_and_seven_patterns_are_closed_and_cut_the_samples_into_equal_cells(count: int) -> None:
    found = matrix(count, 8, 8)
    rows = {tuple(row) for row in found} | {(1,) * 64}
    assert {tuple(a * b for a, b in zip(left, right, strict=True)) for left in rows for right in rows} == rows
    cells = [tuple(column) for column in found.T]
    assert sorted(cells.count(cell) for cell in set(cells)) == [64 // (count + 1)] * (count + 1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_micro_batches", [2, 3, 8])
def test_the_first_pattern_alternates_in_time_and_is_the_same_without_ranks(
    num_ranks: int, num_micro_batches: int
) -> None:
    for over_ranks in (True, False):
        first, *_ = choose_patterns(1, num_ranks=num_ranks, num_micro_batches=num_micro_batches, over_ranks=over_ranks)
        assert first == (0, 1)
        assert [first.sign(rank=0, micro_batch=micro) for micro in range(3)] == [1, -1, 1]


def test_generators_alternate_between_ranks_and_time() -> None:
    chosen = choose_patterns(15, num_ranks=4, num_micro_batches=4)
    assert [chosen[index] for index in (0, 1, 3, 7)] == [(0, 1), (1, 0), (0, 2), (2, 0)]
    assert choose_patterns(7, num_ranks=2, num_micro_batches=4)[3] == (0, 2)


def test_one_micro_batch_splits_over_ranks_only() -> None:
    assert choose_patterns(3, num_ranks=4, num_micro_batches=1) == ((1, 0), (2, 0), (3, 0))


def test_without_ranks_every_pattern_is_in_time() -> None:
    chosen = choose_patterns(100, num_ranks=8, num_micro_batches=4, over_ranks=False)
    assert chosen == ((0, 1), (0, 2), (0, 3))


def test_three_ranks_have_three_patterns_of_two_against_one() -> None:
    assert np.array_equal(matrix(9, 3, 1), [[1, -1, 1], [1, 1, -1], [1, -1, -1]])


def test_three_ranks_and_two_micro_batches_take_the_balanced_product_first() -> None:
    chosen = choose_patterns(9, num_ranks=3, num_micro_batches=2)
    assert chosen[:3] == ((0, 1), (1, 1), (1, 0))
    assert [abs(sum(signs(pattern, 3, 2))) for pattern in chosen[:3]] == [0, 0, 2]


def test_one_rank_with_two_micro_batches_has_one_pattern() -> None:
    assert choose_patterns(7, num_ranks=1, num_micro_batches=2) == ((0, 1),)


def test_one_group_is_refused_with_a_sentence() -> None:
    with pytest.raises(TooFewGroupsError, match="no two sample groups to compare over ranks and micro-batches"):
        choose_patterns(1, num_ranks=1, num_micro_batches=1)
    with pytest.raises(TooFewGroupsError, match="in time: num_ranks=8, num_micro_batches=1"):
        choose_patterns(1, num_ranks=8, num_micro_batches=1, over_ranks=False)
    with pytest.raises(InvalidInputError, match="num_patterns=0 must be at least 1"):
        choose_patterns(0, num_ranks=8, num_micro_batches=1)


@given(
    num_patterns=st.integers(1, 40),
    num_ranks=st.integers(1, 9),
    num_micro_batches=st.integers(1, 9),
    over_ranks=st.booleans(),
)
def test_patterns_differ_and_leave_no_half_empty(
    num_patterns: int, num_ranks: int, num_micro_batches: int, over_ranks: bool
) -> None:
    if num_micro_batches == 1 and (num_ranks == 1 or not over_ranks):
        return
    chosen = choose_patterns(
        num_patterns, num_ranks=num_ranks, num_micro_batches=num_micro_batches, over_ranks=over_ranks
    )
    rows = [tuple(signs(pattern, num_ranks, num_micro_batches)) for pattern in chosen]
    # A pattern and its negative are the same two halves.
    assert len({max(row, tuple(-sign for sign in row)) for row in rows}) == len(rows)
    assert all(set(row) == {1, -1} for row in rows)
    available = 2 ** ((num_micro_batches - 1).bit_length() + (num_ranks - 1).bit_length() * over_ranks) - 1
    assert len(rows) == min(num_patterns, available)

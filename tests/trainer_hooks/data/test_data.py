from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.data import SampleStream, cut_micro_batches, warmup_cosine


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20), seed=st.integers(0, 5))
def test_the_order_of_samples_does_not_depend_on_the_batch_sizes(cuts: list[int], seed: int) -> None:
    total = sum(cuts)
    whole = SampleStream(23, seed=seed).positions(0, total)
    stream, position, pieces = SampleStream(23, seed=seed), 0, []
    for count in cuts:
        pieces.append(stream.positions(position, count))
        position += count
    assert torch.equal(torch.cat(pieces), whole)
    for epoch in range(total // 23):
        assert sorted(whole[23 * epoch : 23 * (epoch + 1)].tolist()) == list(range(23))


def test_going_back_gives_the_same_samples_again() -> None:
    stream = SampleStream(10, seed=1)
    first = stream.positions(0, 25)
    assert torch.equal(stream.positions(3, 5), first[3:8])


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="empty"):
        SampleStream(0)


@given(samples=st.integers(1, 500), micro=st.integers(1, 64), pieces=st.integers(1, 16))
def test_pieces_fit_and_cover_the_share(samples: int, micro: int, pieces: int) -> None:
    cut = cut_micro_batches(samples, micro_batch_size=micro, min_pieces=pieces)
    assert sum(cut) == samples
    assert max(cut) <= micro or len(cut) >= pieces
    assert max(cut) <= micro
    assert max(cut) - min(cut) <= 1
    assert min(cut) >= 1
    assert len(cut) >= min(pieces, samples)


def test_the_schedule_is_linear_then_half_a_cosine_over_samples() -> None:
    factor = warmup_cosine(budget_samples=1000, warmup_samples=100, final_factor=0.1)
    assert factor(49) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(1.0)
    assert factor(550) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factor(1000) == factor(2000) == pytest.approx(0.1)

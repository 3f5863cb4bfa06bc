"""Sign patterns over sample groups: which groups form half A (+1) and which half B (-1).

A group is micro-batch a of rank r. A Walsh pattern (i, j) gives it the sign (-1)^(popcount(i & r) + popcount(j & a)).
For powers of two any two patterns are orthogonal and balanced, so P patterns of one step cost P signed reductions and
give P independent differences. Integers only: the hooks ask for signs before there is any gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from gns_controller.core.errors import InvalidInputError, TooFewGroupsError


class SignPattern(NamedTuple):
    """Which bits of a group's numbers flip its sign."""

    rank_mask: int
    micro_batch_mask: int

    def sign(self, *, rank: int, micro_batch: int) -> Literal[1, -1]:
        """+1 (half A) or -1 (half B) of micro-batch `micro_batch` of rank `rank`, both counted from 0."""
        flips = (self.rank_mask & rank).bit_count() + (self.micro_batch_mask & micro_batch).bit_count()
        return -1 if flips % 2 else 1


def choose_patterns(
    num_patterns: int, *, num_ranks: int, num_micro_batches: int, over_ranks: bool = True
) -> tuple[SignPattern, ...]:
    """The first `num_patterns` patterns over these groups, or all there are if they are fewer.

    Generators are single bits: of the micro-batch first, so that the first pattern splits in time and is the same
    where ranks cannot be told apart; then ranks and micro-batches in turn. Each generator is followed by its products
    with all patterns before it, so that 1, 3 and 7 patterns are closed: halves, quarters, eighths of the samples.
    Where counts are no powers of two some patterns are unbalanced; the most balanced product of a generator comes
    first.

    Args:
        num_patterns: at least 1.
        num_ranks: R, data-parallel ranks.
        num_micro_batches: A, backward passes of each rank in this optimizer step.
        over_ranks: False leaves only patterns in time, as under FSDP2, which averages over ranks on its own.

    Returns:
        Distinct patterns whose two halves both have groups: 2^(ceil(log2 R) + ceil(log2 A)) - 1 exist.

    Raises:
        TooFewGroupsError: one group cannot be split.
        InvalidInputError: a count below 1.
    """
    counts = {"num_patterns": num_patterns, "num_ranks": num_ranks, "num_micro_batches": num_micro_batches}
    for name, count in counts.items():
        if count < 1:
            raise InvalidInputError(f"{name}={count} must be at least 1.")
    chosen: list[SignPattern] = []
    for generator in _generators(num_ranks if over_ranks else 1, num_micro_batches):
        if len(chosen) >= num_patterns:
            break
        products = [SignPattern(generator[0] ^ rank, generator[1] ^ micro) for rank, micro in [(0, 0), *chosen]]
        chosen += sorted(products, key=lambda pattern: _imbalance(pattern, num_ranks, num_micro_batches))
    if not chosen:
        how = "over ranks and micro-batches" if over_ranks else "in time"
        raise TooFewGroupsError(
            f"no two sample groups to compare {how}: {num_ranks=}, {num_micro_batches=}. "
            "Use two micro-batches or more on measured steps."
        )
    return tuple(chosen[:num_patterns])


def _generators(num_ranks: int, num_micro_batches: int) -> Iterator[SignPattern]:
    """Single bits, one of the micro-batch and one of the rank in turn, then what is left of either."""
    micro_bits, rank_bits = (num_micro_batches - 1).bit_length(), (num_ranks - 1).bit_length()
    for bit in range(max(micro_bits, rank_bits)):
        if bit < micro_bits:
            yield SignPattern(0, 1 << bit)
        if bit < rank_bits:
            yield SignPattern(1 << bit, 0)


def _imbalance(pattern: SignPattern, num_ranks: int, num_micro_batches: int) -> int:
    """|groups in A - groups in B|: the sum over ranks times the sum over micro-batches."""
    over_ranks = sum(pattern.sign(rank=rank, micro_batch=0) for rank in range(num_ranks))
    over_time = sum(pattern.sign(rank=0, micro_batch=micro) for micro in range(num_micro_batches))
    return abs(over_ranks * over_time)

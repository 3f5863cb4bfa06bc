"""Cutting one rank's share of a step into backward passes."""

from __future__ import annotations


def cut_micro_batches(num_samples: int, *, micro_batch_size: int, min_pieces: int = 1) -> list[int]:
    """Return sizes of pieces: as few as fit micro_batch_size, at least min_pieces, none empty, all within one.

    A measured step needs sample groups to compare, so its share may be cut finer than memory asks for.
    """
    pieces = min(max(-(-num_samples // micro_batch_size), min_pieces), num_samples)
    small, larger = divmod(num_samples, pieces)
    return [small + 1] * larger + [small] * (pieces - larger)

"""Clipping on every mesh, failures of one rank, and what the self-test leaves behind, on two gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.layout_worker import CHECKS
from tests.torchrun import torchrun


@pytest.mark.distributed
@pytest.mark.slow
def test_layouts_clip_alike_and_neither_failures_nor_the_self_test_leave_anything_behind() -> None:
    result = torchrun(Path(__file__).with_name("layout_worker.py"), num_ranks=2, timeout_seconds=120)
    passed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("PASSED")]
    assert passed == [check.__name__ for check in CHECKS]

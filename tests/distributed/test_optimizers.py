"""Every optimizer steps a model the same way on one process, DDP, FSDP2 and HSDP, and resumes on other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.optimizer_worker import ELEMENTWISE_OPTIMIZERS, MATRIX_OPTIMIZERS, OUTER_OPTIMIZERS, STATEFUL
from tests.torchrun import torchrun

WORKER = Path(__file__).with_name("optimizer_worker.py")


def passed(*arguments: str, num_ranks: int, worker: Path = WORKER) -> set[str]:
    result = torchrun(worker, *arguments, num_ranks=num_ranks, timeout_seconds=280)
    return {line.removeprefix("PASSED ") for line in result.stdout.splitlines() if line.startswith("PASSED ")}


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_steps_as_one_process_does_and_nobody_is_left_waiting(num_ranks: int) -> None:
    layouts = ["DDP", "FSDP2"] + (["HSDP"] if num_ranks == 4 else [])
    names = [*MATRIX_OPTIMIZERS, *ELEMENTWISE_OPTIMIZERS, *OUTER_OPTIMIZERS]
    expected = {f"{name}: {layout}" for name in names for layout in layouts}
    expected |= {f"{what}: {layout}" for what in ("failure", "missing gradients") for layout in ("DDP", "FSDP2")}
    expected |= {f"later groups: {name}" for name in ("Shampoo", "EShampoo", "SOAP")}
    assert passed("compare", num_ranks=num_ranks) == expected


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_matrices_that_are_empty_at_rest_or_missing_stop_nobody_alone(num_ranks: int) -> None:
    expected = {f"empty matrices: {name}" for name in ("Muon", "SinkGD", "Shampoo", "SOAP")}
    expected |= {f"resting matrices: {name}" for name in ("Shampoo", "EShampoo", "SOAP", "ASGO")}
    expected |= {f"full state refused: {layout}" for layout in ("DDP", "FSDP2")}
    assert passed(num_ranks=num_ranks, worker=WORKER.with_name("owner_worker.py")) == expected


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 4)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    assert len(passed("save", str(tmp_path), num_ranks=before)) == 2 * len(STATEFUL)
    resumed = {f"resumed {name}, {how}" for name in STATEFUL for how in ("DDP", "FSDP2", "consolidated")}
    expected = resumed | ({"a share is refused"} if before > 1 else set())
    assert passed("resume", str(tmp_path), str(before), num_ranks=after) == expected

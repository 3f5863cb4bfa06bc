"""Attach tells a wrong divide factor, a gradient that stays local, a deaf hook and doubled data by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.torchrun import torchrun

EXPECTED = {
    "ddp": "attached",
    "fsdp2": "attached",
    "ddp-same-samples": "attached",
    "fsdp2-same-samples": "attached",
    "ddp-summed": "gradients are summed over 2 ranks instead of averaged (divide factor 1 instead of 2) for",
    "ddp-local": "gradients stay local to each rank instead of being averaged for",
    "ddp-ignored-parameter": "gradients stay local to each rank instead of being averaged for second.weight",
    "ddp-missing-hook": "the measuring hook misses gradients of second.weight",
    "fsdp2-divide-factor": "divide factor 1 instead of 2) for first.weight, first.bias",
}


@pytest.mark.distributed
@pytest.mark.slow
def test_what_measuring_relies_on_is_tested_at_attach_and_faults_are_told_by_name() -> None:
    result = torchrun(
        Path(__file__).with_name("gradient_check_worker.py"), num_ranks=2, environment={"CASES": ",".join(EXPECTED)}
    )
    lines = [json.loads(line[5:]) for line in result.stdout.splitlines() if line.startswith("CASE ")]
    assert {(line["case"], line["rank"]) for line in lines} == {(case, rank) for case in EXPECTED for rank in (0, 1)}
    for line in lines:
        expected = EXPECTED[line["case"]]
        assert expected in line["outcome"], line
        if expected != "attached":
            assert line["outcome"].startswith("SelfTestError: self-test of gradients failed on rank"), line
        assert (line["unchanged"], line["clean"]) == (True, True), line
        if expected == "attached":
            assert line["readings"] == (0 if "same-samples" in line["case"] else 1), line
    told = [line for line in result.stderr.splitlines() if "see the same samples" in line]
    assert len(told) == 2
    assert all("ranks=0=1" in line for line in told)

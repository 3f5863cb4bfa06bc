"""What the hooks measure under DDP is what the eager reference says about the gathered gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import torchrun

CASES: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon", "batch": 16, "micro": 8},
    "signum": {"optimizer": "signum", "batch": 16, "micro": 8},
    "sgd": {"optimizer": "sgd", "batch": 16, "micro": 8},
    "muon-accumulated": {"optimizer": "muon", "batch": 48, "micro": 4},
    "sgd-accumulated": {"optimizer": "sgd", "batch": 48, "micro": 4},
    "signum-uneven-pieces": {"optimizer": "signum", "batch": 20, "micro": 20, "min_groups": 12},
    "muon-tied": {"optimizer": "muon", "batch": 16, "micro": 4, "tied": True},
    "muon-unused-branch": {"optimizer": "muon", "batch": 16, "micro": 4, "unused": True},
    "signum-bfloat16": {"optimizer": "signum", "batch": 48, "micro": 4, "dtype": "bfloat16"},
    "muon-compiled": {"optimizer": "muon", "batch": 32, "micro": 4, "compile": True},
}

# float32 gradients: the reference works in float64 on the same float32 gradients.
# bfloat16: the same bfloat16 gradients are recomputed by another graph, and DDP's scaling rounds each by up to 2^-9.
RELATIVE_TOLERANCE = {"signum-bfloat16": 5e-3}


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_measured_by_the_ranks_equals_the_reference_on_gathered_gradients(num_ranks: int) -> None:
    cases = {name: case for name, case in CASES.items() if name != "muon-compiled" or num_ranks == 2}
    result = torchrun(
        Path(__file__).with_name("capture_worker.py"), num_ranks=num_ranks, environment={"CASES": json.dumps(cases)}
    )
    lines = [json.loads(line[5:]) for line in result.stdout.splitlines() if line.startswith("CASE ")]
    seen = {(line["case"], line["estimator"]) for line in lines}
    assert seen == {(name, estimator) for name in cases for estimator in ("split", "rank_variance")}
    for line in lines:
        tolerance = RELATIVE_TOLERANCE.get(line["case"], 1e-5)
        scale = max(abs(value) for value in line["reference"][:2])
        for measured, reference in zip(line["measured"], line["reference"], strict=True):
            # progress is a difference of large terms: its error is relative to the norms it is made of.
            assert math.isclose(measured, reference, rel_tol=tolerance, abs_tol=tolerance * scale), line
    accumulated = [line for line in lines if line["case"] == "muon-accumulated"]
    assert {line["num_groups"] for line in accumulated} == {12}

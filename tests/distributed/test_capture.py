"""What is measured on every layout is what the eager reference says about the gathered full gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import torchrun

BOTH = ["split", "rank_variance"]

# Halves of enough samples for full rank: p(G) of a matrix with a singular value near zero turns on the last bit. So do
# momenta of a model that has learnt its few samples: "steps" ends before that.
DDP: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon", "batch": 64, "micro": 16},
    "signum": {"optimizer": "signum", "batch": 16, "micro": 8},
    "sgd": {"optimizer": "sgd", "batch": 16, "micro": 8},
    "muon-accumulated": {"optimizer": "muon", "batch": 48, "micro": 4},
    "sgd-accumulated": {"optimizer": "sgd", "batch": 48, "micro": 4},
    "signum-uneven-pieces": {"optimizer": "signum", "batch": 20, "micro": 20, "min_groups": 12},
    "muon-tied": {"optimizer": "muon", "batch": 64, "micro": 8, "tied": True},
    "muon-unused-branch": {"optimizer": "muon", "batch": 64, "micro": 8, "unused": True},
    "muon-expert-without-tokens": {"optimizer": "muon", "batch": 48, "micro": 1, "expert": True},
    "signum-frozen": {"optimizer": "signum", "batch": 16, "micro": 4, "frozen": True},
    "muon-recomputed": {"optimizer": "muon", "batch": 64, "micro": 8, "checkpoint": True},
    "signum-bfloat16": {"optimizer": "signum", "batch": 48, "micro": 4, "dtype": "bfloat16"},
    "muon-scaled": {"optimizer": "muon", "batch": 64, "micro": 8, "scaler": True},
    "muon-patterns": {"optimizer": "muon", "batch": 64, "micro": 8, "patterns": 3, "min_groups": 8, "curve": True},
    "sgd-patterns": {"optimizer": "sgd", "batch": 64, "micro": 8, "patterns": 3, "min_groups": 8, "curve": True},
    "muon-update": {"optimizer": "muon", "batch": 64, "micro": 8, "directions": ["gradient", "update"], "steps": 2},
    "signum-update": {"optimizer": "signum", "batch": 16, "micro": 4, "directions": ["update"]},
    "sgd-update": {"optimizer": "sgd", "batch": 16, "micro": 4, "directions": ["update"]},
    "muon-polar-express": {"optimizer": "muon", "batch": 64, "micro": 8, "norms": "polar_express"},
    "sgd-inner-products": {"optimizer": "sgd", "batch": 48, "micro": 4, "policy": "inner_product_test"},
    "signum-inner-products": {
        "optimizer": "signum",
        "batch": 20,
        "micro": 20,
        "min_groups": 12,
        "policy": "inner_product_test",
    },
    "muon-inner-products": {
        "optimizer": "muon",
        "batch": 64,
        "micro": 8,
        "unused": True,
        "scaler": True,
        "policy": "inner_product_test",
    },
    "muon-compiled": {"optimizer": "muon", "batch": 32, "micro": 4, "compile": True},
}

SHARDED: dict[str, dict[str, Any]] = {
    "one-pass": {"optimizer": "stand-in", "batch": 16, "micro": 16},
    "published-one-pass": {"optimizer": "stand-in", "batch": 16, "micro": 16, "estimators": ["rank_variance"]},
    "tied": {"optimizer": "stand-in", "batch": 32, "micro": 4, "tied": True},
    "frozen": {"optimizer": "signum", "batch": 32, "micro": 4, "frozen": True},
    "accumulated": {"optimizer": "stand-in", "batch": 48, "micro": 3},
    "signum": {"optimizer": "signum", "batch": 32, "micro": 4},
    "sgd": {"optimizer": "sgd", "batch": 32, "micro": 4},
    "kept-unsharded": {"optimizer": "stand-in", "batch": 32, "micro": 4, "reshard": False},
    "mixed-precision": {"optimizer": "stand-in", "batch": 32, "micro": 4, "mixed": True},
    "recomputed": {"optimizer": "stand-in", "batch": 32, "micro": 4, "checkpoint": True},
    "unused-branch": {"optimizer": "stand-in", "batch": 32, "micro": 4, "unused": True, "estimators": ["split"]},
    "scaled": {"optimizer": "stand-in", "batch": 32, "micro": 4, "scaler": True},
    "patterns": {"optimizer": "stand-in", "batch": 64, "micro": 4, "patterns": 3, "curve": True},
    "update": {"optimizer": "stand-in", "batch": 32, "micro": 4, "directions": ["gradient", "update"], "steps": 2},
    "euclidean-besides": {"optimizer": "stand-in", "batch": 32, "micro": 4, "policy": "norm_test"},
    "polar-express": {"optimizer": "stand-in", "batch": 32, "micro": 4, "norms": "polar_express"},
}

# float32 gradients: the reference works in float64 on the same float32 gradients.
# bfloat16: the same bfloat16 gradients are recomputed by another graph, and averaging rounds each by up to 2^-9.
# polar_express: its stated contract, against exact singular values.
BFLOAT16, POLAR_EXPRESS, FLOAT32 = 5e-3, 2e-3, 1e-5


def run(cases: dict[str, dict[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    cases = {name: {"estimators": BOTH, **case} for name, case in cases.items()}
    result = torchrun(
        Path(__file__).with_name("capture_worker.py"), num_ranks=num_ranks, environment={"CASES": json.dumps(cases)}
    )
    lines: list[dict[str, Any]] = [
        json.loads(line[5:]) for line in result.stdout.splitlines() if line.startswith("CASE ")
    ]
    seen = {(line["case"], line["estimator"]) for line in lines}
    assert seen == {(name, estimator) for name, case in cases.items() for estimator in case["estimators"]}
    for line in lines:
        case = cases[line["case"]]
        tolerance = FLOAT32
        if case.get("mixed") or case.get("dtype") == "bfloat16":
            tolerance = BFLOAT16
        elif case.get("norms") == "polar_express" and line["geometry"] == "spectral":
            tolerance = POLAR_EXPRESS
        scale = max(abs(value) for value in line["reference"][:2])
        assert len(line["measured"]) == len(line["reference"]), line
        for measured, reference in zip(line["measured"], line["reference"], strict=True):
            # progress is a difference of large terms: its error is relative to the norms it is made of.
            assert math.isclose(measured, reference, rel_tol=tolerance, abs_tol=tolerance * scale), line
        has_inner_products = case.get("policy") == "inner_product_test" and line["geometry"] == "euclidean"
        if has_inner_products and line["estimator"] == "rank_variance":  # in |g|^4: small beside the norms
            assert math.isclose(line["measured"][2], line["reference"][2], rel_tol=FLOAT32), line
    return lines


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_replicated_ranks_measure_what_the_reference_says_of_gathered_gradients(num_ranks: int) -> None:
    cases = {name: case for name, case in DDP.items() if name != "muon-compiled" or num_ranks == 4}
    lines = run(cases, num_ranks)
    assert {line["num_groups"] for line in lines if line["case"] == "muon-accumulated"} == {12}
    assert {line["patterns"] for line in lines if line["case"] == "sgd-patterns"} == {3, None}
    besides = {(line["group"], line["geometry"]) for line in lines if line["case"] == "muon-inner-products"}
    assert besides == {
        ("matrices", "spectral"),
        ("others", "sign"),
        ("matrices, euclidean", "euclidean"),
        ("others, euclidean", "euclidean"),
    }


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp2_measures_what_the_reference_says_of_gathered_gradients(num_ranks: int) -> None:
    lines = run({name: {**case, "layout": "fsdp2"} for name, case in SHARDED.items()}, num_ranks)
    # Halves are split in time: ranks are averaged before anybody looks. rank_variance stands before that.
    groups = {line["estimator"]: line["num_groups"] for line in lines if line["case"] == "one-pass"}
    assert groups == {"split": 2, "rank_variance": 2 * num_ranks}


@pytest.mark.distributed
@pytest.mark.slow
def test_hsdp_measures_what_the_reference_says_of_gathered_gradients() -> None:
    chosen = ("one-pass", "accumulated", "signum", "sgd", "mixed-precision", "patterns", "update")
    run({name: {**SHARDED[name], "layout": "hsdp"} for name in chosen}, num_ranks=4)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_tensor_parallel_axis_beside_data_parallel_changes_nothing(num_ranks: int) -> None:
    # 2 ranks: tensor parallel beside a data-parallel axis of one rank.
    chosen = ("one-pass", "accumulated", "signum", "sgd", "patterns", "update")
    cases = {name: {**SHARDED[name], "layout": "tp", "estimators": ["split"]} for name in chosen}
    run(cases, num_ranks)


@pytest.mark.distributed
@pytest.mark.slow
def test_tensor_parallel_without_data_parallel_measures_its_micro_batches() -> None:
    chosen = ("accumulated", "patterns", "update")
    cases = {name: {**SHARDED[name], "layout": "tp-alone", "estimators": ["split"]} for name in chosen}
    cases["signum"] = {**SHARDED["signum"], "layout": "tp-alone"}
    run(cases, num_ranks=2)


@pytest.mark.distributed
@pytest.mark.slow
def test_every_layout_reads_the_same_number_from_the_same_samples() -> None:
    # Four data-parallel ranks, four micro-batches each, halves split in time everywhere.
    case = {"optimizer": "stand-in", "batch": 64, "micro": 4, "estimators": BOTH}
    found = {layout: run({"same": {**case, "layout": layout}}, num_ranks=4) for layout in ("ddp", "fsdp2", "hsdp")}
    assert [len(lines) for lines in found.values()] == [12, 12, 12]
    for layout in ("fsdp2", "hsdp"):
        for line, other in zip(found["ddp"], found[layout], strict=True):
            scale = max(line["measured"][:2])
            for value, same in zip(line["measured"], other["measured"], strict=True):
                assert math.isclose(value, same, rel_tol=FLOAT32, abs_tol=FLOAT32 * scale), (layout, line, other)

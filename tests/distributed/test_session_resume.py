"""A checkpoint of two ranks, saved right after a measured step, goes on with three."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import ControllerProcess
from tests.torchrun import torchrun

WORKER = Path(__file__).with_name("session_resume_worker.py")


def case(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "url": None, "from_samples": 40, "coupling": "linear", "interval": None, **changes}


@pytest.mark.distributed
@pytest.mark.slow
def test_every_rank_trains_the_samples_that_are_counted_after_a_resume_on_more_ranks(tmp_path: Path) -> None:
    """Two ranks of 8 make 32; three make 24. Every five steps are measured, so step 10 leaves a decision pending."""
    controller = ControllerProcess(tmp_path).start()
    try:
        cases = [
            case("alone", coupling="adascale"),
            case("service", url=controller.url),
            case("shrinks-below-one-pass", from_samples=4000),
            case("between-outer-steps", interval=4),
        ]
        saved = torchrun(WORKER, str(tmp_path), "save", json.dumps(cases), num_ranks=2)
        resumed = torchrun(WORKER, str(tmp_path), "resume", json.dumps(cases), num_ranks=3)
        reports = httpx.get(f"{controller.url}/api/v1/runs/service/measurements").raise_for_status().json()["items"]
    finally:
        controller.stop()
    before, after = (json.loads((tmp_path / f"{phase}.json").read_text()) for phase in ("save", "resume"))
    told = after.pop("other states")
    assert len(told) == 2 * 3
    assert all("ranks resume from different checkpoints: rank 0 from step 10, rank" in each for each in told), told
    for name, steps in [*before.items(), *after.items()]:
        assert all(step["counted"] == step["trained"] for step in steps), (name, steps)
        # Equal floats: the mean of squares is the square of the mean, but for the rounding of three additions.
        assert all(step["rate_spread"] < 1e-15 for step in steps), (name, steps)
        assert all(step["has_reading"] is not False for step in steps), (name, steps)
    assert {name: steps[-1]["counted"] for name, steps in before.items()} == {
        **dict.fromkeys(("alone", "service", "between-outer-steps"), 32),
        "shrinks-below-one-pass": 8,
    }
    assert {name: [step["counted"] for step in steps] for name, steps in after.items()} == {
        **dict.fromkeys(("alone", "service", "between-outer-steps"), [24] * 12),
        "shrinks-below-one-pass": [6] * 12,
    }
    for name in ("service", "between-outer-steps"):
        assert [step["rate"] for step in after[name]] == [pytest.approx(0.01 * 24 / 8)] * 12
    # The decision of step 10 was made before the checkpoint, those of 15 and 20 by the service on the new ranks.
    assert after["service"][-1]["sources"] == ["10 local", "15 controller", "20 controller"]
    ranks = [(item["measurement"]["data_parallel_size"], item["measurement"]["global_batch_size"]) for item in reports]
    assert sorted(ranks[-2:]) == [(3, 24), (3, 24)]

    assert saved.stderr.count("not reachable") == 0
    for line in ("global_batch_size=32->24", "global_batch_size=8->6"):
        # Said by rank 0, once for a plan.
        assert resumed.stderr.count(line) == (3 if "32" in line else 1), resumed.stderr
    assert resumed.stderr.count("between two outer steps") == 1

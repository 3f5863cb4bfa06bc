"""The example job, fully sharded and on a budget, as the guide says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.torchrun import torchrun


@pytest.mark.distributed
@pytest.mark.slow
def test_the_example_job_trains_fully_sharded_and_says_what_measuring_took(tmp_path: Path) -> None:
    output = tmp_path / "run.jsonl"
    arguments = ["--fully-shard", "--optimizer", "muon", "--budget-samples", "2000", "--evaluations", "2"]
    arguments += ["--measurement-budget", "0.1", "--output", str(output), "--spool-directory", str(tmp_path / "spool")]
    torchrun("trainer_hooks.examples.train_lm", *arguments, num_ranks=2)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert "layout=FSDP2" in records[0]["attached"]
    assert sum(record["kind"] == "decision" for record in records) > 1
    assert records[-1]["samples"] == 2000
    assert 0 < records[-1]["measurement_share"] <= 0.15


@pytest.mark.distributed
@pytest.mark.slow
def test_what_the_example_cannot_do_sharded_is_said_on_the_command_line() -> None:
    arguments = ("--fully-shard", "--checkpoint", "run.pt")
    result = torchrun("trainer_hooks.examples.train_lm", *arguments, num_ranks=1, expect_status=(1,))
    assert "--fully-shard does not write checkpoints" in result.stderr

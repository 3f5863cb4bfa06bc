"""`gns-controller calibrate` from outside: what it refuses, what it finds, what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gns_controller.experiments.calibration.results import evaluate, remarks
from tests.faults.test_demo import processes_naming
from tests.gns_controller.running_service import run_cli
from tests.torchrun import environment_with

pytestmark = pytest.mark.slow

TINY = [
    *("--at-samples", "320,576", "--multiples", "1,2", "--branch-samples", "256", "--evaluations", "2"),
    *("--budget-samples", "3200", "--width", "16", "--layers", "1"),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "one of the two"),
        (["--at-samples", "320", "--checkpoint", "job.pt"], "one of the two"),
        (["--checkpoint", "nobody.pt"], "nobody.pt: there is no such file"),
        (["--at-samples", "320", "--branch-samples", "500"], "Nearest: 384 or 512"),
        (["--at-samples", "47000"], "beyond the budget of 48000"),
        (["--at-samples", "320", "--multiples", "2,4"], "needs 1"),
        (["--at-samples", "320", "--multiples", "1,6"], "Nearest reachable: 64 or 128"),
        (
            ["--checkpoint", "job.pt", "--batch-size", "8", "--seed", "1"],
            "--batch-size, --seed: only with --at-samples",
        ),
        (["--at-samples", "320", "--price", "--multiples", "1,4"], "no --multiples"),
        (["--at-samples", "many"], "not a list of whole numbers"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    code, _, errors = run_cli("calibrate", *arguments, folder=tmp_path)
    assert (code, errors.count("\n")) == (2, 1)
    assert sentence in errors


def test_a_row_is_made_of_the_records_of_its_branches() -> None:
    def records(batch: int, losses: list[float]) -> list[dict[str, object]]:
        common = {"kind": "evaluation", "global_batch_size": batch, "learning_rate_factor": (batch / 16) ** 0.5}
        evaluations = [
            {**common, "samples": 1000 + 64 * n, "validation_loss": loss} for n, loss in enumerate(losses, 1)
        ]
        steps = 50 + 128 // batch
        return [*evaluations, {"kind": "end", "optimizer_steps": steps, "training_seconds": 1.0}]

    description = {"samples_seen": 1000, "optimizer_step": 50, "global_batch_size": 16, "job": {"seed": 0}}
    branches = {1: records(16, [3.0, 2.0]), 2: records(32, [3.0, 2.01]), 4: records(64, [3.0, float("nan")])}
    result = evaluate(checkpoint="a.pt", description=description, records=branches, tolerance=0.01, price=False)
    assert [branch.optimizer_steps for branch in result.branches] == [8, 4, 2]
    assert (result.critical_batch_size, result.next_batch_size, result.bound) == (32, 64, "")
    row = result.as_row()
    assert [branch["loss"] for branch in row["branches"]] == pytest.approx([2.5, 2.505, None])
    json.dumps(row, allow_nan=False)
    said = " ".join(remarks([result]))
    assert "diverged at batch 64" in said
    assert "nothing was read by split" in said
    priced = evaluate(checkpoint="a.pt", description=description, records=branches, tolerance=0.01, price=True)
    assert priced.critical_batch_size is None
    assert (priced.price, priced.steps_saved) == (pytest.approx(0.005 / 4), 4)


def test_a_file_that_is_no_checkpoint_is_said_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.pt").write_text("no checkpoint")
    code, _, errors = run_cli("calibrate", "--checkpoint", "notes.pt", folder=tmp_path)
    assert (code, errors.count("\n")) == (2, 1)
    assert "notes.pt is not a checkpoint of this job" in errors


@pytest.mark.slow
def test_a_small_calibration_ends_with_its_table_and_is_not_run_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gns_controller", "calibrate", *TINY, "--json"]

    def calibrate() -> dict[str, object]:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment_with(), capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, object] = json.loads(done.stdout)
        return found

    report = calibrate()
    output = tmp_path / "calibration-output"
    rows = report["rows"]
    assert isinstance(rows, list)
    assert [row["samples"] for row in rows] == [320, 576]
    assert [[branch["optimizer_steps"] for branch in row["branches"]] for row in rows] == [[16, 8], [16, 8]]
    # The base run is the uninterrupted one: it was at 576 samples, too.
    base = [json.loads(line) for line in (output / "base-seed0.jsonl").read_text().splitlines()]
    last = [record for record in base if record["kind"] == "evaluation"][-1]
    assert (last["samples"], last["validation_loss"]) == (576, rows[0]["branches"][0]["losses"][-1])
    for row in rows:
        assert {scale["estimator"] for scale in row["noise_scales"]} == {"split", "rank_variance"}
        assert all(scale["num_measurements"] >= 5 for scale in row["noise_scales"])
    table = {
        "policy": "critical_batch_table",
        "table": [{"from_samples": row["samples"], "critical_batch_size": row["critical_batch_size"]} for row in rows],
    }
    assert report["policy"] == table
    assert json.loads((output / "critical_batch_table.json").read_text()) == table

    written = {path: path.stat().st_mtime_ns for path in output.glob("*.jsonl")}
    assert len(written) == 5
    (output / "branch-1-base-seed0-576-x2.jsonl").write_text("")  # as if it had been interrupted
    assert calibrate()["rows"] != []
    rewritten = [path.name for path, before in written.items() if path.stat().st_mtime_ns != before]
    assert rewritten == ["branch-1-base-seed0-576-x2.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left-over processes in /proc")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_every_process_that_a_calibration_started(
    tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "gns_controller", "calibrate", "--at-samples", "40000", "--output", str(output)]
    with subprocess.Popen(
        command, env=environment_with(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as calibration:
        deadline = time.monotonic() + 120
        base = output / "base-seed0.jsonl"
        while not (base.exists() and '"decision"' in base.read_text()):
            assert calibration.poll() is None, calibration.stdout and calibration.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(processes_naming(output)) == 2
        calibration.send_signal(sent)
        calibration.communicate(timeout=60)
    assert calibration.returncode == status
    assert processes_naming(output) == []

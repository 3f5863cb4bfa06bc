"""The demonstration ends by itself with its table, and on one Ctrl-C with every process it started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gns_controller.experiments.demo.methods import START_BATCH, closed_methods, ramp_stages
from gns_controller.experiments.demo.results import RunResult, summarize
from tests.torchrun import environment_with

COMMAND = [sys.executable, "-m", "gns_controller", "demo"]


def processes_naming(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left-over processes in /proc")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_every_process_that_the_demonstration_started(
    tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    output = tmp_path / "out"
    command = [*COMMAND, "--output", str(output), "--budget-samples", "50000"]
    with subprocess.Popen(command, env=environment_with(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as demo:
        deadline = time.monotonic() + 120
        result = output / "constant.jsonl"
        while not (result.exists() and '"decision"' in result.read_text()):
            assert demo.poll() is None, demo.stdout and demo.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(processes_naming(output)) >= 4  # the demo, the controller, torchrun, its ranks
        demo.send_signal(sent)
        demo.communicate(timeout=60)
    assert demo.returncode == status
    assert processes_naming(output) == []


@pytest.mark.distributed
@pytest.mark.slow
def test_the_demonstration_ends_with_its_table_and_plot(tmp_path: Path) -> None:
    command = [*COMMAND, "--output", str(tmp_path), "--budget-samples", "2000", "--exit", "--json"]
    done = subprocess.run(command, env=environment_with(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["constant", "constant4x", "published", "split", "openloop"]
    assert all(row["samples"] == 2000 for row in rows)
    assert rows[0]["optimizer_steps"] == 125
    assert json.loads((tmp_path / "demo.json").read_text())["rows"] == rows
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert processes_naming(tmp_path) == []


@pytest.mark.parametrize("steps", [6000, 3000, 2300, 800])
def test_the_open_loop_twin_takes_as_many_steps_for_the_same_samples(steps: int) -> None:
    stages = ramp_stages(budget_samples=96_000, steps=steps)
    bounds = [stage["from_samples"] for stage in stages] + [96_000]
    taken = sum(
        (after - before) / stage["global_batch_size"]
        for stage, before, after in zip(stages, bounds, bounds[1:], strict=False)
    )
    assert taken == pytest.approx(steps, rel=0.03)  # batches are whole numbers
    assert stages[0]["global_batch_size"] == START_BATCH


def test_three_ways_of_counting_saved_steps_are_kept_apart() -> None:
    def run(name: str, losses: dict[int, float]) -> RunResult:
        evaluations = [{"optimizer_step": step, "validation_loss": loss, "samples": 0} for step, loss in losses.items()]
        end = {"optimizer_steps": max(losses), "samples": 100, "training_seconds": 1.0}
        return RunResult(name, name, evaluations=evaluations, end=end)

    baseline = run("constant", {500: 2.2, 800: 2.009, 900: 2.0, 1000: 2.05})
    fewer = run("ramp", {200: 2.1, 300: 2.009, 400: 2.005})
    _, row = summarize([baseline, fewer])
    assert row["steps_to_baseline_best"] is None
    assert row["steps_to_within_half_percent"] == 300
    assert row["steps_saved_near"] == pytest.approx(1 - 300 / 800)
    assert row["total_steps_ratio"] == pytest.approx(0.4)


def test_four_times_the_batch_takes_twice_the_rate() -> None:
    constant, larger = closed_methods("muon", budget_samples=1000)[:2]
    assert (larger.batch_size, larger.learning_rate) == (4 * constant.batch_size, 2 * constant.learning_rate)

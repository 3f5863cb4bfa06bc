"""Training goes on, whatever the controller does, and nothing measured is lost."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from tests.running import ControllerProcess
from tests.torchrun import environment_with, torchrun, torchrun_command

WORKER = Path(__file__).with_name("job_worker.py")
POLICY = {"policy": "noise_scale", "estimator": "rank_variance", "act_on_unresolved": True, "noise_tolerance": 0.8}
BUDGET = 8000


def arguments(tmp_path: Path, url: str, *, name: str = "job", budget: int = BUDGET) -> list[str]:
    return [
        *("--run-id", name, "--controller", url, "--output", str(tmp_path / "out.jsonl")),
        *("--budget-samples", str(budget), "--measurement-interval-steps", "5", "--policy", json.dumps(POLICY)),
        *("--evaluations", "2", "--validation-samples", "64", "--spool-directory", str(tmp_path / "spool")),
    ]


def entries(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    path = tmp_path / "out.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in found if entry["kind"] == kind]


def stored(url: str, what: str, name: str = "job") -> list[dict[str, Any]]:
    items, cursor = [], ""
    while True:
        query = {"limit": 500, **({"cursor": cursor} if cursor else {})}
        page = httpx.get(f"{url}/api/v1/runs/{name}/{what}", params=query).raise_for_status().json()
        items += page["items"]
        cursor = page["next_cursor"]
        if not cursor:
            return items


def wait_for(condition: Any, *, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def steps_of_ranks(tmp_path: Path, num_ranks: int = 2) -> list[list[str]]:
    return [(tmp_path / f"rank{rank}.steps").read_text().splitlines() for rank in range(num_ranks)]


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    process = ControllerProcess(tmp_path).start()
    yield process
    process.stop()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_controller_killed_in_the_middle_of_a_job_costs_nothing(
    tmp_path: Path, controller: ControllerProcess
) -> None:
    command = torchrun_command(WORKER, *arguments(tmp_path, controller.url), num_ranks=2)
    log = (tmp_path / "job.log").open("w")
    with log, subprocess.Popen(command, env=environment_with(), stdout=log, stderr=log) as job:
        wait_for(lambda: len(entries(tmp_path, "decision")) >= 12 or job.poll() is not None)
        controller.kill()
        wait_for(lambda: any(e["source"] == "local" for e in entries(tmp_path, "decision")) or job.poll() is not None)
        reached = len(entries(tmp_path, "decision"))
        wait_for(lambda: len(entries(tmp_path, "decision")) >= reached + 3 or job.poll() is not None)
        controller.start()
        status = job.wait(120)
    assert status == 0, (tmp_path / "job.log").read_text()[-4000:]

    first, second = steps_of_ranks(tmp_path)
    assert first == second, "ranks trained with different batches"
    assert len({line.split()[1] for line in first}) > 2, "the batch never changed: the test would prove nothing"

    measurements = [
        NoiseScaleMeasurement.model_validate(i["measurement"]) for i in stored(controller.url, "measurements")
    ]
    measured_steps = [m.optimizer_step for m in measurements]
    final_step = int(entries(tmp_path, "end")[0]["optimizer_steps"])
    multiples = [step for step in range(1, final_step + 1) if step == 1 or step % 5 == 0]
    assert measured_steps == sorted({*multiples, final_step})

    decided = [item["decision"] for item in stored(controller.url, "decisions")]
    run = httpx.get(f"{controller.url}/api/v1/runs/job").json()
    specification = RunSpecification.model_validate(run["specification"])
    again = replay(specification, measurements, follow_trainer=True)
    assert [d.model_dump(mode="json") for d in again] == decided
    by_step = {decision["optimizer_step"]: decision["plan"] for decision in decided}
    sources = set()
    for entry in entries(tmp_path, "decision"):
        sources.add(entry["source"])
        assert entry["plan"] == by_step[entry["optimizer_step"]], "service and trainer disagree"
    assert sources == {"controller", "local"}
    assert run["state"] == "finished"


@pytest.mark.distributed
@pytest.mark.slow
def test_a_job_with_a_black_hole_for_a_controller_trains_to_the_end_and_keeps_what_it_measured(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)  # accepts, and never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        torchrun(WORKER, *arguments(tmp_path, url, budget=1600), num_ranks=2)
    first, second = steps_of_ranks(tmp_path)
    assert first == second
    assert len(entries(tmp_path, "end")) == 1
    assert {entry["source"] for entry in entries(tmp_path, "decision")} == {"local"}

    [spool] = (tmp_path / "spool" / "job").glob("*.jsonl")
    spooled = [json.loads(line) for line in spool.read_text().splitlines()[1:]]
    final_step = int(entries(tmp_path, "end")[0]["optimizer_steps"])
    expected = sorted({1, *range(5, final_step + 1, 5), final_step})
    assert [line["optimizer_step"] for line in spooled] == expected

    # The next incarnation hands over what the last one could not, as an attempt of its own.
    controller = ControllerProcess(tmp_path).start()
    try:
        torchrun(WORKER, *arguments(tmp_path, controller.url, budget=1600), num_ranks=2)
        found = [item["measurement"] for item in stored(controller.url, "measurements")]
        assert [m["optimizer_step"] for m in found if m["attempt"] == 0] == expected
        assert {m["attempt"] for m in found} == {0, 1}
        assert not list((tmp_path / "spool" / "job").iterdir())
    finally:
        controller.stop()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_name_taken_by_another_specification_is_told_on_every_rank(
    tmp_path: Path, controller: ControllerProcess
) -> None:
    torchrun(WORKER, *arguments(tmp_path, controller.url, budget=320), num_ranks=2)
    result = torchrun(WORKER, *arguments(tmp_path, controller.url, budget=640), num_ranks=2, expect_status=(1,))
    for rank in range(2):
        told = f"train_lm: rank {rank}: "
        [sentence] = [line for line in result.stderr.splitlines() if told in line]
        assert "exists with another specification (budget_samples: registered 320, requested 640)" in sentence

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gns_controller.core.errors import InvalidInputError, MissingDependencyError
from gns_controller.recordings import ImportDefaults, Limits
from gns_controller.recordings.reading import read_recording
from gns_controller.recordings.wandb_history import BLOCK_BYTES, log_records, read_wandb_online

LOGGING_JOB = """
import math, sys
import wandb

run = wandb.init(project="ramps", dir=sys.argv[1], id="ramp-7", settings=wandb.Settings(console="off", silent=True))
for step in range(1, 61):
    logged = {"train/loss": math.nan if step == 3 else 3 - step / 100, "batch_size": 64, "note": "x" * 2000}
    if step % 10 == 0:
        logged["noise"] = {"gns": 5.0 * step}
    run.log(logged, step=10 * step)
run.finish()
"""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wandb folder of one real offline run, made in a process of its own: wandb leaves threads behind."""
    folder = tmp_path_factory.mktemp("offline")
    environment = {"WANDB_MODE": "offline", "HOME": str(folder), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", LOGGING_JOB, str(folder)]
    subprocess.run(command, env=environment, cwd=folder, check=True, timeout=120, capture_output=True)
    return folder / "wandb"


def log_of(offline_run: Path) -> Path:
    [log] = offline_run.glob("offline-run-*/*.wandb")
    return log


def test_a_real_offline_run_is_read_whole(offline_run: Path) -> None:
    log = log_of(offline_run)
    assert log.stat().st_size > 3 * BLOCK_BYTES  # records cross blocks
    recording = read_recording(log.parent, columns={"noise_scale": "noise.gns"})
    assert recording.run_id == "ramp-7"
    assert [m.optimizer_step for m in recording.measurements] == list(range(10, 601, 10))
    losses = [m.loss for m in recording.measurements]
    assert math.isnan(losses[2] or 0.0)
    assert losses[3:] == [3 - step / 100 for step in range(4, 61)]
    assert {m.optimizer_step: m.readings[0].noise_sq for m in recording.measurements if m.readings} == pytest.approx(
        {100 * k: 50.0 * k for k in range(1, 7)}
    )
    for same in (log, offline_run):
        assert len(read_recording(same).measurements) == 60


def test_a_torn_end_costs_the_record_it_tore(offline_run: Path, tmp_path: Path) -> None:
    whole = log_of(offline_run).read_bytes()
    torn = tmp_path / "run-torn.wandb"
    torn.write_bytes(whole[: len(whole) // 2])
    recording = read_recording(torn)
    assert 20 < len(recording.measurements) < 40
    assert recording.notes[0].startswith("the log ends inside a record")
    assert recording.run_id == "torn"


def test_damage_before_the_end_is_an_error(offline_run: Path, tmp_path: Path) -> None:
    damaged = bytearray(log_of(offline_run).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path = tmp_path / "run-damaged.wandb"
    path.write_bytes(damaged)
    with pytest.raises(InvalidInputError, match="its checksum is wrong"):
        read_recording(path)
    path.write_bytes(b":W&B\x00\x00\x09" + damaged)
    with pytest.raises(InvalidInputError, match="known version"):
        read_recording(path)


def test_every_cut_of_a_log_is_read_or_refused(offline_run: Path, tmp_path: Path) -> None:
    whole = log_of(offline_run).read_bytes()
    expected = list(log_records(log_of(offline_run), source="log", notes=[]))
    path = tmp_path / "cut.wandb"
    for size in (*range(7, 1000, 13), *range(BLOCK_BYTES - 40, BLOCK_BYTES + 40)):
        path.write_bytes(whole[:size])
        records = list(log_records(path, source="cut", notes=[]))
        assert records == expected[: len(records)]


def test_a_folder_without_a_run_or_with_several_is_refused(offline_run: Path, tmp_path: Path) -> None:
    for name in ("run-a.wandb", "run-b.wandb"):
        (tmp_path / name).write_bytes(log_of(offline_run).read_bytes())
    with pytest.raises(InvalidInputError, match=r"several runs: name one of 'run-a.wandb', 'run-b.wandb'"):
        read_recording(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match=r"holds no .wandb file"):
        read_recording(tmp_path / "empty", format="wandb")


class FakeApi:
    """As much of wandb.Api as is used: no server is asked in tests."""

    def __init__(self, *rows: dict[str, Any], failure: Exception | None = None) -> None:
        self.rows, self.failure, self.asked = rows, failure, ""

    def run(self, path: str) -> FakeApi:
        self.asked = path
        if self.failure:
            raise self.failure
        return self

    def scan_history(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def online(api: FakeApi, *, address: str = "wandb:team/ramps/abc", limits: Limits | None = None) -> Any:
    return read_wandb_online(address, columns=None, defaults=ImportDefaults(), limits=limits or Limits(), api=api)


def test_a_run_on_a_server_is_its_history() -> None:
    api = FakeApi({"_step": 0, "batch_size": 8, "loss": None}, {"_step": 5, "loss": "NaN"}, {"_step": 9, "gns": 3.0})
    recording = online(api)
    assert api.asked == "team/ramps/abc"
    assert recording.run_id == "abc"
    assert [(m.optimizer_step, m.samples_seen) for m in recording.measurements] == [(0, 0), (5, 40), (9, 72)]
    assert recording.measurements[2].readings[0].noise_sq == pytest.approx(3.0)


def test_a_server_that_refuses_is_one_sentence() -> None:
    with pytest.raises(InvalidInputError) as caught:
        online(FakeApi(failure=ValueError("Could not find run\n" + "x" * 500)))
    assert "could not be fetched: ValueError 'Could not find run\\nxxx" in str(caught.value)
    assert len(str(caught.value)) < 250
    with pytest.raises(InvalidInputError, match="holds no history"):
        online(FakeApi())
    with pytest.raises(InvalidInputError, match="more than 1 rows"):
        online(FakeApi({"_step": 1}, {"_step": 2}), limits=Limits(num_rows=1))
    with pytest.raises(InvalidInputError, match="wandb:ENTITY/PROJECT/RUN"):
        online(FakeApi(), address="wandb:team//abc")


def test_a_missing_package_is_one_sentence(offline_run: Path, monkeypatch: Any) -> None:
    for name in ("wandb", "wandb.proto"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in (str(offline_run), "wandb:team/ramps/abc"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'gns-controller\[importers\]'"):
            read_recording(path)

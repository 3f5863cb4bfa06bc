from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gns_controller.core.errors import InvalidInputError, MissingDependencyError
from gns_controller.recordings import read_recording


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """12000 steps: more than TensorBoard keeps unless it is asked to keep everything."""
    with SummaryWriter(str(tmp_path / "ramp")) as writer:  # type: ignore[no-untyped-call]
        for step in range(1, 12_001):
            writer.add_scalar("train/loss", 1 / step, step)  # type: ignore[no-untyped-call]
            if step % 4000 == 0:
                writer.add_scalar("batch_size", step / 1000, step)  # type: ignore[no-untyped-call]
                writer.add_scalar("noise_scale", step / 100, step)  # type: ignore[no-untyped-call]
        writer.add_histogram("weights", np.arange(5.0), 1)  # type: ignore[no-untyped-call]
    return tmp_path / "ramp"


def test_every_scalar_of_a_run_is_read(run: Path) -> None:
    recording = read_recording(run)
    assert recording.run_id == "ramp"
    assert [m.optimizer_step for m in recording.measurements] == list(range(1, 12_001))
    # Scalars are float32 in the file.
    assert [m.loss for m in recording.measurements] == [float(np.float32(1 / step)) for step in range(1, 12_001)]
    measured = {m.optimizer_step: m for m in recording.measurements if m.readings}
    assert {step: m.global_batch_size for step, m in measured.items()} == {4000: 4, 8000: 8, 12_000: 12}
    assert measured[8000].readings[0].noise_sq == pytest.approx(80.0)
    assert recording.is_averaged
    [file] = run.iterdir()
    assert read_recording(file).measurements == recording.measurements
    assert read_recording(run.parent).measurements == recording.measurements


def test_scalars_as_tensorflow_2_writes_them_are_read(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[import-untyped]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]
    from tensorboard.util.tensor_util import make_tensor_proto  # type: ignore[import-untyped]

    writer = EventFileWriter(str(tmp_path))
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    for step in (1, 2):
        for tag, value in (("batch_size", np.int64(8 * step)), ("loss", np.float64(0.1)), ("text", np.array([b"x"]))):
            proto = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(value))
            writer.add_event(Event(step=step, summary=Summary(value=[proto])))
    writer.close()
    recording = read_recording(tmp_path)
    assert [(m.global_batch_size, m.loss) for m in recording.measurements] == [(8, 0.1), (16, 0.1)]


def test_tags_are_mapped_and_a_later_value_for_a_step_stands(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:  # type: ignore[no-untyped-call]
        for step, value in ((1, 4.0), (2, 5.0), (2, 6.0)):
            writer.add_scalar("a/b", value, step)  # type: ignore[no-untyped-call]
            writer.add_scalar("bs", 8, step)  # type: ignore[no-untyped-call]
    recording = read_recording(tmp_path, columns={"loss": "a/b", "global_batch_size": "bs"})
    assert [(m.optimizer_step, m.loss) for m in recording.measurements] == [(1, 4.0), (2, 6.0)]
    assert recording.notes[0].startswith("1 scalars were logged again")


def test_several_runs_or_none_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        SummaryWriter(str(tmp_path / "runs" / name)).close()  # type: ignore[no-untyped-call]
    with pytest.raises(InvalidInputError, match="several runs: name one of 'one', 'two'"):
        read_recording(tmp_path / "runs")
    with pytest.raises(InvalidInputError, match="holds no scalars"):
        read_recording(tmp_path / "runs" / "one")
    fake = tmp_path / "events.out.tfevents.fake"
    fake.write_bytes(b"\xff" * 1000)
    with pytest.raises(InvalidInputError, match=r"holds no scalars|cannot be read"):
        read_recording(fake)


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gns-controller\[importers\]'"):
        read_recording(tmp_path)

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import HoldPolicyConfig, NoiseScalePolicyConfig
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from gns_controller.recordings import (
    ExportedMeasurement,
    ExportedRun,
    Limits,
    export_lines,
    export_recording,
    read_export,
    read_recording,
)
from tests.gns_controller.core.measurements import measurement, reading

RULES = BatchRules(global_batch_size=16, micro_batch_size=32)
RUN = ExportedRun(
    run_id="run",
    specification=RunSpecification(
        batch=RULES, data_parallel_size=2, budget_samples=100_000, policy=HoldPolicyConfig(), description="\u2028é"
    ),
    policy=NoiseScalePolicyConfig(estimator="rank_variance"),
    policy_revision=3,
)
CONTROL = {"kind": "control", "policy": {"policy": "hold"}, "revision": 2, "by": "somebody"}


def exported(*measurements: NoiseScaleMeasurement) -> list[ExportedMeasurement]:
    """With the decisions that the policy of RUN makes on them."""
    asked = RUN.specification.model_copy(update={"policy": RUN.policy})
    decisions = replay(asked, measurements, follow_trainer=True)
    return [
        ExportedMeasurement(
            sequence=7 * k, received_at=datetime(2026, 1, 2, 3, k % 60, tzinfo=UTC), measurement=m, decision=d
        )
        for k, (m, d) in enumerate(zip(measurements, decisions, strict=True))
    ]


ENTRIES = exported(*(measurement(25 * k, reading(noise_scale=40.0 * k)) for k in range(1, 5)))


def numbered(lines: Iterable[str]) -> list[tuple[int, str]]:
    return list(enumerate(lines, start=1))


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def refused(path: Path, **how: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read_recording(path, **how)
    return str(caught.value)


def test_an_export_says_what_it_holds_line_by_line() -> None:
    first, second, third = (json.loads(line) for line in export_lines(RUN, [ENTRIES[0], CONTROL]))
    assert (first["kind"], first["run_id"], first["policy"]["policy"], first["policy_revision"]) == (
        "run",
        "run",
        "noise_scale",
        3,
    )
    assert first["specification"]["budget_samples"] == 100_000
    assert (second["kind"], second["measurement"]["optimizer_step"]) == ("measurement", 25)
    assert second["received_at"].startswith("2026-01-02T03:00:00")
    assert second["decision"]["optimizer_step"] == 25
    assert third == CONTROL


def test_a_recording_of_an_export_is_what_was_exported(tmp_path: Path) -> None:
    last = ENTRIES[3].model_copy(update={"decision": None})
    path = written(tmp_path / "run.jsonl", *export_lines(RUN, [CONTROL, *ENTRIES[:3], CONTROL | {"revision": 3}, last]))
    recording = read_recording(path)
    assert recording.measurements == tuple(entry.measurement for entry in ENTRIES)
    assert recording.decisions == tuple(entry.decision for entry in ENTRIES[:3])
    assert recording.specification == RUN.specification
    assert (recording.policy, recording.policy_revision, recording.run_id) == (RUN.policy, 3, "run")
    assert [control["revision"] for control in recording.controls] == [2, 3]
    assert recording.control_positions == (0, 3)
    assert not recording.is_averaged


numbers = st.floats(width=64)
"""NaN and infinity included."""
labels = st.text(min_size=1, max_size=20)


@st.composite
def readings(draw: st.DrawFn) -> Any:
    is_split = draw(st.booleans())
    patterns = draw(st.none() | st.integers(1, 8)) if is_split else None
    return reading(
        noise_scale=1.0,
        estimator="split" if is_split else "rank_variance",
        group=draw(labels),
        geometry=draw(st.sampled_from(["euclidean", "sign", "spectral"])),
        direction=draw(st.sampled_from(["gradient", "update"])),
        noise=draw(numbers),
        signal=draw(numbers),
        progress=draw(numbers) if is_split else None,
        num_sign_patterns=patterns,
        noise_standard_error=draw(numbers) if patterns else None,
        ceiling_samples=None if is_split else draw(st.none() | numbers),
        learning_rate=draw(numbers),
        num_groups=draw(st.integers(2, 64)),
        samples_per_group=draw(st.floats(min_value=1e-9, max_value=1e12)),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[NoiseScaleMeasurement]:
    steps = draw(st.lists(st.integers(0, 2**62), max_size=6, unique=True).map(sorted))
    return [
        measurement(
            step,
            *draw(st.lists(readings(), max_size=3)),
            samples=draw(st.integers(0, 2**62)),
            loss=draw(st.none() | numbers),
            validation_loss=draw(st.none() | numbers),
            step_seconds=draw(st.none() | numbers),
            schedule_factor=draw(numbers),
            attempt=3,
        )
        for step in steps
    ]


def untimed(entry: Any) -> Any:
    return entry.model_copy(update={"received_at": None}) if isinstance(entry, ExportedMeasurement) else entry


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
times = st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.just(UTC))


@settings(deadline=None, max_examples=60)
@given(
    history=histories(), control=st.dictionaries(st.text(), json_values, max_size=3), when=times, at=st.integers(0, 6)
)
def test_reading_gives_back_what_was_written(
    history: list[NoiseScaleMeasurement], control: dict[str, Any], when: datetime, at: int
) -> None:
    decision = ENTRIES[0].decision
    assert decision is not None
    entries: list[Any] = [
        ExportedMeasurement(
            sequence=k,
            received_at=when,
            measurement=m,
            decision=decision.model_copy(update={"attempt": 3, "optimizer_step": m.optimizer_step}) if k % 2 else None,
        )
        for k, m in enumerate(history)
    ]
    entries.insert(at, {**control, "kind": "control"})
    run, found = read_export(numbered(export_lines(RUN, entries)))
    assert run == RUN
    assert [e.received_at for e in found if isinstance(e, ExportedMeasurement)] == [when] * len(history)
    # repr: NaN equals no NaN, and is the same text; UTC has more than one.
    assert repr(list(map(untimed, found))) == repr(list(map(untimed, entries)))
    recording = export_recording(run, found)
    assert repr(recording.measurements) == repr(tuple(history))
    assert recording.control_positions == (min(at, len(history)),)


def test_a_policy_decides_on_an_export_as_it_decided_on_the_run(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path / "run.jsonl", *export_lines(RUN, ENTRIES)))
    assert recording.specification is not None
    assert recording.policy is not None
    asked = recording.specification.model_copy(update={"policy": recording.policy})
    assert tuple(replay(asked, recording.measurements, follow_trainer=True)) == recording.decisions


def test_a_line_that_is_not_of_an_export_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run, first, second = export_lines(RUN, ENTRIES[:2])
    assert "line 1: kind 'measurement' where an export begins with kind 'run'" in refused(written(path, first))
    assert "line 2: kind 'gossip'" in refused(written(path, run, {"kind": "gossip"}))
    assert "line 3: optimizer_step 25 after 50 of the same attempt" in refused(written(path, run, second, first))
    assert "line 2: 'nonsense' is not JSON" in refused(written(path, run, "nonsense\n"))
    assert "line 2" in refused(written(path, run, first[:-20] + "\n"))
    assert "not a JSON object" in refused(written(path, run, [1]))
    assert "not JSON" in refused(written(path, run, "[" * 100_000 + "\n"))
    strange = json.loads(first)
    strange["measurement"]["global_batch_size"] = "secret" * 50
    message = refused(written(path, run, strange))
    assert "line 2, field 'measurement/global_batch_size'" in message
    assert "secret" not in message
    other = json.loads(first)
    other["measurement"]["run_id"] = "other"
    assert "a measurement of 'other' in an export of 'run'" in refused(written(path, run, other))
    wrong = json.loads(first)
    wrong["decision"]["optimizer_step"] = 26
    assert "the decision is about attempt 0, optimizer_step 26" in refused(written(path, run, wrong))
    assert "more than 1 rows" in refused(written(path, run, first, second), limits=Limits(num_rows=1))
    assert "is empty" in refused(written(path, "\n"))


def test_a_control_that_json_cannot_say_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="expected 'control'"):
        list(export_lines(RUN, [{"kind": "run"}]))
    with pytest.raises(InvalidInputError, match="JSON cannot say"):
        list(export_lines(RUN, [{"kind": "control", "value": math.nan}]))


def test_a_history_in_json_lines_is_a_table(tmp_path: Path) -> None:
    path = written(
        tmp_path / "history.ndjson",
        {"_step": 10, "train/loss": 3.5, "batch_size": 8, "_runtime": 1.5, "layers": {"a": [1]}},
        {"_step": 20, "train/loss": "NaN", "batch_size": None, "gns": 12.0},
    )
    recording = read_recording(path)
    first, second = recording.measurements
    assert (first.optimizer_step, first.loss, first.samples_seen) == (10, 3.5, 80)
    assert math.isnan(second.loss or 0.0)
    assert second.readings[0].noise_sq == pytest.approx(12.0)
    assert recording.is_averaged
    assert "column 'layers'" in refused(path, columns={"loss": "layers"})
    assert "True" in refused(written(path, {"_step": True, "batch_size": 8}))
    assert "is not a number" in refused(written(path, {"_step": 1, "batch_size": 8, "loss": 10**400}))


def test_the_example_jobs_own_output_is_told_what_to_use(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    path.write_text('{"kind": "start", "run": "train-lm", "attached": "split"}\n{"kind": "step"}\n')
    with pytest.raises(InvalidInputError, match="example job's own output; use gns-controller run export"):
        read_recording(path)

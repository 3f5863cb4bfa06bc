"""The published runs' recorded batches, token counts and learning rates, reproduced from their averaged noise scale."""

from __future__ import annotations

import math

import pytest

from gns_controller.core.replay import replay
from tests.gns_controller.core.published_runs import (
    ADAPTIVE,
    ALL,
    BUDGET_STEPS,
    CONSTANT,
    FOLDER,
    MEASURED,
    PEAK,
    START,
    TOKENS,
    WARMUP_STEPS,
    as_the_rule_saw_it,
    imported,
    rows_of,
    specification,
)

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the recorded runs are not beside this checkout")


@pytest.mark.parametrize("name", ALL)
def test_the_importer_yields_every_row_of_the_file(name: str) -> None:
    rows, recording = rows_of(name), imported(name)
    assert len(rows) == len(recording.measurements) >= 10
    for row, got in zip(rows, recording.measurements, strict=True):
        assert (got.optimizer_step, got.samples_seen * TOKENS) == (row.optimizer_step, row.tokens_seen)
        assert got.validation_loss == row.validation_loss
        assert got.attempt == 0
        assert row.global_batch_size in (None, got.global_batch_size)
        assert bool(got.readings) == (row.noise_scale is not None)
        for reading in got.readings:
            assert (reading.estimator, reading.geometry, reading.signal) == ("rank_variance", "sign", 1.0)
            # The root is stored: squaring it again turns on the last bit.
            assert reading.noise_sq == pytest.approx(row.noise_scale, rel=1e-15)
            assert reading.learning_rate == row.learning_rate
    assert recording.is_averaged == (name in MEASURED)


def test_the_recorded_runs_are_read_whole() -> None:
    assert {path.stem for path in FOLDER.glob("*.csv")} == set(ALL)
    assert sum(len(imported(name).measurements) for name in MEASURED) == 499


@pytest.mark.parametrize("name", [*MEASURED, *CONSTANT])
def test_the_published_rule_reproduces_every_recorded_row(name: str) -> None:
    rows, recording = rows_of(name), imported(name)
    decisions = replay(specification(recording), as_the_rule_saw_it(recording))
    after = {decision.optimizer_step: decision.plan.global_batch_size for decision in decisions}
    batch, samples, checked = START, 0, 0
    recorded = {row.optimizer_step: row for row in rows}
    for step in range(1, rows[-1].optimizer_step + 1):
        before_samples = samples
        batch = after.get(step, batch)
        samples += batch
        if step not in recorded:
            continue
        row = recorded[step]
        if row.global_batch_size is not None:
            assert (step, batch) == (step, row.global_batch_size)
        assert (step, samples * TOKENS) == (step, row.tokens_seen)
        if row.learning_rate is not None:
            if step <= WARMUP_STEPS:
                expected = PEAK * step / WARMUP_STEPS
            else:
                phase = (before_samples - WARMUP_STEPS * START) / ((BUDGET_STEPS - WARMUP_STEPS) * START)
                expected = PEAK * math.sqrt(batch / START) * (1 + math.cos(math.pi * phase)) / 2
            assert row.learning_rate == pytest.approx(expected, rel=1e-3), step
        checked += 1
    assert checked == len(rows)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_run_without_a_recorded_noise_scale_is_held_and_says_why(name: str) -> None:
    recording = imported(name)
    decisions = replay(specification(recording), recording.measurements)
    assert {decision.plan.global_batch_size for decision in decisions} == {START}
    assert {decision.reason for decision in decisions} == {"hold_no_reading"}
    assert any("no row holds a noise scale" in note for note in recording.notes)
    # The batch is the mean since the row before: 64 until warmup ends, more later.
    mean = {m.optimizer_step: m.global_batch_size for m in recording.measurements}
    assert {batch for step, batch in mean.items() if step <= WARMUP_STEPS} == {START}
    assert mean[8000] > 4 * START

"""The published runs' recorded batches, token counts and learning rates, reproduced from their averaged noise scale."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Span
from gns_controller.core.policies import NoiseScalePolicyConfig
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.core.measurements import measurement, reading

RECORDINGS = Path(__file__).parents[4] / "shared" / "reference" / "llama160m"
WARMUP_STEPS, BUDGET_STEPS, START, PEAK = 3662, 24414, 64, 3e-3

pytestmark = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recorded runs are not beside this checkout")


@pytest.mark.parametrize("name", [f"signsgd_l1_seed{seed}" for seed in range(1, 6)])
def test_the_published_rule_reproduces_every_recorded_row(name: str) -> None:
    with (RECORDINGS / f"{name}.csv").open() as file:
        rows = [
            (
                int(float(row["_step"])),
                int(float(row["n_tokens_seen"])),
                int(float(row["batch_size/global_batch_size"])),
                float(row["lr"]),
                float(row["adaptive_batch_metrics/gns_ema"]),
            )
            for row in csv.DictReader(file)
            if all(row.values())
        ]
    assert len(rows) > 50
    policy = NoiseScalePolicyConfig.published(noise_beta=0.0, signal_beta=0.0, warmup=Span(steps=WARMUP_STEPS + 1))
    rules = BatchRules(global_batch_size=START, micro_batch_size=16, micro_batch_granularity=4, decision_delay_steps=0)
    asked = RunSpecification(batch=rules, data_parallel_size=8, budget_samples=BUDGET_STEPS * START, policy=policy)
    # Already averaged, so smoothing is off. Every 10 steps the rule looks at the value that was refreshed at the end of
    # the last step divisible by 100.
    run, refreshed = [], {row[0]: row[4] for row in rows}
    value = rows[0][4]
    for step in range(1, rows[-1][0] + 1):
        if step % 10 == 0:
            run.append(measurement(step, reading(noise_scale=value), ranks=8, batch=START))
        if step % 100 == 0:
            value = refreshed.get(step, value)
    after = {d.optimizer_step: d.plan.global_batch_size for d in replay(asked, run)}

    batch, samples, checked = START, 0, 0
    recorded = {row[0]: row for row in rows}
    for step in range(1, rows[-1][0] + 1):
        before_samples = samples
        batch = after.get(step, batch)
        samples += batch
        if step not in recorded:
            continue
        _, tokens, recorded_batch, learning_rate, _ = recorded[step]
        assert (step, batch) == (step, recorded_batch)
        assert (step, samples * 2048) == (step, tokens)
        if step <= WARMUP_STEPS:
            expected = PEAK * step / WARMUP_STEPS
        else:
            phase = (before_samples - WARMUP_STEPS * START) / ((BUDGET_STEPS - WARMUP_STEPS) * START)
            expected = PEAK * math.sqrt(batch / START) * (1 + math.cos(math.pi * phase)) / 2
        assert learning_rate == pytest.approx(expected, rel=1e-3), step
        checked += 1
    assert checked == len(rows)

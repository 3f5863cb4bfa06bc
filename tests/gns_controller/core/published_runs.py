"""The recorded runs of the published method, through the importer, as its rule saw them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import NoiseScaleMeasurement, Span
from gns_controller.core.policies import HoldPolicyConfig, NoiseScalePolicyConfig
from gns_controller.core.runs import RunSpecification
from gns_controller.recordings import ImportDefaults, Recording, read_recording

FOLDER = Path(__file__).parents[4] / "shared" / "reference" / "llama160m"
WARMUP_STEPS, BUDGET_STEPS, START, PEAK, RANKS, TOKENS = 3662, 24414, 64, 3e-3, 8, 2048

MEASURED = tuple(f"signsgd_l1_seed{seed}" for seed in range(1, 6))
"""These hold batch, learning rate and averaged noise scale."""
CONSTANT = ("muon_b64", "signum_b64")
ADAPTIVE = ("muon_adaptive", "signum_adaptive")
"""These hold losses and tokens only: what their rule saw is not recorded."""
ALL = (*MEASURED, *CONSTANT, *ADAPTIVE)


class RecordedRow(NamedTuple):
    """One row as the csv module reads it; None where the file has no such column."""

    optimizer_step: int
    tokens_seen: int
    validation_loss: float
    global_batch_size: int | None
    learning_rate: float | None
    noise_scale: float | None


def rows_of(name: str) -> list[RecordedRow]:
    with (FOLDER / f"{name}.csv").open() as file:
        return [
            RecordedRow(
                int(float(row["_step"])),
                int(float(row["n_tokens_seen"])),
                float(row["validation_metrics/loss"]),
                int(float(row["batch_size/global_batch_size"])) if "batch_size/global_batch_size" in row else None,
                float(row["lr"]) if "lr" in row else None,
                float(row["adaptive_batch_metrics/gns_ema"]) if "adaptive_batch_metrics/gns_ema" in row else None,
            )
            for row in csv.DictReader(file)
        ]


def imported(name: str) -> Recording:
    defaults = ImportDefaults(geometry="sign", data_parallel_size=RANKS, tokens_per_sample=TOKENS)
    return read_recording(FOLDER / f"{name}.csv", defaults=defaults)


def as_the_rule_saw_it(recording: Recording) -> list[NoiseScaleMeasurement]:
    """One measurement at every step divisible by 10, with the noise scale of the last step before it divisible by 100.

    The rule looks every 10 steps at an average that is refreshed at the end of every hundredth.
    """
    rows = {m.optimizer_step: m for m in recording.measurements if m.readings}
    held = recording.measurements[0]
    seen = []
    for step in range(1, recording.measurements[-1].optimizer_step + 1):
        if step % 10 == 0:
            seen.append(held.model_copy(update={"optimizer_step": step}))
        if step % 100 == 0:
            held = rows.get(step, held)
    return seen


def specification(recording: Recording) -> RunSpecification:
    """The published rule where there was one: averages off where the recording is averaged already."""
    betas = {"noise_beta": 0.0, "signal_beta": 0.0} if recording.is_averaged else {}
    adaptive = NoiseScalePolicyConfig.published(warmup=Span(steps=WARMUP_STEPS + 1), **betas)
    rules = BatchRules(global_batch_size=START, micro_batch_size=16, micro_batch_granularity=4, decision_delay_steps=0)
    return RunSpecification(
        batch=rules,
        data_parallel_size=RANKS,
        budget_samples=BUDGET_STEPS * START,
        policy=HoldPolicyConfig() if recording.run_id in CONSTANT else adaptive,
    )

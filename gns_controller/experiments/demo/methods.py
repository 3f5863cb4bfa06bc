"""The five ways to choose a batch, as arguments of the example job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gns_controller.core.contract import Span
from gns_controller.core.policies import (
    AnyPolicyConfig,
    HoldPolicyConfig,
    NoiseScalePolicyConfig,
    Stage,
    StagesPolicyConfig,
)

START_BATCH = 16
LEARNING_RATES = {"muon": 0.016, "adamw": 0.008, "signum": 0.001}
"""Tuned at batch 16. Four times the batch takes twice the rate."""
PUBLISHED_THETA = 0.8
"""Calibrated on this job (docs/evidence/demo.md)."""
PUBLISHED_INTERVAL_STEPS = 25
SPLIT_INTERVAL_STEPS = 10
NUM_RAMP_STAGES = 16


@dataclass(frozen=True)
class Method:
    """One run of the demonstration."""

    name: str
    """In the run's name."""
    title: str
    """In tables and legends."""
    batch_size: int
    learning_rate: float
    policy: AnyPolicyConfig
    interval_steps: int = PUBLISHED_INTERVAL_STEPS
    num_sign_patterns: int = 1

    def arguments(self) -> list[str]:
        """For the example job."""
        return [
            *("--batch-size", str(self.batch_size)),
            *("--learning-rate", str(self.learning_rate)),
            *("--policy", json.dumps(self.policy.model_dump(mode="json"))),
            *("--measurement-interval-steps", str(self.interval_steps)),
            *("--min-sample-groups", "4"),
            *("--num-sign-patterns", str(self.num_sign_patterns)),
        ]


def closed_methods(optimizer: str, *, budget_samples: int) -> list[Method]:
    """The methods that need no other run's result, the baseline first."""
    rate = LEARNING_RATES[optimizer]
    warmup = Span(samples=int(0.15 * budget_samples))
    published = NoiseScalePolicyConfig.published(noise_tolerance=PUBLISHED_THETA, warmup=warmup)
    split = NoiseScalePolicyConfig.recommended(budget_samples=budget_samples)
    constant = HoldPolicyConfig()
    return [
        Method("constant", f"constant {START_BATCH}", START_BATCH, rate, constant),
        Method("constant4x", f"constant {4 * START_BATCH} (lr x2)", 4 * START_BATCH, 2 * rate, constant),
        Method("published", f"published rule (theta {PUBLISHED_THETA:g})", START_BATCH, rate, published),
        Method(
            "split",
            f"split rule (theta {split.noise_tolerance:g})",
            START_BATCH,
            rate,
            split,
            SPLIT_INTERVAL_STEPS,
            num_sign_patterns=3,
        ),
    ]


def open_loop_twin(optimizer: str, *, budget_samples: int, steps: int) -> Method:
    """A straight ramp, blind to measurements, that takes as many steps for the same samples: the same mean batch."""
    stages = ramp_stages(budget_samples=budget_samples, steps=steps)
    return Method(
        "openloop",
        "open-loop ramp",
        START_BATCH,
        LEARNING_RATES[optimizer],
        StagesPolicyConfig(stages=tuple(Stage(**stage) for stage in stages)),
    )


def ramp_stages(*, budget_samples: int, steps: int) -> list[dict[str, Any]]:
    """Stages of equal length from START_BATCH upwards, the last batch chosen by bisection to hit the step count."""

    def stages_up_to(last: float) -> list[dict[str, Any]]:
        return [
            {
                "from_samples": index * budget_samples // NUM_RAMP_STAGES,
                "global_batch_size": round(START_BATCH + (last - START_BATCH) * index / (NUM_RAMP_STAGES - 1)),
            }
            for index in range(NUM_RAMP_STAGES)
        ]

    low, high = float(START_BATCH), float(budget_samples)
    for _ in range(60):
        middle = (low + high) / 2
        needed = sum(budget_samples / NUM_RAMP_STAGES / stage["global_batch_size"] for stage in stages_up_to(middle))
        low, high = (middle, high) if needed > steps else (low, middle)
    return stages_up_to(high)

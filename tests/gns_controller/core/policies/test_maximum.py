"""A batch above the maximum: an operator lowered it, or the run began there."""

from __future__ import annotations

from typing import Any

import pytest

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, Override, Span
from gns_controller.core.policies import (
    AnyPolicyConfig,
    CriticalBatch,
    CriticalBatchTablePolicyConfig,
    GoodputPolicyConfig,
    GrowOncePolicyConfig,
    HoldPolicyConfig,
    InnerProductTestPolicyConfig,
    NoiseScalePolicyConfig,
    NormTestPolicyConfig,
    ProgressPolicyConfig,
    RunFacts,
    Stage,
    StagesPolicyConfig,
    decide,
    initial_state,
    plan_for,
)
from tests.gns_controller.core.measurements import measurement, reading

RULES = BatchRules(global_batch_size=16, micro_batch_size=8)
FACTS = RunFacts(RULES, 10**6)
ABOVE: dict[str, Any] = {"monotone": False, "maximum_batch_size": 40}
UNRESOLVED = reading(noise_scale=144.0, estimator="split", progress=-1.0)

WITHOUT_A_WISH: dict[str, AnyPolicyConfig] = {
    "hold": HoldPolicyConfig(**ABOVE),
    "stages": StagesPolicyConfig(stages=(Stage(from_samples=10**6, global_batch_size=16),), **ABOVE),
    "grow_once": GrowOncePolicyConfig(at_share=0.99, **ABOVE),
    "critical_batch_table": CriticalBatchTablePolicyConfig(
        table=(CriticalBatch(from_samples=0, critical_batch_size=64),), **ABOVE
    ),
    "noise_scale": NoiseScalePolicyConfig(**ABOVE),
    "goodput": GoodputPolicyConfig(**ABOVE),
    "progress": ProgressPolicyConfig(**ABOVE),
    "norm_test": NormTestPolicyConfig(**ABOVE),
    "inner_product_test": InnerProductTestPolicyConfig(**ABOVE),
}


def at_128(policy: AnyPolicyConfig, *, step: int = 100, override: Override | None = None, **fields: Any) -> Decision:
    """The decision about one report of 128 samples a step."""
    plan = plan_for(RULES, 128, data_parallel_size=2, version=1, effective_step=0)
    state = initial_state(RULES, data_parallel_size=2).model_copy(update={"plan": plan})
    readings = fields.pop("readings", (UNRESOLVED,))
    found = measurement(
        step, *readings, batch=128, micro_batch_size=8, gradient_accumulation_steps=8, plan_version=1, **fields
    )
    return decide(policy, state, found, facts=FACTS, override=override)[1]


@pytest.mark.parametrize("name", WITHOUT_A_WISH)
def test_a_policy_without_a_wish_comes_down_to_the_maximum(name: str) -> None:
    """Whole passes of 16: 32 is the largest up to 40."""
    found = at_128(WITHOUT_A_WISH[name])
    assert (found.plan.global_batch_size, found.reason) == (32, "capped_max")
    assert found.explanation.startswith("128 -> 32 samples: ")
    assert found.explanation.endswith(", but 128 is above the maximum of 40.")


@pytest.mark.parametrize("name", WITHOUT_A_WISH)
def test_a_batch_that_never_shrinks_stays_above_the_maximum(name: str) -> None:
    policy = WITHOUT_A_WISH[name].model_copy(update={"monotone": True})
    assert at_128(policy).plan.global_batch_size == 128


def test_a_report_without_readings_or_with_odd_ones_keeps_no_batch_above_the_maximum() -> None:
    policy = NoiseScalePolicyConfig(**ABOVE)
    assert at_128(policy, readings=()).plan.global_batch_size == 32
    odd = reading(noise_scale=1.0, estimator="split", signal=float("nan"))
    assert at_128(policy, readings=(odd,)).plan.global_batch_size == 32


def test_coming_down_waits_for_warmup_and_dwell_and_an_operator() -> None:
    for span in (Span(steps=101), Span(samples=1601)):
        for name, policy in WITHOUT_A_WISH.items():
            waits = policy.model_copy(update={"dwell": span})
            assert (at_128(waits).plan.global_batch_size, at_128(waits).reason) == (128, "hold_dwell"), name
            warms = policy.model_copy(update={"warmup": span})
            assert (at_128(warms).plan.global_batch_size, at_128(warms).reason) == (128, "warmup"), name
    policy = HoldPolicyConfig(**ABOVE, dwell=Span(steps=100), warmup=Span(steps=100))
    assert at_128(policy).plan.global_batch_size == 32
    assert at_128(policy, override=Override(kind="hold")).plan.global_batch_size == 128
    assert at_128(policy, override=Override(kind="pin", global_batch_size=256)).plan.global_batch_size == 256


def test_no_other_guard_keeps_a_batch_above_the_maximum() -> None:
    def wishing(noise_scale: float, **guards: Any) -> tuple[int, str]:
        policy = NoiseScalePolicyConfig.published(noise_tolerance=1.0, **{**ABOVE, **guards})
        found = at_128(policy, readings=(reading(noise_scale=noise_scale),))
        return found.plan.global_batch_size, found.reason

    assert wishing(1000) == (32, "capped_max")
    assert wishing(1000, decay="freeze") == (32, "capped_max")
    # A wish of 100 or 20 is not below 128 / 8: as if there were none.
    assert wishing(100, hysteresis=8.0) == (32, "capped_max")
    assert wishing(20, hysteresis=8.0) == (32, "capped_max")
    assert wishing(15.9, hysteresis=8.0) == (14, "shrink")
    assert wishing(1000, integer_factors=True) == (32, "capped_max")


def test_what_the_ranks_cannot_make_below_the_maximum_is_not_made() -> None:
    passes = RunFacts(BatchRules(global_batch_size=32, micro_batch_size=16, micro_batch_granularity=16), 10**6)
    state = initial_state(passes.rules, data_parallel_size=2)
    policy = HoldPolicyConfig(monotone=False, maximum_batch_size=31)
    held = decide(policy, state, measurement(100, batch=32), facts=passes)[1]
    assert (held.plan.global_batch_size, held.reason) == (32, "capped_max")

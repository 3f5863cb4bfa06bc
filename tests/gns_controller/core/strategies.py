"""Any policy behind any guards, and any sequence of reports: for properties that hold for all of them."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple, get_args

from hypothesis import strategies as st

from gns_controller.core.aggregation import Aggregation
from gns_controller.core.batch_arithmetic import BatchGrid, BatchRules
from gns_controller.core.contract import (
    BatchPlan,
    GroupReading,
    NoiseScaleMeasurement,
    ProgressPoint,
    Span,
)
from gns_controller.core.policies import (
    AnyPolicyConfig,
    CriticalBatchTablePolicyConfig,
    DecayToRampPolicyConfig,
    GoodputPolicyConfig,
    GrowOncePolicyConfig,
    HoldPolicyConfig,
    InnerProductTestPolicyConfig,
    LinearRampPolicyConfig,
    NoiseScalePolicyConfig,
    NormTestPolicyConfig,
    ProgressPolicyConfig,
    StagesPolicyConfig,
)
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.core.measurements import reading

BUDGET = 20_000
RANKS = (1, 2, 3, 4)

spans = st.builds(Span, steps=st.integers(1, 40)) | st.builds(Span, samples=st.integers(1, 3000))
guards = st.fixed_dictionaries(
    {},
    optional={
        "warmup": spans,
        "dwell": spans,
        "deadband": st.floats(0, 0.9),
        "monotone": st.booleans(),
        "hysteresis": st.floats(1, 4),
        "growth_cap": st.none() | st.floats(1.01, 20),
        "samples_per_doubling": st.integers(10, 20_000),
        "integer_factors": st.booleans(),
        "min_steps_left": st.integers(1, 100),
        "minimum_batch_size": st.integers(1, 40),
        "maximum_batch_size": st.integers(40, 1000),
        "decay": st.sampled_from(["follow", "discount", "freeze"]),
        "decay_below": st.floats(0.1, 1),
    },
)
averages = st.fixed_dictionaries(
    {},
    optional={
        "estimator": st.sampled_from(["split", "rank_variance"]),
        "geometry": st.sampled_from(["euclidean", "spectral"]) | st.none(),
        "aggregation": st.sampled_from(get_args(Aggregation)),
        "averaging": st.sampled_from(["exponential", "growing"]),
        "noise_beta": st.floats(0, 0.99),
        "signal_beta": st.floats(0, 0.99),
        "correct_few_groups": st.booleans(),
    },
)
starts = st.lists(st.integers(0, BUDGET), min_size=1, max_size=4, unique=True).map(sorted)
sizes = st.integers(1, 2000)


def _listed(key: str, size_key: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(starts, st.lists(sizes, min_size=4, max_size=4)).map(
        lambda found: {key: [{"from_samples": s, size_key: b} for s, b in zip(*found, strict=False)]}
    )


ROOMS: dict[type[Any], st.SearchStrategy[dict[str, Any]]] = {
    HoldPolicyConfig: st.just({}),
    StagesPolicyConfig: _listed("stages", "global_batch_size"),
    LinearRampPolicyConfig: st.fixed_dictionaries(
        {"global_batch_size": sizes, "ramp_samples": st.integers(1, BUDGET)},
    ),
    GrowOncePolicyConfig: st.fixed_dictionaries({"at_share": st.floats(0, 0.9), "factor": st.floats(1.1, 30)}),
    DecayToRampPolicyConfig: st.fixed_dictionaries(
        {"alpha": st.none() | st.floats(1.05, 4), "up_to_noise_scale": st.booleans()}
    ),
    CriticalBatchTablePolicyConfig: st.tuples(
        _listed("table", "critical_batch_size"), st.floats(1.05, 4).map(lambda multiple: {"multiple": multiple})
    ).map(lambda parts: parts[0] | parts[1]),
    NoiseScalePolicyConfig: st.fixed_dictionaries(
        {
            "noise_tolerance": st.floats(0.05, 4),
            "bound": st.sampled_from(["estimate", "low"]),
            "act_on_unresolved": st.booleans(),
        }
    ),
    ProgressPolicyConfig: st.fixed_dictionaries({"least_elasticity": st.floats(0, 0.5), "factor": st.floats(1.1, 4)}),
    NormTestPolicyConfig: st.fixed_dictionaries({"theta": st.floats(0.05, 2)}),
    InnerProductTestPolicyConfig: st.fixed_dictionaries({"theta": st.floats(0.05, 2), "nu": st.floats(0.05, 10)}),
    GoodputPolicyConfig: st.fixed_dictionaries(
        {
            "sample_price_seconds": st.sampled_from([0.0, 1e-3, 1.0]),
            "step_overhead_samples": st.none() | st.floats(1, 1e4),
            "explore_factor": st.none() | st.floats(1.1, 4),
            "min_improvement": st.floats(0, 0.2),
        }
    ),
}
"""Each policy's own fields."""

_FIXED: dict[type[Any], set[str]] = {
    ProgressPolicyConfig: {"estimator"},
    InnerProductTestPolicyConfig: {"estimator", "aggregation"},
}


@st.composite
def runs(draw: st.DrawFn, policies: tuple[type[Any], ...] = tuple(ROOMS)) -> RunSpecification:
    """A run that some policy can steer, behind some guards."""
    kind = draw(st.sampled_from(policies))
    shared = {name: value for name, value in draw(averages).items() if name not in _FIXED.get(kind, set())}
    guarding = draw(guards) | ({"decay": "follow"} if kind is DecayToRampPolicyConfig else {})
    policy: AnyPolicyConfig = kind(**draw(ROOMS[kind]), **shared, **guarding)
    ranks, micro = draw(st.sampled_from(RANKS)), draw(st.integers(1, 12))
    granularity = draw(st.integers(1, 4))
    trades = isinstance(policy, DecayToRampPolicyConfig)
    couplings = ["sqrt", "seesaw"] if trades else ["sqrt", "linear", "none", "adamscale"]
    if not trades and policy.geometry == "euclidean":
        couplings.append("adascale")
    grid = BatchGrid(micro_batch_size=micro, data_parallel_size=ranks, micro_batch_granularity=granularity)
    start = grid.floor(draw(st.integers(1, 120)))
    rules = BatchRules(
        global_batch_size=start,
        micro_batch_size=micro,
        micro_batch_granularity=granularity,
        learning_rate_coupling=draw(st.sampled_from(couplings)),
        optimizer_couplings={"AdamW": "sqrt"} if trades else {"AdamW": "adamscale", "SGD": "linear"},
        beta_coupling=draw(st.sampled_from(["none", "half_life"])),
        decision_delay_steps=draw(st.integers(0, 3)),
        plan_interval_steps=draw(st.sampled_from([1, 1, 7])),
    )
    return RunSpecification(batch=rules, data_parallel_size=ranks, budget_samples=BUDGET, policy=policy)


ODD = (math.nan, math.inf, -math.inf, 0.0, 1e200, 1e-200, 5e-324, -1.0)
CURVES = ((8.0, 16.0), (8.0, 8.0), (4.0, math.inf), ())


def _split(rng: random.Random, odd: float) -> GroupReading:
    def number(usual: float) -> float:
        return rng.choice(ODD) if rng.random() < odd else usual

    sizes = rng.choice(CURVES) if rng.random() < odd else (4.0, 8.0)
    signal = number(rng.uniform(0.9, 1.1))
    return reading(
        noise_scale=1,
        estimator="split",
        geometry=rng.choice(["euclidean", "spectral"]) if rng.random() < odd else "spectral",
        noise=number(rng.uniform(4, 20)),
        signal=signal,
        progress=number(rng.uniform(0.8, 1.2)),
        progress_curve=tuple(
            ProgressPoint(samples=size, progress=number(rng.uniform(0.95, 1.05) * size**0.4)) for size in sizes
        ),
        learning_rate=rng.choice([0.01, 0.0]) if rng.random() < odd else 0.02,
    )


def _rank_variance(rng: random.Random, odd: float) -> GroupReading:
    def number(usual: float) -> float:
        return rng.choice(ODD) if rng.random() < odd else usual

    euclidean = rng.random() < 0.8
    return reading(
        noise_scale=1,
        geometry="euclidean" if euclidean else rng.choice(["sign", "spectral"]),
        noise=number(rng.uniform(1, 20)),
        signal=number(rng.uniform(0.9, 1.1)),
        ceiling=rng.choice([None, 1e6, 50.0, 0.0, math.nan, math.inf]) if rng.random() < odd else 1e4,
        inner_product_variance=max(0.0, number(rng.uniform(1, 400))) if euclidean else None,
        num_groups=rng.randint(2, 8),
    )


def _readings(seed: int, odd: float) -> tuple[GroupReading, ...]:
    rng = random.Random(seed)
    if rng.random() < odd:
        return ()
    split = [_split(rng, odd) for _ in range(1 if rng.random() < 0.7 else 2)]
    return (*split, _rank_variance(rng, odd))


class Report(NamedTuple):
    """What happens between two measurements; the batch follows from the plans."""

    steps: int
    ranks: int
    obeys: bool
    """Whether the trainer has taken the plan that should be in force."""
    schedule_factor: float
    step_seconds: float | None
    readings: tuple[GroupReading, ...]


def _reports(odd: float) -> st.SearchStrategy[Report]:
    return st.builds(
        Report,
        steps=st.integers(1, 12),
        ranks=st.sampled_from((None, None, None, None, None, None, *RANKS)),
        obeys=st.sampled_from([True, True, True, True, True, False]),
        schedule_factor=st.sampled_from([1.0, 1.0, 1.0, 0.8, 0.5, 0.3, 0.0] + [math.nan, math.inf, 1e-320] * bool(odd)),
        step_seconds=st.none() | st.floats(0.1, 5) | st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-320, 1e300]),
        # Numbers from a seed: drawn one by one they cost more than the policies.
        readings=st.integers(0, 2**32).map(lambda seed: _readings(seed, odd)),
    )


sequences = st.sampled_from([0.0, 0.02, 0.3]).flatmap(lambda odd: st.lists(_reports(odd), min_size=6, max_size=16))
"""Sound readings, readings of which some number is odd now and then, or mostly odd ones."""


class Trainer:
    """Reports what it does: obeys plans from their step on, or not, and cuts its batch for the ranks it has."""

    def __init__(self, run: RunSpecification) -> None:
        self._rules = run.batch
        self._ranks = run.data_parallel_size
        self._batch = run.batch.global_batch_size
        self._step = 0
        self._samples = 0

    def next_report(self, report: Report, plan: BatchPlan, *, run_id: str = "run") -> NoiseScaleMeasurement:
        """The next measurement, `plan` being the newest."""
        if report.ranks is not None:
            self._ranks = report.ranks
        begins = max(plan.effective_step - self._step, 0)
        if report.obeys and begins < report.steps:
            self._samples += begins * self._batch
            self._batch = plan.global_batch_size
        else:
            begins = 0
        grid = self._rules.grid(data_parallel_size=self._ranks)
        self._batch = grid.floor(self._batch)
        self._step += report.steps
        self._samples += (report.steps - begins) * self._batch
        shape = grid.factor(self._batch)
        return NoiseScaleMeasurement(
            run_id=run_id,
            attempt=0,
            optimizer_step=self._step,
            samples_seen=self._samples,
            plan_version=plan.version,
            global_batch_size=shape.global_batch_size,
            micro_batch_size=shape.micro_batch_size,
            gradient_accumulation_steps=shape.gradient_accumulation_steps,
            data_parallel_size=self._ranks,
            schedule_factor=report.schedule_factor,
            step_seconds=report.step_seconds,
            readings=report.readings,
        )

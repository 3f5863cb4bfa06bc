"""Every ramp against the frontier of constant batches: validation loss over optimizer steps at equal samples.

python -m tests.benchmarks.policies [--json] [--plot PNG] [--seeds 0,1,2] [--optimizers muon,signum] [--output DIR]

Both sides are the example job in one process, on the same samples in the same order, with the same seeds of weights.
Constants have a learning rate of their own, tuned on other seeds (--tune shows the sweep); ramps start with the tuned
rate of the batch they start from. The frontier of a seed is the line through its constants over the log of the steps;

    distance below = frontier(steps of the ramp) - loss of the ramp        nats, positive: better than any constant

is paired by seed. Its standard error is over seeds. Runs are kept in --output and not repeated; their names hold a
digest of all settings and of the sources.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gns_controller.core.contract import Span
from gns_controller.core.policies import (
    AnyPolicyConfig,
    GoodputPolicyConfig,
    GrowOncePolicyConfig,
    HoldPolicyConfig,
    LinearRampPolicyConfig,
    NoiseScalePolicyConfig,
    ProgressPolicyConfig,
    Stage,
    StagesPolicyConfig,
)
from tests.benchmarks.report import ROOT, environment, show

BUDGET = 48_000
VALIDATION_SAMPLES = 4096
INTERVAL_SAMPLES = 320
"""Between two measurements."""
PATTERNS = 3
TUNING_SEEDS, REPORTED_SEEDS = (100,), (0, 1, 2)
KNEE_TOLERANCE = 0.01
"""Nats. The knee is the largest constant batch within this of the best."""
NUM_TWIN_STAGES = 16


class Setting(NamedTuple):
    """What was tuned on TUNING_SEEDS."""

    momentum: float
    learning_rates: dict[int, float]
    """Of constant batches."""
    base: int
    """Where ramps start: the x1 of the table."""


SETTINGS = {
    "muon": Setting(0.9, {8: 0.016, 16: 0.0226, 32: 0.045, 64: 0.045, 128: 0.09, 256: 0.064}, 32),
    "signum": Setting(0.8, {8: 0.0028, 16: 0.0056, 32: 0.008, 64: 0.008, 128: 0.0056, 256: 0.008}, 32),
}
TUNED_OVER = {
    "muon": {
        8: (0.0113, 0.016),
        16: (0.016, 0.0226, 0.032),
        32: (0.0226, 0.032, 0.045),
        64: (0.032, 0.045, 0.064),
        128: (0.045, 0.064, 0.09),
        256: (0.064, 0.09),
    },
    "signum": {
        8: (0.0014, 0.002, 0.0028, 0.004),
        16: (0.002, 0.0028, 0.004, 0.0056, 0.008),
        32: (0.0028, 0.004, 0.0056, 0.008),
        64: (0.004, 0.0056, 0.008),
        128: (0.004, 0.0056, 0.008),
        256: (0.004, 0.0056, 0.008),
    },
}


def samples(share: float) -> Span:
    """A span of this share of the budget."""
    return Span(samples=max(int(share * BUDGET), 1))


DEFAULT = NoiseScalePolicyConfig.recommended(budget_samples=BUDGET)
"""What `attach` does unless told otherwise; `no_sweep_regret_nats` is of this one."""


def adaptive(base: int) -> dict[str, AnyPolicyConfig]:
    """Ramps that follow what is measured."""
    return {
        "published": NoiseScalePolicyConfig.published(noise_tolerance=0.8, warmup=samples(0.15)),
        "split": DEFAULT,
        "split, theta 2": DEFAULT.model_copy(update={"noise_tolerance": 2.0}),
        "split, theta 1": DEFAULT.model_copy(update={"noise_tolerance": 1.0}),
        "progress": ProgressPolicyConfig(
            averaging="growing",
            signal_beta=0.93,
            warmup=samples(1 / 20),
            dwell=samples(1 / 6),
            decay="freeze",
        ),
        "goodput": GoodputPolicyConfig(
            step_overhead_samples=float(base),
            averaging="growing",
            noise_beta=0.93,
            signal_beta=0.93,
            warmup=samples(1 / 20),
            dwell=samples(1 / 48),
            growth_cap=2.0,
            decay="freeze",
        ),
    }


def open_loop(base: int) -> dict[str, AnyPolicyConfig]:
    """Ramps that are stated beforehand."""
    return {
        "linear ramp": LinearRampPolicyConfig(global_batch_size=4 * base, ramp_samples=BUDGET),
        "grow once": GrowOncePolicyConfig(at_share=0.4, factor=4.0),
    }


CONSTANT = HoldPolicyConfig()


@dataclass(frozen=True)
class Run:
    """One training run."""

    optimizer: str
    method: str
    seed: int
    batch_size: int
    learning_rate: float
    policy: AnyPolicyConfig = CONSTANT

    def arguments(self) -> list[str]:
        """Of the example job. A constant measures nothing."""
        interval = BUDGET * 1000 if isinstance(self.policy, HoldPolicyConfig) else INTERVAL_SAMPLES
        return [
            *("--optimizer", self.optimizer, "--momentum", str(SETTINGS[self.optimizer].momentum)),
            *("--batch-size", str(self.batch_size), "--learning-rate", str(self.learning_rate)),
            *("--policy", self.policy.model_dump_json(), "--seed", str(self.seed)),
            *("--budget-samples", str(BUDGET), "--validation-samples", str(VALIDATION_SAMPLES), "--evaluations", "4"),
            *("--measurement-interval-samples", str(interval), "--num-sign-patterns", str(PATTERNS)),
            *("--min-sample-groups", "4", "--micro-batch-size", "64", "--num-threads", "1"),
        ]


class Outcome(NamedTuple):
    """How it ended."""

    run: Run
    loss: float
    steps: int
    samples: int
    seconds: float
    last_batch: int


class Runner:
    """Runs jobs, some at a time, and keeps what they wrote."""

    def __init__(self, folder: Path, *, workers: int) -> None:
        self.folder, self.workers = folder, workers
        folder.mkdir(parents=True, exist_ok=True)
        parts = [
            path for package in ("gns_controller/core", "trainer_hooks") for path in (ROOT / package).rglob("*.py")
        ]
        self._sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(parts))).hexdigest()

    def __call__(self, runs: Sequence[Run]) -> list[Outcome]:
        """All of them, in order; finished ones are read."""
        done: dict[Run, Outcome] = {}
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            jobs = {pool.submit(self._one, run): run for run in dict.fromkeys(runs)}
            for finished in concurrent.futures.as_completed(jobs):
                outcome = done[jobs[finished]] = finished.result()
                run = outcome.run
                print(
                    f"[{len(done)}/{len(jobs)}] {run.optimizer} {run.method} from {run.batch_size} seed {run.seed}: "
                    f"loss {outcome.loss:.4f} in {outcome.steps} steps",
                    file=sys.stderr,
                    flush=True,
                )
        return [done[run] for run in runs]

    def _one(self, run: Run) -> Outcome:
        arguments = run.arguments()
        digest = hashlib.sha256(json.dumps([arguments, self._sources, platform.python_version()]).encode()).hexdigest()
        path = self.folder / f"{run.optimizer}-{run.batch_size}-{run.seed}-{digest[:16]}.jsonl"
        if not path.exists():
            part = path.with_suffix(".part")
            command = [sys.executable, "-m", "trainer_hooks.examples.train_lm", *arguments, "--output", str(part)]
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stderr[-2000:]}")
            part.rename(path)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        evaluations = [line for line in lines if line["kind"] == "evaluation"]
        end = lines[-1]
        return Outcome(
            run,
            evaluations[-1]["validation_loss"],
            end["optimizer_steps"],
            end["samples"],
            end["training_seconds"],
            evaluations[-1]["global_batch_size"],
        )


def constant(optimizer: str, batch_size: int, seed: int, learning_rate: float | None = None) -> Run:
    """A constant batch with its tuned rate, or another."""
    rate = learning_rate or rate_at(optimizer, batch_size)
    return Run(optimizer, f"constant {batch_size}", seed, batch_size, rate)


def rate_at(optimizer: str, batch_size: int) -> float:
    """The tuned rate; below the smallest tuned batch, by the square root from there."""
    rates = SETTINGS[optimizer].learning_rates
    smallest = min(rates)
    return rates[batch_size] if batch_size >= smallest else rates[smallest] * math.sqrt(batch_size / smallest)


def twin_of(outcome: Outcome) -> Run:
    """A straight ramp, blind to measurements, with as many steps: the same mean batch."""
    run = outcome.run

    def stages(last: float) -> list[Stage]:
        return [
            Stage(
                from_samples=index * BUDGET // NUM_TWIN_STAGES,
                global_batch_size=max(
                    round(run.batch_size + (last - run.batch_size) * index / (NUM_TWIN_STAGES - 1)), 1
                ),
            )
            for index in range(NUM_TWIN_STAGES)
        ]

    low, high = float(run.batch_size), float(BUDGET)
    for _ in range(60):
        middle = (low + high) / 2
        steps = sum(BUDGET / NUM_TWIN_STAGES / (stage.global_batch_size or 1) for stage in stages(middle))
        low, high = (middle, high) if steps > outcome.steps else (low, middle)
    policy = StagesPolicyConfig(stages=tuple(stages(high)))
    return Run(run.optimizer, f"open-loop twin of {run.method}", run.seed, run.batch_size, run.learning_rate, policy)


Frontier = Callable[[float], float | None]


def frontier_of(constants: Sequence[Outcome]) -> Frontier:
    """Loss of the constants over log2(steps), linear between neighbours; None outside."""
    points = sorted((math.log2(outcome.steps), outcome.loss) for outcome in constants)

    def at(steps: float) -> float | None:
        position = math.log2(steps)
        for (left, first), (right, second) in pairwise(points):
            if left <= position <= right:
                return first + (second - first) * (position - left) / (right - left)
        return None

    return at


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds; infinite with one."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), spread


def row_of(outcomes: Sequence[Outcome], frontiers: dict[int, Frontier], *, kind: str) -> dict[str, Any]:
    """One method from one start, over all seeds."""
    run = outcomes[0].run
    below = [
        level - outcome.loss
        for outcome in outcomes
        if kind != "constant" and (level := frontiers[outcome.run.seed](outcome.steps)) is not None
    ]
    loss, loss_error = mean_and_error([outcome.loss for outcome in outcomes])
    inside = len(below) == len(outcomes)
    distance, distance_error = mean_and_error(below) if inside else (None, None)
    steps = statistics.fmean(outcome.steps for outcome in outcomes)
    return {
        "optimizer": run.optimizer,
        "kind": kind,
        "method": run.method,
        "start": run.batch_size,
        "learning_rate": run.learning_rate,
        "validation_loss": loss,
        "standard_error": loss_error,
        "optimizer_steps": steps,
        "below_frontier": distance,
        "below_frontier_standard_error": distance_error,
        "below_frontier_by_seed": [round(value, 4) for value in below],
        "steps_saved_percent": 100 * (1 - steps / math.ceil(BUDGET / run.batch_size)),
        "samples": statistics.fmean(outcome.samples for outcome in outcomes),
        "seconds": statistics.median(outcome.seconds for outcome in outcomes),
        "last_batch": statistics.fmean(outcome.last_batch for outcome in outcomes),
    }


def measure(optimizer: str, seeds: Sequence[int], run: Runner) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All methods with one optimizer: rows, and the summary's figures."""
    setting = SETTINGS[optimizer]
    base = setting.base

    def by_method(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], list[Outcome]]:
        found: dict[tuple[str, int], list[Outcome]] = {}
        for outcome in outcomes:
            found.setdefault((outcome.run.method, outcome.run.batch_size), []).append(outcome)
        return found

    constants = run([constant(optimizer, batch, seed) for batch in setting.learning_rates for seed in seeds])
    frontiers = {seed: frontier_of([one for one in constants if one.run.seed == seed]) for seed in seeds}
    rows = [row_of(group, frontiers, kind="constant") for group in by_method(constants).values()]
    best = min(row["validation_loss"] for row in rows)
    knee = max(row["start"] for row in rows if row["validation_loss"] <= best + KNEE_TOLERANCE)

    def started(policies: dict[str, AnyPolicyConfig], start: int) -> list[Run]:
        rate = rate_at(optimizer, start)
        return [Run(optimizer, name, seed, start, rate, policy) for name, policy in policies.items() for seed in seeds]

    starts = [max(knee // part, 2) for part in (8, 4, 2)]
    following = run(started(adaptive(base), base))
    untuned = run([job for start in starts for job in started({"default, untuned": DEFAULT}, start)])
    blind = run(started(open_loop(base), base) + [twin_of(one) for one in following if one.run.method == "split"])
    for kind, outcomes in (("adaptive", following), ("no sweep", untuned), ("open loop", blind)):
        rows += [row_of(group, frontiers, kind=kind) for group in by_method(outcomes).values()]

    known = [row for row in rows if row["kind"] == "adaptive" and row["below_frontier"] is not None]
    winner = max(known, key=lambda row: row["below_frontier"])
    published = next(row for row in rows if row["method"] == "published")
    twin = next(row for row in rows if row["method"].startswith("open-loop twin"))
    no_sweep = [row for row in rows if row["kind"] == "no sweep"]
    regrets = [math.inf if row["below_frontier"] is None else -row["below_frontier"] for row in no_sweep]
    summary = {
        "knee": knee,
        "best_adaptive_policy": winner["method"],
        "best_adaptive_below_constant_frontier_nats": winner["below_frontier"],
        "best_adaptive_standard_error": winner["below_frontier_standard_error"],
        "best_adaptive_steps_saved_percent": winner["steps_saved_percent"],
        "published_steps_saved_percent": published["steps_saved_percent"],
        "published_below_constant_frontier_nats": published["below_frontier"],
        "open_loop_below_constant_frontier_nats": twin["below_frontier"],
        "no_sweep_regret_nats": max(regrets),
        "no_sweep_most_steps_over_knee": max(row["optimizer_steps"] for row in no_sweep) / (BUDGET / knee),
    }
    return rows, summary


def tune(optimizer: str, run: Runner) -> list[dict[str, Any]]:
    """The sweep behind SETTINGS: loss of each constant at each rate, on the tuning seeds."""
    runs = [
        constant(optimizer, batch, seed, rate)
        for batch, rates in TUNED_OVER[optimizer].items()
        for rate in rates
        for seed in TUNING_SEEDS
    ]
    return [
        {
            "optimizer": optimizer,
            "batch": one.run.batch_size,
            "learning_rate": one.run.learning_rate,
            "seed": one.run.seed,
            "validation_loss": one.loss,
            "optimizer_steps": one.steps,
        }
        for one in run(runs)
    ]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over steps: the frontier, and every ramp beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, axes = pyplot.subplots(1, len(optimizers), figsize=(6.6 * len(optimizers), 5.2), squeeze=False)
    markers = {"adaptive": "o", "open loop": "s", "no sweep": "^"}
    names = list(dict.fromkeys((row["kind"], row["method"]) for row in rows if row["kind"] != "constant"))
    colours = {name: pyplot.get_cmap("tab10")(index % 10) for index, name in enumerate(names)}
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        mine = [row for row in rows if row["optimizer"] == optimizer]
        constants = sorted((row for row in mine if row["kind"] == "constant"), key=lambda row: row["optimizer_steps"])
        steps = [row["optimizer_steps"] for row in constants]
        losses = [row["validation_loss"] for row in constants]
        axis.plot(steps, losses, "-", color="0.45", linewidth=1.5, label="constants", zorder=1)
        errors = [row["standard_error"] for row in constants]
        axis.errorbar(steps, losses, yerr=errors, fmt=".", color="0.45", capsize=2, zorder=1)
        for row in constants:
            place = (row["optimizer_steps"], row["validation_loss"])
            axis.annotate(f"{row['start']}", place, (0, -13), textcoords="offset points", ha="center", color="0.4")
        for row in mine:
            if row["kind"] != "constant":
                axis.errorbar(
                    row["optimizer_steps"],
                    row["validation_loss"],
                    yerr=row["standard_error"],
                    fmt=markers[row["kind"]],
                    color=colours[row["kind"], row["method"]],
                    capsize=2,
                    markersize=6,
                    label=f"{row['method']}, from {row['start']}",
                )
        axis.set_xscale("log")
        axis.set_xticks(steps)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        top = max(row["validation_loss"] for row in mine if row["start"] <= 128 or row["kind"] != "constant")
        lowest = min(row["validation_loss"] - row["standard_error"] for row in mine)
        axis.set_ylim(lowest - 0.005, top + 0.01)
        axis.set_xlabel(f"optimizer steps for {BUDGET} samples")
        axis.set_ylabel("validation loss, nats per byte")
        axis.set_title(f"{optimizer}: mean and standard error over seeds", loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, help="write the frontier here")
    parser.add_argument(
        "--seeds", default=",".join(map(str, REPORTED_SEEDS)), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--optimizers", default="muon,signum", help="comma-separated (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(".benchmarks/policies"), help="where runs are kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: all cores)")
    parser.add_argument(
        "--tune", action="store_true", help="show the sweep of learning rates on the tuning seeds instead"
    )
    options = parser.parse_args()
    run = Runner(options.output, workers=options.workers)
    optimizers = options.optimizers.split(",")
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    if options.tune:
        rows = [row for optimizer in optimizers for row in tune(optimizer, run)]
    else:
        for optimizer in optimizers:
            found, figures = measure(optimizer, [int(seed) for seed in options.seeds.split(",")], run)
            rows += found
            first = optimizer == optimizers[0]
            summary |= {name if first else f"{optimizer}_{name}": value for name, value in figures.items()}
        if options.plot:
            plot(rows, options.plot)
    more = {
        "budget_samples": BUDGET,
        "seeds": options.seeds,
        "tuning_seeds": list(TUNING_SEEDS),
        "first": optimizers[0],
    }
    show({"environment": environment(**more), "rows": rows, "summary": summary}, as_json=options.json)


if __name__ == "__main__":
    main()

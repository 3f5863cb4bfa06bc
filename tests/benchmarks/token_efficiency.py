"""What each optimizer makes of the same samples: validation loss, and steps to AdamW's best.

python -m tests.benchmarks.token_efficiency [--json] [--plot PNG] [--seeds 0,1,2] [--output DIR] [--processes 1]

A small Llama-style model on the standard library's source text, one process, constant batch, the same samples in the
same order for every optimizer of a seed. The optimizer under test has the blocks' matrices; embedding, head and norms
have AdamW at FALLBACK_RATE (Signum and AdamW have everything). Learning rates lie on one grid for all and are tuned on
seed 100 by walking along it until both neighbours are worse; reported seeds are others. SNOO is tuned by itself, with
its own settings fixed beforehand. Runs are kept in --output and not repeated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import trainer_hooks
from tests.benchmarks.report import environment, show
from trainer_hooks.data.lr_schedule import warmup_cosine
from trainer_hooks.examples.corpus import ByteSequences, read_standard_library
from trainer_hooks.examples.llama import Llama, LlamaConfig, next_token_loss
from trainer_hooks.optim import ASGO, SNOO, SOAP, AdamW, EShampoo, Muon, Shampoo, Signum

BUDGET = 32_000
BATCH = 32
EVALUATIONS = 12
VALIDATION_SAMPLES = 2048
FALLBACK_RATE = 0.008
TUNING_SEED, REPORTED_SEEDS = 100, (0, 1, 2)
GRID = tuple(0.001 * 2**power for power in range(8))
OUTER = {"interval": 20, "lr": 0.8, "momentum": 0.75}
"""Of SNOO: the paper's outer rate and momentum, an interval within its good range."""

Build = Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]


class Method(NamedTuple):
    """An optimizer, and where on the grid its tuning starts."""

    build: Build
    first_guess: float
    takes_everything: bool = False


METHODS: dict[str, Method] = {
    "Signum": Method(lambda p, lr: Signum(p, lr=lr, momentum=0.9), 0.004, takes_everything=True),
    "AdamW": Method(lambda p, lr: AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=0.0), 0.008, takes_everything=True),
    "Muon": Method(lambda p, lr: Muon(p, lr=lr, dtype=None), 0.032),
    "Shampoo": Method(lambda p, lr: Shampoo(p, lr=lr, precondition_frequency=10), 0.008),
    "EShampoo": Method(lambda p, lr: EShampoo(p, lr=lr, precondition_frequency=10), 0.008),
    "SOAP": Method(lambda p, lr: SOAP(p, lr=lr, precondition_frequency=10), 0.008),
    "ASGO": Method(lambda p, lr: ASGO(p, lr=lr), 0.032),
}


class Run(NamedTuple):
    """One training run."""

    method: str
    outer: bool
    learning_rate: float
    seed: int

    @property
    def label(self) -> str:
        """Name of the method, with its outer optimizer."""
        return f"{self.method} + SNOO" if self.outer else self.method


def optimizers_of(run: Run, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The method's, and AdamW for the rest."""
    method = METHODS[run.method]
    named = list(model.named_parameters())
    hidden = [p for name, p in named if method.takes_everything or (p.ndim == 2 and "blocks." in name)]
    others = [p for name, p in named if not (method.takes_everything or (p.ndim == 2 and "blocks." in name))]
    found = [method.build(hidden, run.learning_rate)]
    if others:
        found.append(AdamW(others, lr=FALLBACK_RATE, betas=(0.9, 0.95), weight_decay=0.0))
    return [SNOO(optimizer, **OUTER) for optimizer in found] if run.outer else found


def train(run: Run) -> dict[str, Any]:
    """Losses at evenly spaced steps, and seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    config = LlamaConfig()
    model = Llama(config)
    corpus = read_standard_library()
    sequences = ByteSequences(corpus.train, context=config.context)
    held_out = ByteSequences(corpus.validation, context=config.context)
    chosen = torch.linspace(0, len(held_out) - 1, VALIDATION_SAMPLES).long().tolist()
    validation = held_out.__getitems__(chosen)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(run.seed)).tolist()
    optimizers = optimizers_of(run, model)
    bases = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    schedule = warmup_cosine(budget_samples=BUDGET, warmup_samples=BUDGET * 3 // 20)
    num_steps = BUDGET // BATCH
    losses: list[tuple[int, float]] = []
    begin = time.perf_counter()
    for step in range(num_steps):
        for optimizer, rates in zip(optimizers, bases, strict=True):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * schedule(step * BATCH)
        loss = next_token_loss(model, sequences.__getitems__(order[BATCH * step : BATCH * (step + 1)]))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) * EVALUATIONS % num_steps < EVALUATIONS:
            losses.append((step + 1, evaluate(model, optimizers, validation)))
    return {**run._asdict(), "losses": losses, "seconds": time.perf_counter() - begin}


def evaluate(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], validation: Tensor) -> float:
    """Mean loss per byte, at slow weights where there are any."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        for optimizer in optimizers:
            if isinstance(optimizer, SNOO):
                stack.enter_context(optimizer.slow_weights())
        return float(torch.stack([next_token_loss(model, part) for part in validation.split(256)]).mean())


def sources() -> str:
    """Digest of what a run depends on besides its settings."""
    digest = hashlib.sha256()
    package = Path(trainer_hooks.__file__).parent
    rooms = ("optim", "kernels", "data", "examples")
    for path in [Path(__file__), *(found for room in rooms for found in sorted((package / room).rglob("*.py")))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Runner:
    """Trains what is not on disk yet."""

    def __init__(self, directory: Path, processes: int) -> None:
        self.directory, self.sources = directory, sources()
        self.pool = concurrent.futures.ProcessPoolExecutor(processes)
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Results, in order."""
        return [future.result() for future in [self.start(run) for run in runs]]

    def start(self, run: Run) -> concurrent.futures.Future[dict[str, Any]]:
        """In the background."""
        name = f"{run.label}-{run.learning_rate:g}-{run.seed}-{self.sources}.json".replace(" ", "")
        return self.pool.submit(kept, run, self.directory / name)


def kept(run: Run, path: Path) -> dict[str, Any]:
    """From disk, or trained now."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    result = train(run)
    path.write_text(json.dumps(result))
    print(f"{run.label:18} lr={run.learning_rate:<6g} seed={run.seed}  {result['losses'][-1][1]:.4f}", file=sys.stderr)
    return result


def tuned(method: str, outer: bool, runner: Runner) -> tuple[float, list[dict[str, Any]]]:
    """The best rate of the grid on the tuning seed, reached by walking downhill, and all runs on the way."""
    guess = METHODS[method].first_guess / (2 if outer else 1)
    position = min(range(len(GRID)), key=lambda index: abs(GRID[index] - guess))
    done: dict[int, dict[str, Any]] = {}
    while True:
        wanted = [index for index in (position - 1, position, position + 1) if 0 <= index < len(GRID)]
        fresh = [index for index in wanted if index not in done]
        results = runner([Run(method, outer, GRID[index], TUNING_SEED) for index in fresh])
        done.update(zip(fresh, results, strict=True))
        best = min(wanted, key=lambda index: final(done[index]))
        if best == position:
            return GRID[position], [done[index] for index in sorted(done)]
        position = best


def final(result: dict[str, Any]) -> float:
    """Validation loss at the end; infinite if training blew up."""
    loss = float(result["losses"][-1][1])
    return loss if loss == loss else float("inf")


def steps_to(result: dict[str, Any], target: float) -> float | None:
    """Optimizer steps to a validation loss, on the line between evaluations; None if never."""
    before = (0, float("inf"))
    for step, loss in result["losses"]:
        if loss <= target:
            share = 1.0 if before[1] == float("inf") else (before[1] - target) / (before[1] - loss)
            return float(before[0] + share * (step - before[0]))
        before = (step, loss)
    return None


def summarize(results: dict[str, list[dict[str, Any]]], rates: dict[str, float]) -> list[dict[str, Any]]:
    """One row per method; differences from AdamW are paired by seed."""
    rows = []
    for label, runs in results.items():
        losses = [final(run) for run in runs]
        gaps = [final(base) - loss for base, loss in zip(results["AdamW"], losses, strict=True)]
        reached = [steps_to(run, final(base)) for run, base in zip(runs, results["AdamW"], strict=True)]
        found = [steps for steps in reached if steps is not None]
        rows.append(
            {
                "optimizer": label,
                "learning_rate": rates[label],
                "validation_loss": statistics.mean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "below_adamw_nats": statistics.mean(gaps),
                "standard_error": statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0,
                "steps_to_adamw_best": statistics.mean(found) if len(found) == len(runs) else None,
                "seeds_that_reached_it": len(found),
                "seconds": statistics.median(run["seconds"] for run in runs),
            }
        )
    return rows


def plot(rows: Sequence[dict[str, Any]], results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Distance below AdamW with its standard error, and mean curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    ordered = sorted(rows, key=lambda row: row["below_adamw_nats"])
    names = [row["optimizer"] for row in ordered]
    colors = ["tab:orange" if "SNOO" in name else "tab:blue" for name in names]
    left.barh(
        names, [r["below_adamw_nats"] for r in ordered], xerr=[r["standard_error"] for r in ordered], color=colors
    )
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("below AdamW (nats per byte, right is better)")
    for label, runs in results.items():
        if "SNOO" in label:
            continue
        steps = [step for step, _ in runs[0]["losses"]]
        means = [statistics.mean(run["losses"][i][1] for run in runs) for i in range(len(steps))]
        right.plot(steps[1:], means[1:], label=label)
    right.set_xlabel("optimizer steps")
    right.set_ylabel("validation loss (nats per byte)")
    right.legend()
    figure.suptitle(f"{BUDGET} samples, batch {BATCH}, {len(next(iter(results.values())))} seeds")
    figure.savefig(path, dpi=110)


def measure(seeds: Sequence[int], output: Path, processes: int, picture: Path | None) -> dict[str, Any]:
    """Tune, then report."""
    runner = Runner(output, processes)
    rates: dict[str, float] = {}
    tuning: list[dict[str, Any]] = []
    cases = [(method, outer) for outer in (False, True) for method in METHODS]
    with concurrent.futures.ThreadPoolExecutor(processes) as threads:
        for (method, outer), (rate, walked) in zip(
            cases, threads.map(lambda case: tuned(*case, runner), cases), strict=True
        ):
            label = Run(method, outer, 0.0, 0).label
            rates[label] = rate
            tuning += [{"optimizer": label, "learning_rate": r["learning_rate"], "loss": final(r)} for r in walked]
    waiting = {
        Run(method, outer, 0.0, 0).label: [
            runner.start(Run(method, outer, rates[Run(method, outer, 0.0, 0).label], seed)) for seed in seeds
        ]
        for method, outer in cases
    }
    results = {label: [future.result() for future in futures] for label, futures in waiting.items()}
    rows = summarize(results, rates)
    if picture is not None:
        plot(rows, results, picture)
    ranked = sorted(rows, key=lambda row: row["validation_loss"])
    return {
        "environment": environment(torch=torch.__version__, corpus_sha256=read_standard_library().sha256),
        "rows": rows,
        "tuning": tuning,
        "summary": {
            "order": [row["optimizer"] for row in ranked],
            "best_below_adamw_nats": ranked[0]["below_adamw_nats"],
        },
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--seeds", default=",".join(map(str, REPORTED_SEEDS)), help="reported seeds, with commas")
    parser.add_argument("--output", type=Path, default=Path("token-efficiency"), help="where runs are kept")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, one thread each [default: 1]")
    parser.add_argument("--plot", type=Path, help="picture to write")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    show(measure(seeds, arguments.output, arguments.processes, arguments.plot), as_json=arguments.json)


if __name__ == "__main__":
    main()

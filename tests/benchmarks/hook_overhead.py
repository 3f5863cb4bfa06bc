"""Step time with the hook over step time without, measured and unmeasured steps apart, both in one run.

python -m tests.benchmarks.hook_overhead [--json]

Two gloo ranks train two copies of one model in turn: a plain DDP loop, and the same loop in a session that reports to a
real controller. Every third session step is measured, and who goes first alternates. Ratios of medians over interleaved
steps; the summary takes the median case for unmeasured steps, whose ratios differ by noise only, and the worst for
measured ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = (
    {"optimizer": "signum", "estimator": "split"},
    {"optimizer": "signum", "estimator": "rank_variance"},
    {"optimizer": "muon", "estimator": "split"},
    {"optimizer": "muon", "estimator": "rank_variance"},
)
WIDTH, LAYERS, CONTEXT, BATCH, WARMUP, ROUNDS, EVERY = 192, 4, 128, 16, 6, 60, 3


def worker(url: str, spool: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from gns_controller.core.contract import Span
    from gns_controller.core.policies import HoldPolicyConfig
    from trainer_hooks import AdaptiveBatch, ConnectionOptions, MeasurementOptions
    from trainer_hooks.examples.llama import Llama, LlamaConfig, next_token_loss
    from trainer_hooks.examples.train_lm import build_optimizers

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = torch.randint(0, 256, (4096, CONTEXT + 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def model_and_optimizers(name: str) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = Llama(LlamaConfig(width=WIDTH, num_layers=LAYERS, context=CONTEXT))
        return DistributedDataParallel(model), build_optimizers(model, name, 1e-3)

    def as_batch(samples: list[Any]) -> Any:
        return torch.stack(samples)

    for number, case in enumerate(CASES):
        plain, plain_optimizers = model_and_optimizers(case["optimizer"])
        hooked, hooked_optimizers = model_and_optimizers(case["optimizer"])
        session = AdaptiveBatch.attach(
            hooked,
            hooked_optimizers,
            run=f"overhead-{number}",
            controller=url,
            connection=ConnectionOptions(spool_directory=spool),
            global_batch_size=BATCH,
            micro_batch_size=BATCH,
            budget_samples=BATCH * (WARMUP + ROUNDS),
            policy=HoldPolicyConfig(estimator=case["estimator"]),
            measurement=MeasurementOptions(interval=Span(steps=EVERY), min_sample_groups=2),
        )
        times: dict[str, list[float]] = {"plain": [], "unmeasured": [], "measured": []}
        share = BATCH // dist.get_world_size()

        def plain_step(index: int, model: Any = plain, optimizers: Any = plain_optimizers, share: int = share) -> float:
            dist.barrier()
            began = time.perf_counter()
            start = index * BATCH + dist.get_rank() * share
            windows = as_batch([data[i % len(data)] for i in range(start, start + share)])
            next_token_loss(model, windows).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return time.perf_counter() - began

        for index, step in enumerate(session.steps(data, collate_fn=as_batch)):
            kind = "measured" if session.is_measured else "unmeasured"
            plain_first = index % 2 == 0
            if plain_first:
                plain_seconds = plain_step(index)
            dist.barrier()
            began = time.perf_counter()
            for windows in step:
                step.backward(next_token_loss(hooked, windows))
            step.apply()
            hooked_seconds = time.perf_counter() - began
            if not plain_first:
                plain_seconds = plain_step(index)
            if index >= WARMUP:
                times[kind].append(hooked_seconds)
                times["plain"].append(plain_seconds)
        session.close()
        if dist.get_rank() == 0:
            medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
            row = {
                **case,
                "parameters": sum(p.numel() for p in hooked.parameters()),
                "plain_ms": 1e3 * medians["plain"],
                "unmeasured_ms": 1e3 * medians["unmeasured"],
                "measured_ms": 1e3 * medians["measured"],
                "unmeasured_ratio": medians["unmeasured"] / medians["plain"],
                "measured_ratio": medians["measured"] / medians["plain"],
                "percent_of_training_at_interval_100": medians["measured"] / medians["plain"] - 1,
            }
            print("ROW " + json.dumps(row), flush=True)
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start a controller and two ranks, print what they measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    from tests.benchmarks.report import environment, show
    from tests.running import ControllerProcess
    from tests.torchrun import torchrun

    with tempfile.TemporaryDirectory() as folder:
        controller = ControllerProcess(Path(folder)).start()
        try:
            result = torchrun(
                "tests.benchmarks.hook_overhead",
                num_ranks=2,
                environment={"HOOK_OVERHEAD_URL": controller.url, "HOOK_OVERHEAD_SPOOL": f"{folder}/spool"},
                timeout_seconds=900,
            )
        finally:
            controller.stop()
    rows = [json.loads(line[4:]) for line in result.stdout.splitlines() if line.startswith("ROW ")]
    summary = {
        "unmeasured_step_ratio": statistics.median(row["unmeasured_ratio"] for row in rows),
        "measured_step_ratio": max(row["measured_ratio"] for row in rows),
    }
    import torch

    more = {"torch": torch.__version__, "ranks": 2, "backend": "gloo", "batch": BATCH, "context": CONTEXT}
    show({"environment": environment(**more), "rows": rows, "summary": summary}, as_json=options.json)


if __name__ == "__main__":
    import os

    if "HOOK_OVERHEAD_URL" in os.environ:
        worker(os.environ["HOOK_OVERHEAD_URL"], os.environ["HOOK_OVERHEAD_SPOOL"])
    else:
        sys.exit(main())

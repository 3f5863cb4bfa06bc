"""Trains a few steps on these ranks, saves on a measured step or resumes, and says what every step trained with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.contract import Decision, Span
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import Stage, StagesPolicyConfig
from tests.torchrun import end_rank
from trainer_hooks import AdaptiveBatch, ConnectionOptions, CouplingOptions, MeasurementOptions
from trainer_hooks.optim import SNOO

SAVED_AT = 10
RESUMED_STEPS = 12


def points() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4000, 4, generator=generator)
    return torch.cat([inputs, inputs.sum(1, keepdim=True) + torch.randn(4000, 1, generator=generator)], dim=1)


def run(case: dict[str, Any], folder: Path, *, resumes: bool) -> list[dict[str, Any]]:
    """What rank 0 saw of each step: samples counted and trained, this rank's rate and how far ranks differ in it."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if case["interval"]:
        optimizer = SNOO(optimizer, interval=case["interval"], batch_exponent=1.0)
    path = folder / f"{case['name']}.pt"
    checkpoint = torch.load(path, weights_only=False) if resumes else None
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    sources: list[str] = []

    def note(decision: Decision, source: str) -> None:
        sources.append(f"{decision.optimizer_step} {source}")

    session = AdaptiveBatch.attach(
        model,
        optimizer,
        run=case["name"],
        global_batch_size=8,
        micro_batch_size=8,
        budget_samples=4000,
        controller=case["url"],
        policy=StagesPolicyConfig(stages=(Stage(from_samples=case["from_samples"], global_batch_size=32),)),
        measurement=MeasurementOptions(interval=Span(steps=5)),
        coupling=CouplingOptions(learning_rate=case["coupling"]),
        connection=ConnectionOptions(
            decision_deadline_seconds=30.0, spool_directory=folder / "spool", on_decision=note
        ),
        state=checkpoint["session"] if checkpoint else None,
    )
    steps = []
    for step in session.steps(points()):
        before, num_seen = session.samples_seen, 0
        is_measured = session.is_measured
        for rows in step:
            num_seen += len(rows)
            step.backward((model(rows[:, :4]) - rows[:, 4:]).square().mean())
        step.apply()
        rate = optimizer.param_groups[0]["lr"]
        found = torch.tensor([num_seen, rate, rate * rate], dtype=torch.float64)
        dist.all_reduce(found)
        ranks = dist.get_world_size()
        steps.append(
            {
                "step": session.optimizer_step,
                "counted": session.samples_seen - before,
                "trained": int(found[0]),
                "rate": rate,
                "rate_spread": float(found[2] / ranks - (found[1] / ranks) ** 2),
                "has_reading": bool(session.last_readings) if is_measured else None,
                "sources": list(sources),
            }
        )
        if session.optimizer_step == SAVED_AT + resumes * RESUMED_STEPS:
            break
    state = session.state_dict()
    if dist.get_rank() == 0 and not resumes:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": state}
        torch.save(saved, path)
    session.close()
    dist.barrier()
    return steps


def attach_with_other_states(path: Path) -> list[str]:
    """What attach says on each rank where rank 0 alone, or every rank but the last, was given the checkpoint."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    told: list[str] = []
    for has_state in (rank == 0, rank < ranks - 1):
        model = DistributedDataParallel(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        state = torch.load(path, weights_only=False)["session"] if has_state else None
        settings: dict[str, Any] = {"global_batch_size": 6, "micro_batch_size": 8, "budget_samples": 4000}
        try:
            AdaptiveBatch.attach(model, optimizer, run="other-states", state=state, **settings)
            told.append("attached")
        except InvalidInputError as error:
            told.append(str(error))
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, told)
    return [sentence for of_rank in gathered for sentence in of_rank]


def main() -> None:
    folder, resumes, cases = Path(sys.argv[1]), sys.argv[2] == "resume", json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {case["name"]: run(case, folder, resumes=resumes) for case in cases}
    if resumes:
        found["other states"] = attach_with_other_states(folder / f"{cases[0]['name']}.pt")
    if dist.get_rank() == 0:
        (folder / f"{sys.argv[2]}.json").write_text(json.dumps(found))
    dist.barrier()
    end_rank()


if __name__ == "__main__":
    main()

"""Checkpoints of the example job: what is in one, and going on from one with another batch.

Written beside and renamed, so that a kill leaves the old one whole. Each says what run it is of, so that a branch can
be started from the file alone.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import initial_state, plan_for

SETTINGS = (
    *("optimizer", "batch_size", "micro_batch_size", "budget_samples", "coupling", "beta_coupling"),
    *("momentum", "min_sample_groups"),
    *("width", "layers", "heads", "context", "clip", "seed", "validation_samples", "corpus"),
)
"""Options that make a run what it is; the learning rate is added as used."""


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """By name of the option, as JSON has them."""
    values = {name: getattr(options, name) for name in SETTINGS}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}


def write_checkpoint(path: Path, **parts: Any) -> None:
    """Write the parts: model, optimizers, session, job."""
    unfinished = path.with_suffix(".tmp")
    torch.save(parts, unfinished)
    unfinished.replace(path)


def read_checkpoint(path: Path, *, device: torch.device | None = None) -> dict[str, Any]:
    """The parts that were written.

    Raises:
        InvalidInputError: the file is something else.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=device or "cpu", weights_only=True)
        if not {"model", "optimizers", "session"} <= checkpoint.keys():
            raise KeyError
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError):
        raise InvalidInputError(f"{path} is not a checkpoint of this job.") from None
    return checkpoint


def described(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Where the run stands, and its settings.

    Raises:
        InvalidInputError: the checkpoint does not say.
    """
    if "job" not in checkpoint:
        raise InvalidInputError(f"{path} does not say which settings it was trained with; save it again.")
    session = checkpoint["session"]
    return {
        "optimizer_step": session["optimizer_step"],
        "samples_seen": session["samples_seen"],
        "global_batch_size": session["plan"]["global_batch_size"],
        "job": checkpoint["job"],
    }


def with_batch(
    state: Mapping[str, Any], global_batch_size: int, *, rules: BatchRules, data_parallel_size: int
) -> dict[str, Any]:
    """A session's state that goes on with another batch, from the next step on.

    The learning-rate factor follows from the batch at the start of the run, in `rules`, so it is applied once however
    often the batch has changed. What the policy had learnt or decided at the old batch is forgotten, and so is what an
    operator had wanted for the old run.

    Raises:
        BatchShapeError: these ranks cannot make that batch.
    """
    plan = plan_for(
        rules,
        global_batch_size,
        data_parallel_size=data_parallel_size,
        version=state["plan"]["version"] + 1,
        effective_step=state["optimizer_step"],
    )
    fresh = initial_state(rules, data_parallel_size=data_parallel_size).model_copy(update={"plan": plan})
    return {
        **state,
        "plan": plan.model_dump(mode="json"),
        "policy_state": fresh.model_dump(mode="json"),
        "pending": {},
        "orders": None,
        "due_exchanges": [],
    }

"""Checkpoints of the example job: model, optimizers, session, and the settings of the run.

A checkpoint is written to a second file, which then takes the old one's name: a kill leaves the old one whole. Because
it holds the settings, a branch can start from the file alone.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer_hooks import InvalidInputError

SETTINGS = (
    *("optimizer", "batch_size", "micro_batch_size", "budget_samples", "coupling", "beta_coupling"),
    *("momentum", "min_sample_groups"),
    *("width", "layers", "heads", "context", "clip", "seed", "validation_samples", "corpus"),
)
"""Names of the options that decide the result of a run. The learning rate is saved beside them, as used."""


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide the result, as JSON values by name."""
    values = {name: getattr(options, name) for name in SETTINGS}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}


def write_checkpoint(path: Path, **parts: Any) -> None:
    """Write a checkpoint of these parts: model, optimizers, session, job."""
    unfinished = path.with_suffix(".tmp")
    torch.save(parts, unfinished)
    unfinished.replace(path)


def read_checkpoint(path: Path, *, device: torch.device | None = None) -> dict[str, Any]:
    """Return the parts that `write_checkpoint` wrote.

    Raises:
        InvalidInputError: the file is not a checkpoint of this job.
        OSError: the file does not exist or cannot be read.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=device or "cpu", weights_only=True)
        if not {"model", "optimizers", "session"} <= checkpoint.keys():
            raise KeyError
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError):
        raise InvalidInputError(f"{path} is not a checkpoint of this job.") from None
    return checkpoint


def described(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the position of the run in its budget, its batch and its settings.

    Raises:
        InvalidInputError: the checkpoint holds no settings.
    """
    if "job" not in checkpoint:
        raise InvalidInputError(f"{path} holds no settings of its run; save it again.")
    session = checkpoint["session"]
    return {
        "optimizer_step": session["optimizer_step"],
        "samples_seen": session["samples_seen"],
        "global_batch_size": session["plan"]["global_batch_size"],
        "job": checkpoint["job"],
    }

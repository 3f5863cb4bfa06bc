"""Checkpoints of a session: whether one is valid, the same on every rank, and what a policy starts from."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import PolicyState, initial_state
from trainer_hooks.distributed.collectives import RankGroup

STATE_VERSION = 2
"""Version of what `state_dict` returns. Version 1 had no betas and no operator commands."""


def check_same_state(state: Mapping[str, Any] | None, ranks: RankGroup) -> None:
    """Check that all ranks resume from one checkpoint, or none does.

    Call it on every rank, before anything else reads the state: it gathers one object from each.

    Raises:
        InvalidInputError: the ranks differ; raised on every rank.
    """
    marks = ranks.gather_objects(_mark_of(state))
    unreadable = next((rank for rank, mark in enumerate(marks) if isinstance(mark, str)), None)
    if unreadable is not None:
        raise InvalidInputError(
            f"state: what rank {unreadable} gave is not what state_dict returned: {marks[unreadable]}."
        )
    other = next((rank for rank, mark in enumerate(marks) if mark != marks[0]), None)
    if other is not None:
        first, second = ("none" if marks[rank][0] is None else f"step {marks[rank][0]}" for rank in (0, other))
        raise InvalidInputError(
            f"ranks resume from different checkpoints: rank 0 from {first}, rank {other} from {second}. Give each of "
            "them what state_dict returned, as rank 0 saved it."
        )


def _mark_of(state: Mapping[str, Any] | None) -> tuple[int | None, int] | str:
    """Return step and digest of a checkpoint, or a description of its fault.

    A fault is returned and not raised, because the other ranks wait in the collective that follows.
    """
    if state is None:
        return None, 0
    try:
        return int(state.get("optimizer_step", 0)), zlib.crc32(json.dumps(state, sort_keys=True, default=str).encode())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_state(state: Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that a checkpoint has a version this program reads, and was saved with these optimizers.

    Raises:
        InvalidInputError: another version, or other numbers of parameter groups.
    """
    if state.get("version") not in (1, STATE_VERSION):
        raise InvalidInputError(
            f"session state of version {state.get('version')!r}; this program reads versions 1 and {STATE_VERSION}."
        )
    saved = [len(rates) for rates in state["base_learning_rates"]]
    present = [len(optimizer.param_groups) for optimizer in optimizers]
    if saved != present:
        raise InvalidInputError(
            f"the checkpoint's optimizers have {saved} parameter groups, these have {present}: not the same optimizers."
        )


def first_state(state: Mapping[str, Any] | None, rules: BatchRules, *, data_parallel_size: int) -> PolicyState:
    """Return the policy's memory at attach: the checkpoint's as it is, or an empty one.

    Its plan may be one that these ranks cannot make. The service keeps the same memory, and both take the batch in
    force from the first report, so that they stay equal; until then the session cuts the plans it receives.
    """
    if not state:
        return initial_state(rules, data_parallel_size=data_parallel_size)
    return PolicyState.model_validate(state["policy_state"])

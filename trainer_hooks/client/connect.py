"""Rank 0 opens its client at attach; every rank learns whether the run may go on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gns_controller.core.contract import Decision
from gns_controller.core.errors import GnsError, InvalidInputError
from gns_controller.core.policies import PolicyState
from gns_controller.core.runs import Control, Registration
from trainer_hooks.client.http import HttpController
from trainer_hooks.client.local import LocalController
from trainer_hooks.client.options import ConnectionOptions
from trainer_hooks.client.protocol import DecisionClient
from trainer_hooks.distributed.collectives import RankGroup

_REGISTRATION_SECONDS = 5.0
"""Longest wait for the registration, once, at attach: a wrong specification is better refused now than later."""


class SavedDecisions(NamedTuple):
    """Earlier decisions, as a checkpoint saved them; empty for a new run."""

    policy_state: PolicyState
    """Memory of the policy."""
    pending: Mapping[int, Decision]
    """Decisions that are not in force yet, by optimizer_step."""
    control: Control | None
    """Control by operators; None where none of them had changed anything."""


def connect(
    *,
    run_id: str,
    registration: Registration,
    saved: SavedDecisions,
    url: str | None,
    options: ConnectionOptions,
    ranks: RankGroup,
) -> DecisionClient | None:
    """Return rank 0's client, None on the others. Call it on every rank.

    A controller that does not answer is not an error: the run decides locally until it does.

    Raises:
        RunConflictError, InvalidInputError: the controller refuses this run; raised on every rank, so that none trains
            on alone.
    """
    client: DecisionClient | None = None
    problem: GnsError | None = None
    if ranks.rank == 0:
        if url is None:
            client = LocalController(registration.specification, saved.policy_state, saved.pending, saved.control)
        else:
            try:
                client = HttpController(
                    url=url,
                    run_id=run_id,
                    registration=registration,
                    state=saved.policy_state,
                    pending=saved.pending,
                    control=saved.control,
                    spool_directory=Path(options.spool_directory),
                    token=options.token or os.environ.get("GNS_TOKEN"),
                    decision_deadline_seconds=options.decision_deadline_seconds,
                )
                client.wait_registered(deadline_seconds=_REGISTRATION_SECONDS)
            except Exception as error:
                # Whatever it is, the other ranks wait in the broadcast below.
                problem = error if isinstance(error, GnsError) else InvalidInputError(f"controller={url!r}: {error}")
                if client is not None:
                    client.close(deadline_seconds=1.0)

    # Every rank comes here, with rank 0's outcome: all go on, or all raise.
    message = {"ok": True} if problem is None else {"error": str(problem)[:2000]}
    try:
        ranks.broadcast_message(message if ranks.rank == 0 else None)
    except GnsError as error:
        if problem is None:
            raise InvalidInputError(str(error)) from None
    if problem is not None:
        raise problem
    return client

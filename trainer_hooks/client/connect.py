"""Rank 0 opens its client at attach; every rank learns whether it may go on."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from gns_controller.core.contract import Decision
from gns_controller.core.errors import GnsError, InvalidInputError
from gns_controller.core.policies import PolicyState
from gns_controller.core.runs import Control, Registration, RunSpecification
from trainer_hooks.client.http import HttpController
from trainer_hooks.client.local import LocalController
from trainer_hooks.client.protocol import DecisionClient
from trainer_hooks.distributed.collectives import RankGroup

_REGISTRATION_SECONDS = 5.0
"""Once, at attach: a wrong specification is better told now than later."""


def connect(
    *,
    run_id: str,
    specification: RunSpecification,
    policy_state: PolicyState,
    pending: Mapping[int, Decision],
    control: Control | None,
    url: str | None,
    token: str | None,
    spool_directory: Path,
    resume_step: int,
    ranks: RankGroup,
    decision_deadline_seconds: float,
) -> DecisionClient | None:
    """Rank 0's client, None on the others. Call it on every rank.

    Silence is no error: the run decides locally until the controller answers.

    Raises:
        RunConflictError, InvalidInputError: the controller refuses this run; raised on every rank, so that none trains
            on alone.
    """
    client: DecisionClient | None = None
    problem: GnsError | None = None
    if ranks.rank == 0:
        if url is None:
            client = LocalController(specification, policy_state, pending, control)
        else:
            try:
                client = HttpController(
                    url=url,
                    run_id=run_id,
                    registration=Registration(
                        specification=specification, incarnation=secrets.token_hex(16), resume_step=resume_step
                    ),
                    state=policy_state,
                    pending=pending,
                    control=control,
                    spool_directory=spool_directory,
                    token=token,
                    decision_deadline_seconds=decision_deadline_seconds,
                )
                client.wait_registered(deadline_seconds=_REGISTRATION_SECONDS)
            except Exception as error:
                # Whatever it is, the other ranks wait in the broadcast below.
                problem = error if isinstance(error, GnsError) else InvalidInputError(f"controller={url!r}: {error}")
                if client is not None:
                    client.close(deadline_seconds=1.0)
    message = {"ok": True} if problem is None else {"error": str(problem)[:2000]}
    try:
        ranks.broadcast_message(message if ranks.rank == 0 else None)
    except GnsError as error:
        if problem is None:
            raise InvalidInputError(str(error)) from None
    if problem is not None:
        raise problem
    return client

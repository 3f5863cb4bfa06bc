"""Routes of operators: the policy of a run, the override above it, the commands so far, and replay."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gns_controller.core.contract import FrozenModel, Override
from gns_controller.core.errors import BatchShapeError
from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.replay import ReplayReport
from gns_controller.core.runs import ControlPage, PolicyView
from gns_controller.service.log_replay import recorded_event
from gns_controller.web.dependencies import RunIdPath, ServiceDep, json_response
from gns_controller.web.openapi import body_of, patch_of, policy_body, problems
from gns_controller.web.paging import LogPageQuery, read_log_page
from gns_controller.web.problems import INVALID_INPUT, REVISION_REQUIRED, FieldProblem, ProblemError
from gns_controller.web.request_bodies import json_body, merge_patch, patched_policy, whole_policy

router = APIRouter(prefix="/api/v1", tags=["operators"])

IfMatch = Annotated[
    str | None, Header(max_length=1000, description="ETag of the policy that was read, or *; 428 without it.")
]
Note = Annotated[str, Query(max_length=500, description="Why, for the next person who looks.")]

_ETAG = {"headers": {"ETag": {"schema": {"type": "string"}, "description": "Strong: the policy_revision, quoted."}}}
_OURS = re.compile(r'("?)(0|[1-9][0-9]{0,18})\1')


class ReplayBody(FrozenModel):
    """Body of POST /runs/{run_id}/replay."""

    policy: AnyPolicyConfig | None = None
    """The policy to replay; null: what ran, with every operator command."""
    follow_trainer: bool | None = None
    """Take the batch in force from each measurement; null: as it was done for what ran, false for another policy."""


@router.get("/runs/{run_id}/policy", response_model=PolicyView, responses={200: dict(_ETAG), **problems(404, 422, 503)})
async def show_policy(run_id: RunIdPath, service: ServiceDep) -> Response:
    """Return the control of a run: its policy, the revision, and the override above it."""
    return _answer(await run_in_threadpool(service.controller.policy, run_id))


@router.patch(
    "/runs/{run_id}/policy",
    response_model=PolicyView,
    responses={200: dict(_ETAG), **problems(400, 404, 412, 413, 415, 422, 428, 429, 503)},
    openapi_extra=patch_of("the policy"),
)
async def change_policy(
    run_id: RunIdPath,
    patch: Annotated[dict[str, Any], Depends(merge_patch)],
    service: ServiceDep,
    if_match: IfMatch = None,
    note: Note = "",
) -> Response:
    """Change the policy from the next measurement on. A patch that names another `policy` replaces the document."""
    known = await run_in_threadpool(service.controller.policy, run_id)
    _require_revision(if_match)
    policy = patched_policy(known.policy, patch)
    named = _revisions(if_match)
    revisions = {known.policy_revision} if named is None else named & {known.policy_revision}
    return _answer(
        await asyncio.wrap_future(service.controller.set_policy(run_id, policy, revisions=revisions, note=note))
    )


@router.put(
    "/runs/{run_id}/policy",
    response_model=PolicyView,
    responses={200: dict(_ETAG), **problems(400, 404, 412, 413, 415, 422, 428, 429, 503)},
    openapi_extra=policy_body(),
)
async def replace_policy(
    run_id: RunIdPath,
    policy: Annotated[AnyPolicyConfig, Depends(whole_policy)],
    service: ServiceDep,
    if_match: IfMatch = None,
    note: Note = "",
) -> Response:
    """Let this policy decide from the next measurement on. What it leaves out takes its default; null is null."""
    await run_in_threadpool(service.controller.policy, run_id)
    _require_revision(if_match)
    future = service.controller.set_policy(run_id, policy, revisions=_revisions(if_match), note=note)
    return _answer(await asyncio.wrap_future(future))


@router.post(
    "/runs/{run_id}/override",
    response_model=PolicyView,
    responses={200: dict(_ETAG), **problems(400, 404, 412, 413, 415, 422, 428, 429, 503)},
    openapi_extra=body_of(Override),
)
async def put_override(
    run_id: RunIdPath,
    override: Annotated[Override, Depends(json_body(Override))],
    service: ServiceDep,
    if_match: IfMatch = None,
) -> Response:
    """Pin a batch or hold the present one, from the next measurement on, until it is released."""
    await run_in_threadpool(service.controller.policy, run_id)
    _require_revision(if_match)
    try:
        future = service.controller.set_override(run_id, override, revisions=_revisions(if_match))
        return _answer(await asyncio.wrap_future(future))
    except BatchShapeError as error:
        errors = [FieldProblem(pointer="/global_batch_size", detail=str(error))]
        raise ProblemError(INVALID_INPUT, str(error), errors=errors) from None


@router.delete(
    "/runs/{run_id}/override",
    response_model=PolicyView,
    responses={200: dict(_ETAG), **problems(404, 412, 422, 428, 429, 503)},
)
async def release_override(
    run_id: RunIdPath, service: ServiceDep, if_match: IfMatch = None, note: Note = ""
) -> Response:
    """Let the policy decide again, from the next measurement on."""
    await run_in_threadpool(service.controller.policy, run_id)
    _require_revision(if_match)
    future = service.controller.release_override(run_id, revisions=_revisions(if_match), note=note)
    return _answer(await asyncio.wrap_future(future))


@router.get("/runs/{run_id}/controls", response_model=ControlPage, responses=problems(404, 422, 503))
async def list_controls(run_id: RunIdPath, service: ServiceDep, page: LogPageQuery) -> Response:
    """Return what happened between measurements: attempts that registered, and operator commands."""
    items, following = await read_log_page(service, run_id, page, measurements=False, item_of=recorded_event)
    return json_response(ControlPage(items=items, next_cursor=following))


@router.post(
    "/runs/{run_id}/replay",
    response_model=ReplayReport,
    responses=problems(400, 404, 413, 415, 422, 429, 503),
    openapi_extra=body_of(ReplayBody),
)
async def replay(
    run_id: RunIdPath, body: Annotated[ReplayBody, Depends(json_body(ReplayBody))], service: ServiceDep
) -> Response:
    """Fold the run's measurements again, as they were decided or with another policy. Writes nothing; one at a time."""

    def answer() -> Response:
        report = service.controller.replay(run_id, policy=body.policy, follow_trainer=body.follow_trainer)
        return json_response(report)

    return await run_in_threadpool(answer)


def _answer(view: PolicyView) -> Response:
    return json_response(view, headers={"ETag": f'"{view.policy_revision}"'})


def _require_revision(if_match: str | None) -> None:
    if if_match is None:
        raise ProblemError(
            REVISION_REQUIRED,
            "Send If-Match with the ETag of GET /policy, so that no change is overwritten unseen; * for any.",
        )


def _revisions(if_match: str | None) -> set[int] | None:
    """Return the revisions that an If-Match names, quoted or bare; a weak tag matches nothing. None for any."""
    tags = [tag.strip() for tag in (if_match or "").split(",")]
    if "*" in tags:
        return None
    return {int(match[2]) for tag in tags if (match := _OURS.fullmatch(tag))}

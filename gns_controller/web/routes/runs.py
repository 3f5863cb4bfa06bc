"""Routes of runs: register, report, list, look."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gns_controller.core.contract import FrozenModel, NoiseScaleMeasurement
from gns_controller.core.runs import (
    DecisionPage,
    IngestReply,
    MeasurementPage,
    RecordedDecision,
    RecordedMeasurement,
    Registration,
    RegistrationReply,
    RunPage,
    RunView,
)
from gns_controller.store import LogEntry, measurement_of
from gns_controller.web.dependencies import (
    CursorQuery,
    OrderQuery,
    RunIdPath,
    Service,
    ServiceDep,
    decode_cursor,
    encode_cursor,
    json_response,
)
from gns_controller.web.openapi import body_of, problems
from gns_controller.web.problems import INVALID_INPUT, FieldProblem, ProblemError
from gns_controller.web.request_bodies import json_body

router = APIRouter(prefix="/api/v1", tags=["runs"])

EntriesLimit = Annotated[int, Query(ge=1, le=1000, description="Most items of the page.")]


class MeasurementsBody(FrozenModel):
    """Body of POST /runs/{run_id}/measurements."""

    measurements: Annotated[tuple[NoiseScaleMeasurement, ...], Field(min_length=1)]
    """Ascending in optimizer_step, all of one attempt."""


@router.put(
    "/runs/{run_id}",
    response_model=RegistrationReply,
    responses={
        200: {"description": "This incarnation, or another one of the same run, has registered."},
        201: {"model": RegistrationReply, "description": "The run is new."},
        **problems(400, 409, 413, 415, 422, 429, 503),
    },
    openapi_extra=body_of(Registration),
)
async def register(
    run_id: RunIdPath, registration: Annotated[Registration, Depends(json_body(Registration))], service: ServiceDep
) -> Response:
    """Announce an incarnation of a run. Idempotent: the same incarnation keeps its attempt."""
    done = await asyncio.wrap_future(service.controller.register(run_id, registration))
    return json_response(done.reply, status=201 if done.created else 200)


@router.post(
    "/runs/{run_id}/measurements",
    response_model=IngestReply,
    responses=problems(400, 404, 409, 413, 415, 422, 429, 503),
    openapi_extra=body_of(MeasurementsBody),
)
async def report(
    run_id: RunIdPath, body: Annotated[MeasurementsBody, Depends(json_body(MeasurementsBody))], service: ServiceDep
) -> Response:
    """Record measurements and answer the plan to follow. 200 means: on disk. Idempotent per optimizer_step."""
    _refuse_too_many(body, service)
    reply = await asyncio.wrap_future(service.controller.ingest(run_id, body.measurements))
    return json_response(reply)


@router.get("/runs", response_model=RunPage, responses=problems(422, 503))
async def list_runs(
    service: ServiceDep,
    cursor: CursorQuery = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Most runs of the page.")] = 50,
) -> Response:
    """Runs, newest registration first."""
    before = decode_cursor(cursor)
    views = await run_in_threadpool(service.controller.views, limit=limit + 1, before=before)
    following = encode_cursor(views[limit - 1][0]) if len(views) > limit else None
    return json_response(RunPage(items=tuple(view for _, view in views[:limit]), next_cursor=following))


@router.get("/runs/{run_id}", response_model=RunView, responses=problems(404, 422, 503))
async def show(run_id: RunIdPath, service: ServiceDep) -> Response:
    """One run, with its last measurement and decision."""
    return json_response(await run_in_threadpool(service.controller.view, run_id))


@router.get("/runs/{run_id}/measurements", response_model=MeasurementPage, responses=problems(404, 422, 503))
async def list_measurements(
    run_id: RunIdPath,
    service: ServiceDep,
    cursor: CursorQuery = None,
    limit: EntriesLimit = 100,
    order: OrderQuery = "asc",
) -> Response:
    """What the run reported, of all its attempts, in the order in which it arrived."""
    entries, following = await _page(service, run_id, cursor=cursor, limit=limit, order=order)
    items = tuple(
        RecordedMeasurement(
            sequence=entry.sequence,
            received_at=entry.at,
            measurement=measurement_of(entry).measurement,
        )
        for entry in entries
    )
    return json_response(MeasurementPage(items=items, next_cursor=following))


@router.get("/runs/{run_id}/decisions", response_model=DecisionPage, responses=problems(404, 422, 503))
async def list_decisions(
    run_id: RunIdPath,
    service: ServiceDep,
    cursor: CursorQuery = None,
    limit: EntriesLimit = 100,
    order: OrderQuery = "asc",
) -> Response:
    """What was decided on each measurement, and why."""
    entries, following = await _page(service, run_id, cursor=cursor, limit=limit, order=order)
    items = tuple(
        RecordedDecision(
            sequence=entry.sequence,
            decided_at=entry.at,
            decision=measurement_of(entry).decision,
        )
        for entry in entries
    )
    return json_response(DecisionPage(items=items, next_cursor=following))


async def _page(
    service: Service, run_id: str, *, cursor: str | None, limit: int, order: str
) -> tuple[list[LogEntry], str | None]:
    entries = await run_in_threadpool(
        service.controller.entries,
        run_id,
        measurements=True,
        after=decode_cursor(cursor),
        limit=limit + 1,
        descending=order == "desc",
    )
    following = encode_cursor(entries[limit - 1].sequence) if len(entries) > limit else None
    return entries[:limit], following


def _refuse_too_many(body: MeasurementsBody, service: Service) -> None:
    most = service.settings.max_measurements_per_request
    if len(body.measurements) > most:
        detail = f"a request has at most {most} measurements; send the rest in the next one."
        raise ProblemError(INVALID_INPUT, detail, errors=[FieldProblem(pointer="/measurements", detail=detail)])

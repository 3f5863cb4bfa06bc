"""Routes of runs: register, report, list, show."""

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
    Registration,
    RegistrationReply,
    RunPage,
    RunView,
)
from gns_controller.service.log_replay import recorded_decision, recorded_measurement
from gns_controller.web.dependencies import RunIdPath, Service, ServiceDep, json_response
from gns_controller.web.openapi import body_of, problems
from gns_controller.web.paging import CursorQuery, LogPageQuery, decode_cursor, encode_cursor, read_log_page
from gns_controller.web.problems import INVALID_INPUT, FieldProblem, ProblemError
from gns_controller.web.request_bodies import json_body

router = APIRouter(prefix="/api/v1", tags=["runs"])


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
    """Register an incarnation of a run. Idempotent: the same incarnation keeps its attempt."""
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
    """Record measurements and return the plan to follow. 200 means: on disk. Idempotent per optimizer_step."""
    _refuse_too_many(body, service)
    reply = await asyncio.wrap_future(service.controller.ingest(run_id, body.measurements))
    return json_response(reply)


@router.get("/runs", response_model=RunPage, responses=problems(422, 503))
async def list_runs(
    service: ServiceDep,
    cursor: CursorQuery = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Most runs of the page.")] = 50,
) -> Response:
    """Return runs, newest registration first."""
    before = decode_cursor(cursor)
    views = await run_in_threadpool(service.controller.views, limit=limit + 1, before=before)
    following = encode_cursor(views[limit - 1][0]) if len(views) > limit else None
    return json_response(RunPage(items=tuple(view for _, view in views[:limit]), next_cursor=following))


@router.get("/runs/{run_id}", response_model=RunView, responses=problems(404, 422, 503))
async def show(run_id: RunIdPath, service: ServiceDep) -> Response:
    """Return one run, with its last measurement and decision."""
    return json_response(await run_in_threadpool(service.controller.view, run_id))


@router.get("/runs/{run_id}/measurements", response_model=MeasurementPage, responses=problems(404, 422, 503))
async def list_measurements(run_id: RunIdPath, service: ServiceDep, page: LogPageQuery) -> Response:
    """Return the measurements of a run, of all its attempts, in the order in which they arrived."""
    items, following = await read_log_page(service, run_id, page, measurements=True, item_of=recorded_measurement)
    return json_response(MeasurementPage(items=items, next_cursor=following))


@router.get("/runs/{run_id}/decisions", response_model=DecisionPage, responses=problems(404, 422, 503))
async def list_decisions(run_id: RunIdPath, service: ServiceDep, page: LogPageQuery) -> Response:
    """Return the decision on each measurement, with its reason."""
    items, following = await read_log_page(service, run_id, page, measurements=True, item_of=recorded_decision)
    return json_response(DecisionPage(items=items, next_cursor=following))


def _refuse_too_many(body: MeasurementsBody, service: Service) -> None:
    most = service.settings.max_measurements_per_request
    if len(body.measurements) > most:
        detail = f"a request has at most {most} measurements; send the rest in the next one."
        raise ProblemError(INVALID_INPUT, detail, errors=[FieldProblem(pointer="/measurements", detail=detail)])

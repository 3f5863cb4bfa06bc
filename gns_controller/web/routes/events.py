"""Routes that wait for news of a run: its schedule as a long poll, its log as an event stream."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from datetime import UTC
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from gns_controller.core.errors import StoreError
from gns_controller.core.runs import ScheduleView
from gns_controller.store import LogEntry
from gns_controller.web.dependencies import RunIdPath, Service, ServiceDep
from gns_controller.web.openapi import problems
from gns_controller.web.problems import INVALID_INPUT, FieldProblem, ProblemError
from gns_controller.web.streams import wait_for

router = APIRouter(prefix="/api/v1", tags=["runs"])

HEARTBEAT_SECONDS = 15.0
_CHUNK = 200
_MAX_SEQUENCE = 2**62


@router.get(
    "/runs/{run_id}/schedule",
    response_model=ScheduleView,
    responses={
        200: {"headers": {"ETag": {"schema": {"type": "string"}, "description": "Strong; changes with the schedule."}}},
        304: {"description": "The schedule is still the one of If-None-Match."},
        **problems(404, 422, 503),
    },
)
async def schedule(
    run_id: RunIdPath,
    service: ServiceDep,
    after: Annotated[
        int | None, Query(ge=0, le=_MAX_SEQUENCE, description="Wait until the plan's version is above this.")
    ] = None,
    wait: Annotated[float, Query(ge=0, le=30, allow_inf_nan=False, description="Longest wait, in seconds.")] = 0.0,
    if_none_match: Annotated[str | None, Header(description="ETag of the schedule that is known.")] = None,
) -> Response:
    """The plans so far, oldest first, and what is expected to come if everything measured stays as it is."""
    if after is not None and wait > 0:
        await _next_plan(service, run_id, after=after, seconds=wait)
    view = await run_in_threadpool(service.controller.schedule, run_id)
    body = view.model_dump_json().encode()
    digest = hashlib.sha256(body).hexdigest()[:16]
    etag = f'"{view.attempt}-{view.plans[-1].version}-{digest}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    if etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


@router.get(
    "/runs/{run_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events `registered`, `measurement`, `control`; the id is the log's sequence.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problems(404, 422, 503),
    },
)
async def events(
    run_id: RunIdPath,
    service: ServiceDep,
    after: Annotated[int, Query(ge=0, le=_MAX_SEQUENCE, description="Replay the log from beyond this sequence.")] = 0,
    last_event_id: Annotated[
        str | None, Header(max_length=32, description="The id of the last event received; wins over `after`.")
    ] = None,
) -> Response:
    """The run's log from `after` on, then live, until somebody leaves."""
    service.streams.refuse_if_full()
    if last_event_id:
        after = _sequence_of(last_event_id)
    await run_in_threadpool(service.controller.view, run_id)
    return StreamingResponse(
        _stream(service, run_id, after=after),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(service: Service, run_id: str, *, after: int) -> AsyncIterator[bytes]:
    streams, last = service.streams, after
    service.metrics.event_streams.inc()
    try:
        with streams.woken_by(run_id) as woken:
            yield b"retry: 2000\n\n"
            while not streams.stopping:
                try:
                    entries = await run_in_threadpool(service.controller.entries, run_id, limit=_CHUNK, after=last)
                except StoreError:
                    return  # the client comes back with the id of its last event
                if entries:
                    last = entries[-1].sequence
                    yield b"".join(_event(entry) for entry in entries)
                elif not await wait_for(woken, seconds=HEARTBEAT_SECONDS):
                    yield b": still here\n\n"
    finally:
        service.metrics.event_streams.dec()


def _event(entry: LogEntry) -> bytes:
    """The stored JSON as it is, with the place in the log before it. JSON text has no line breaks."""
    at = entry.at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    head = f'"sequence":{entry.sequence},"received_at":"{at}"'
    if entry.kind == "registered":
        head += f',"attempt":{entry.attempt}'
    return f"id: {entry.sequence}\nevent: {entry.kind}\ndata: {{{head},{entry.body[1:]}\n\n".encode()


async def _next_plan(service: Service, run_id: str, *, after: int, seconds: float) -> None:
    """Wait for a plan with a later version, for another attempt, or until time is up."""
    first, version = await run_in_threadpool(service.controller.place_in_schedule, run_id)
    if version > after:
        return
    service.streams.refuse_if_full()
    deadline = time.monotonic() + seconds
    with service.streams.woken_by(run_id) as woken:
        while True:
            attempt, version = await run_in_threadpool(service.controller.place_in_schedule, run_id)
            left = deadline - time.monotonic()
            if version > after or attempt != first or left <= 0 or service.streams.stopping:
                return
            await wait_for(woken, seconds=left)


def _sequence_of(last_event_id: str) -> int:
    if last_event_id.isascii() and last_event_id.isdigit() and int(last_event_id) <= _MAX_SEQUENCE:
        return int(last_event_id)
    errors = [FieldProblem(parameter="Last-Event-ID", detail="Should be the id of an event of this stream")]
    raise ProblemError(INVALID_INPUT, "The last event id is none of ours.", errors=errors)

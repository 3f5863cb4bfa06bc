"""Probes and metrics, for whoever runs the service."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gns_controller.core.contract import FrozenModel
from gns_controller.web.dependencies import ServiceDep, json_response
from gns_controller.web.openapi import problems
from gns_controller.web.problems import STOPPING, ProblemError

router = APIRouter(tags=["operation"])


class Health(FrozenModel):
    """Answer of a probe."""

    status: Literal["alive", "ready", "started"]


@router.get("/livez", response_model=Health, responses=problems())
async def livez() -> Response:
    """The process answers. Restart it when this fails, and only then."""
    return json_response(Health(status="alive"))


@router.get("/readyz", response_model=Health, responses=problems(503))
async def readyz(service: ServiceDep) -> Response:
    """The database was written and read just now."""
    if service.streams.stopping:
        raise ProblemError(STOPPING, "The controller is shutting down.")
    await run_in_threadpool(service.controller.check)
    return json_response(Health(status="ready"))


@router.get("/startupz", response_model=Health, responses=problems())
async def startupz() -> Response:
    """The database is open and migrated: the port opens after that."""
    return json_response(Health(status="started"))


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(),
    },
)
async def metrics(service: ServiceDep, request: Request) -> Response:
    """Everything that docs/reference/metrics.md names."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(await run_in_threadpool(encode, service.metrics.registry), media_type=content_type)

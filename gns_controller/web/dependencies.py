"""Dependencies of routes: the controller and its companions, the name of a run, and JSON responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Request
from pydantic import BaseModel
from starlette.responses import Response

from gns_controller.service.controller import Controller
from gns_controller.service.metrics import Metrics
from gns_controller.service.settings import Settings
from gns_controller.web.streams import Streams


@dataclass(frozen=True, slots=True)
class Service:
    """The controller and its companions, as routes use them."""

    controller: Controller
    settings: Settings
    metrics: Metrics
    streams: Streams


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_service)]
RunIdPath = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="Name of the run.", examples=["llama-160m"])
]


def json_response(model: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a model as JSON; floats that are not finite are strings, which FastAPI's own encoder would not keep."""
    return Response(model.model_dump_json(), status_code=status, headers=headers, media_type="application/json")

"""What routes are handed: the controller and its companions, and parameters that several of them share."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Path, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from gns_controller.service.controller import Controller
from gns_controller.service.metrics import Metrics
from gns_controller.service.settings import Settings
from gns_controller.web.problems import INVALID_INPUT, FieldProblem, ProblemError
from gns_controller.web.streams import Streams


@dataclass(frozen=True, slots=True)
class Service:
    """Everything a route may use."""

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
CursorQuery = Annotated[
    str | None, Query(max_length=64, description="`next_cursor` of the page before; opaque.", examples=[None])
]
OrderQuery = Annotated[Literal["asc", "desc"], Query(description="Oldest or newest first.")]


def encode_cursor(position: int) -> str:
    """An opaque cursor."""
    return base64.urlsafe_b64encode(f"s{position}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> int | None:
    """The position in a cursor of ours.

    Raises:
        ProblemError: it is not one.
    """
    if cursor is None:
        return None
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    digits = text[1:]
    if text[:1] != "s" or not digits.isdigit() or len(digits) > 18:
        errors = [FieldProblem(parameter="cursor", detail="Should be the next_cursor of a page of this list")]
        raise ProblemError(INVALID_INPUT, "The cursor is none of ours.", errors=errors)
    return int(digits)


def json_response(model: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A model as it is: floats that are not finite as strings, which FastAPI's own encoder would not keep."""
    return Response(model.model_dump_json(), status_code=status, headers=headers, media_type="application/json")

"""Every error we answer, as RFC 9457 application/problem+json. Never raw input, SQL or a path of this machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from gns_controller.core.errors import (
    GnsError,
    InvalidInputError,
    NoOverrideError,
    PolicyPlugInError,
    ReplayBusyError,
    ReplayTooLongError,
    RevisionConflictError,
    RunConflictError,
    StaleAttemptError,
    StoreBusyError,
    StoreError,
    UnknownRunError,
)
from gns_controller.core.policies import KEEP_UNKNOWN
from gns_controller.core.runs import RunSpecification

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 2
_TYPE_PREFIX = "urn:gns-controller:problem:"
_MAX_ERRORS = 20


class ProblemType(NamedTuple):
    """A kind of problem: its stable name, its status, and what it is called."""

    slug: str
    status: int
    title: str


MALFORMED_JSON = ProblemType("malformed-json", 400, "The body is not JSON")
UNAUTHORIZED = ProblemType("unauthorized", 401, "A bearer token is needed")
FOREIGN_ORIGIN = ProblemType("foreign-origin", 403, "The request belongs to another site")
NOT_FOUND = ProblemType("not-found", 404, "There is nothing at this address")
UNKNOWN_RUN = ProblemType("unknown-run", 404, "No run has this name")
NO_OVERRIDE = ProblemType("no-override", 404, "There is nothing to release")
METHOD_NOT_ALLOWED = ProblemType("method-not-allowed", 405, "This address does not know the method")
RUN_CONFLICT = ProblemType("run-conflict", 409, "The run exists with another specification")
STALE_ATTEMPT = ProblemType("stale-attempt", 409, "A newer attempt of the run has registered")
REVISION_CONFLICT = ProblemType("revision-conflict", 412, "Somebody has changed it since")
BODY_TOO_LARGE = ProblemType("body-too-large", 413, "The body is too large")
REPLAY_TOO_LONG = ProblemType("replay-too-long", 413, "The run is too long to replay here")
UNSUPPORTED_MEDIA_TYPE = ProblemType("unsupported-media-type", 415, "The body has another type than asked for")
INVALID_INPUT = ProblemType("invalid-input", 422, "The request cannot be carried out as it is")
REVISION_REQUIRED = ProblemType("revision-required", 428, "If-Match has to name the revision")
REPLAY_BUSY = ProblemType("replay-busy", 429, "Another replay is running")
STORE_BUSY = ProblemType("store-busy", 429, "Too many writes are waiting")
INTERNAL_ERROR = ProblemType("internal-error", 500, "The controller has failed")
POLICY_UNAVAILABLE = ProblemType("policy-unavailable", 503, "The policy cannot be run here")
STORE_UNAVAILABLE = ProblemType("store-unavailable", 503, "The database does not work now")
TOO_MANY_STREAMS = ProblemType("too-many-streams", 503, "Too many streams are open")
STOPPING = ProblemType("stopping", 503, "The controller is shutting down")

PROBLEM_TYPES = (
    MALFORMED_JSON,
    UNAUTHORIZED,
    FOREIGN_ORIGIN,
    NOT_FOUND,
    UNKNOWN_RUN,
    NO_OVERRIDE,
    METHOD_NOT_ALLOWED,
    RUN_CONFLICT,
    STALE_ATTEMPT,
    REVISION_CONFLICT,
    BODY_TOO_LARGE,
    REPLAY_TOO_LONG,
    UNSUPPORTED_MEDIA_TYPE,
    INVALID_INPUT,
    REVISION_REQUIRED,
    REPLAY_BUSY,
    STORE_BUSY,
    INTERNAL_ERROR,
    POLICY_UNAVAILABLE,
    STORE_UNAVAILABLE,
    TOO_MANY_STREAMS,
    STOPPING,
)


class FieldProblem(BaseModel):
    """One thing wrong with the request."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    pointer: str | None = None
    """JSON pointer into the body; the empty string is the body itself."""
    parameter: str | None = None
    """Name of the path, query or header parameter, where it is not the body."""
    detail: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    type: str
    """Stable: urn:gns-controller:problem:<name>."""
    title: str
    status: int
    detail: str
    request_id: str
    """Also in the X-Request-Id header and in the log."""
    errors: list[FieldProblem] | None = None
    """422 only."""
    registered: RunSpecification | None = None
    """run-conflict only: what the run is."""
    requested: RunSpecification | None = None
    """run-conflict only: what was asked for."""
    current_attempt: int | None = None
    """stale-attempt only."""
    policy_revision: int | None = None
    """revision-conflict only: the present one."""


class ProblemError(Exception):
    """Raised by routes and their helpers to answer with a problem."""

    def __init__(
        self,
        kind: ProblemType,
        detail: str,
        *,
        errors: Sequence[FieldProblem] = (),
        headers: dict[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.errors = list(errors)
        self.headers = headers or {}
        self.members = members


def problem_response(error: ProblemError, *, request_id: str) -> Response:
    """The answer."""
    fields = {
        "type": _TYPE_PREFIX + error.kind.slug,
        "title": error.kind.title,
        "status": error.kind.status,
        "detail": error.detail,
        "request_id": request_id,
        "errors": error.errors[:_MAX_ERRORS] or None,
        **error.members,
    }
    problem = Problem.model_validate(fields, context=KEEP_UNKNOWN)
    headers = dict(error.headers)
    if error.kind.status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return Response(
        problem.model_dump_json(exclude_none=True),
        status_code=error.kind.status,
        headers=headers,
        media_type="application/problem+json",
    )


def problem_of(error: GnsError) -> ProblemError:
    """The problem behind an exception of ours. Our messages are written for clients; the store's name no path."""
    detail = str(error)
    match error:
        case UnknownRunError():
            return ProblemError(UNKNOWN_RUN, detail)
        case RunConflictError():
            return ProblemError(
                RUN_CONFLICT,
                "The run exists with another specification: compare `registered` and `requested`. Choose another name "
                "or send the registered one.",
                registered=error.registered,
                requested=error.requested,
            )
        case RevisionConflictError():
            return ProblemError(REVISION_CONFLICT, detail, policy_revision=error.policy_revision)
        case NoOverrideError():
            return ProblemError(NO_OVERRIDE, detail)
        case ReplayTooLongError():
            return ProblemError(REPLAY_TOO_LONG, detail)
        case ReplayBusyError():
            return ProblemError(REPLAY_BUSY, detail)
        case StaleAttemptError():
            return ProblemError(STALE_ATTEMPT, detail, current_attempt=error.current_attempt)
        case InvalidInputError():
            return ProblemError(INVALID_INPUT, detail, errors=[FieldProblem(pointer="", detail=detail)])
        case PolicyPlugInError():
            return ProblemError(POLICY_UNAVAILABLE, error.sentence)
        case StoreBusyError():
            return ProblemError(STORE_BUSY, detail)
        case StoreError():
            return ProblemError(STORE_UNAVAILABLE, detail)
    logger.error("exception without a problem of its own: type=%s", type(error).__name__, exc_info=error)
    return ProblemError(INTERNAL_ERROR, "The controller has failed; its log has the request_id.")


class RequestNotes:
    """What the gate and the handlers tell each other about one request."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.problem: str | None = None


def answer(request: Request, error: ProblemError) -> Response:
    """The problem as a response, noted for the gate."""
    notes = request.scope["gns_notes"]
    assert isinstance(notes, RequestNotes)
    notes.problem = error.kind.slug
    return problem_response(error, request_id=notes.request_id)


def _allowed_methods(request: Request) -> set[str]:
    """Of every route at this address: Starlette names those of the first one only."""
    allowed: set[str] = set()
    for route in request.app.state.own_routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            allowed |= getattr(route, "methods", None) or set()
    return allowed or {"GET", "HEAD"}


def add_handlers(app: FastAPI) -> None:
    """Answer every exception with a problem; what nobody expects is caught by the gate."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return answer(request, error)

    async def on_gns_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, GnsError)
        return answer(request, problem_of(error))

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = [FieldProblem(parameter=str(e["loc"][-1]), detail=str(e["msg"])) for e in error.errors()]
        problem = ProblemError(INVALID_INPUT, "A parameter of the request is not valid.", errors=errors)
        return answer(request, problem)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kinds = {404: NOT_FOUND, 405: METHOD_NOT_ALLOWED}
        kind = kinds.get(error.status_code)
        if kind is None:
            kind = ProblemType("http-error", error.status_code, HTTPStatus(error.status_code).phrase)
        headers = dict(error.headers or {})
        if kind is METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(sorted(_allowed_methods(request)))
        problem = ProblemError(kind, f"{kind.title}.", headers=headers)
        return answer(request, problem)

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(GnsError, on_gns_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)

"""JSON bodies, strictly: NaN is not JSON, bytes that are not UTF-8 are not either, and every fault has a pointer."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from gns_controller.web.problems import (
    INVALID_INPUT,
    MALFORMED_JSON,
    UNSUPPORTED_MEDIA_TYPE,
    FieldProblem,
    ProblemError,
)

Model = TypeVar("Model", bound=BaseModel)

_LONGEST_POINTER = 200


def json_body(model: type[Model]) -> Callable[[Request], Coroutine[Any, Any, Model]]:
    """A dependency that reads the body as `model`."""

    async def read(request: Request) -> Model:
        _require_json(request)
        raw = await request.body()
        try:
            document = from_json(raw, allow_inf_nan=False)
        except ValueError:
            raise ProblemError(
                MALFORMED_JSON,
                "The body is not JSON in UTF-8. NaN and infinity are written as strings: "
                '"NaN", "Infinity", "-Infinity".',
            ) from None
        try:
            return model.model_validate(document)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=True, include_input=False)
            errors = [FieldProblem(pointer=_pointer(document, detail), detail=_sentence(detail)) for detail in details]
            raise ProblemError(
                INVALID_INPUT, f"The body has {len(errors)} fault(s); see `errors`.", errors=errors
            ) from None

    return read


def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProblemError(UNSUPPORTED_MEDIA_TYPE, "Send the body with Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ProblemError(UNSUPPORTED_MEDIA_TYPE, "Send the body without Content-Encoding.")


def _pointer(document: Any, error: ErrorDetails) -> str:
    """RFC 6901. Pydantic's location also names the chosen kind of a union, which the body does not have."""
    pointer, here = "", document
    location = error["loc"]
    for index, part in enumerate(location):
        found = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if found:
            here = here[part]
        if found or (error["type"] == "missing" and index == len(location) - 1):
            pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer[:_LONGEST_POINTER]


def _sentence(error: ErrorDetails) -> str:
    """Pydantic's message, without what was sent."""
    context = error.get("ctx", {})
    match error["type"]:
        case "union_tag_invalid":
            return f"Should be one of {context.get('expected_tags')}"
        case "union_tag_not_found":
            return f"Needs the field {context.get('discriminator')}"
        case "extra_forbidden":
            return "Unknown field"
    return error["msg"]

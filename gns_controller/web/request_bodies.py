"""JSON bodies, strictly: NaN is not JSON, bytes that are not UTF-8 are not either, and every fault has a pointer.

Also RFC 7396 merge patches of a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json

from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.policies.parsing import Fault, faults_of
from gns_controller.web.problems import (
    INVALID_INPUT,
    MALFORMED_JSON,
    UNSUPPORTED_MEDIA_TYPE,
    FieldProblem,
    ProblemError,
)

Model = TypeVar("Model", bound=BaseModel)

_JSON = ("application/json",)
_MERGE_PATCH = ("application/merge-patch+json", "application/json")
_LONGEST_POINTER = 200
_POLICY: TypeAdapter[AnyPolicyConfig] = TypeAdapter(AnyPolicyConfig)


def json_body(model: type[Model]) -> Callable[[Request], Coroutine[Any, Any, Model]]:
    """A dependency that reads the body as `model`."""

    async def read(request: Request) -> Model:
        document = await _document(request, _JSON)
        try:
            return model.model_validate(document)
        except ValidationError as error:
            raise _problem(document, error) from None

    return read


async def whole_policy(request: Request) -> AnyPolicyConfig:
    """A dependency that reads the body as a policy: what it leaves out takes its default, null is null."""
    document = await _document(request, _JSON)
    try:
        return _POLICY.validate_python(document)
    except ValidationError as error:
        raise _problem(document, error) from None


async def merge_patch(request: Request) -> dict[str, Any]:
    """A dependency that reads an RFC 7396 merge patch of an object."""
    patch = await _document(request, _MERGE_PATCH)
    if not isinstance(patch, dict):
        errors = [FieldProblem(pointer="", detail="Should be an object with the fields to change")]
        raise ProblemError(INVALID_INPUT, "A patch of a policy is an object.", errors=errors)
    return patch


def patched_policy(policy: AnyPolicyConfig, patch: Mapping[str, Any]) -> AnyPolicyConfig:
    """The policy after a merge patch; one that names another policy replaces it: its fields mean other things.

    Raises:
        ProblemError: the result is no policy.
    """
    same = patch.get("policy", policy.policy) == policy.policy
    document = merged(policy.model_dump(mode="json") if same else {}, patch)
    try:
        return _POLICY.validate_python(document)
    except ValidationError as error:
        raise _problem(document, error) from None


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2: null takes a member out, objects are merged, everything else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


async def _document(request: Request, media_types: tuple[str, ...]) -> Any:
    _require_json(request, media_types)
    raw = await request.body()
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError:
        raise ProblemError(
            MALFORMED_JSON,
            'The body is not JSON in UTF-8. NaN and infinity are written as strings: "NaN", "Infinity", "-Infinity".',
        ) from None


def _problem(document: Any, error: ValidationError) -> ProblemError:
    errors = [FieldProblem(pointer=_pointer(document, fault), detail=fault.sentence) for fault in faults_of(error)]
    return ProblemError(INVALID_INPUT, f"The body has {len(errors)} fault(s); see `errors`.", errors=errors)


def _require_json(request: Request, media_types: tuple[str, ...]) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in media_types:
        raise ProblemError(UNSUPPORTED_MEDIA_TYPE, f"Send the body with Content-Type: {' or '.join(media_types)}.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ProblemError(UNSUPPORTED_MEDIA_TYPE, "Send the body without Content-Encoding.")


def _pointer(document: Any, fault: Fault) -> str:
    """RFC 6901. Pydantic's location also names the chosen policy of the union, which the body does not have there."""
    pointer, here, told = "", document, None
    for index, part in enumerate(fault.location):
        if isinstance(here, dict) and here is not told and here.get("policy") == part:
            told = here
            continue
        found = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if found:
            here = here[part]
        if found or (fault.is_missing and index == len(fault.location) - 1):
            pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer[:_LONGEST_POINTER]

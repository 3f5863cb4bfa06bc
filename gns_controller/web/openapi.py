"""The OpenAPI document: which problems a route may answer, and schemas that FastAPI cannot see by itself."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.web.problems import Problem

_DESCRIPTIONS = {
    400: "The body is not JSON.",
    404: "No such run, or no override to release.",
    409: "The run exists with another specification, or a newer attempt has registered.",
    412: "If-Match names another revision than the present one.",
    413: "The body is too large, or the run too long to replay.",
    415: "The body has another type than asked for.",
    422: "A field or parameter is not valid; see `errors`.",
    428: "If-Match is missing.",
    429: "Too many writes are waiting, or another replay is running; see Retry-After.",
    503: "The database does not work now, the policy cannot be run, or too many streams are open; see Retry-After.",
    500: "A defect of the controller; its log has the request id.",
}
_FLOAT = {"anyOf": [{"type": "number"}, {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}]}
_MODELS_WITH_ODD_FLOATS = ("NoiseScaleMeasurement", "GroupReading", "ProgressPoint")
_MAY_BE_ODD = (
    "noise",
    "signal",
    "progress",
    "noise_standard_error",
    "progress_standard_error",
    "inner_product_variance",
    "ceiling_samples",
    "learning_rate",
    "schedule_factor",
    "step_seconds",
    "samples_per_second",
    "measurement_seconds",
    "loss",
    "validation_loss",
)
_bodies: list[type[BaseModel]] = []


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declarations of the problems that a route may answer, beside those that every route may."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _DESCRIPTIONS[status], "content": content} for status in (*statuses, 500)}


def patch_of(what: str) -> dict[str, Any]:
    """Declaration of a JSON merge patch."""
    schema = {
        "type": "object",
        "description": f"RFC 7396 merge patch of {what}: null takes a field back to its default.",
    }
    kinds = ("application/merge-patch+json", "application/json")
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Declaration of a JSON body that `json_body(model)` reads."""
    _bodies.append(model)
    schema = {"$ref": f"#/components/schemas/{model.__name__}-Input"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def policy_body() -> dict[str, Any]:
    """Declaration of a body that is a whole policy; the models behind it are those of `body_of` with a policy."""
    schema = TypeAdapter(AnyPolicyConfig).json_schema(ref_template="#/components/schemas/{model}-Input")
    del schema["$defs"]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, *, asks_for_tokens: bool) -> None:
    """Install our document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _complete(document, asks_for_tokens=asks_for_tokens)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], *, asks_for_tokens: bool) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _, inputs = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(_bodies)], ref_template="#/components/schemas/{model}-Input"
    )
    for name, schema in inputs["$defs"].items():
        schemas[f"{name}-Input"] = schema
    _, outputs = models_json_schema([(Problem, "serialization")], ref_template="#/components/schemas/{model}")
    for name, schema in outputs["$defs"].items():
        schemas.setdefault(name, schema)
    schemas["Problem"]["required"] = ["type", "title", "status", "detail", "request_id"]
    for name in _MODELS_WITH_ODD_FLOATS:
        for variant in (name, f"{name}-Input"):
            if variant in schemas:
                _allow_odd_floats(schemas[variant])
    if asks_for_tokens:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/api/") or path == "/metrics":
                operation["responses"]["401"] = {"description": "A bearer token is needed.", "content": content}
                if asks_for_tokens:
                    operation["security"] = [{"token": []}]


def _allow_odd_floats(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        if name not in _MAY_BE_ODD:
            continue
        is_optional = {"type": "null"} in field.get("anyOf", ())
        field.pop("type", None)
        field["anyOf"] = copy.deepcopy(_FLOAT["anyOf"]) + ([{"type": "null"}] if is_optional else [])

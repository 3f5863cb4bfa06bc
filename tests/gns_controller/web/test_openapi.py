"""The document tells the truth: whatever is sent, no answer is a 5xx or one that the document does not name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.gns_controller.running_service import Server, Service, registration, report

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about its own dependencies, while it is imported
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("PUT", "/api/v1/runs/{run_id}"),
    ("POST", "/api/v1/runs/{run_id}/measurements"),
    ("GET", "/api/v1/runs"),
    ("GET", "/api/v1/runs/{run_id}"),
    ("GET", "/api/v1/runs/{run_id}/measurements"),
    ("GET", "/api/v1/runs/{run_id}/decisions"),
    ("GET", "/api/v1/runs/{run_id}/schedule"),
    ("GET", "/api/v1/runs/{run_id}/policy"),
    ("PATCH", "/api/v1/runs/{run_id}/policy"),
    ("PUT", "/api/v1/runs/{run_id}/policy"),
    ("POST", "/api/v1/runs/{run_id}/override"),
    ("DELETE", "/api/v1/runs/{run_id}/override"),
    ("GET", "/api/v1/runs/{run_id}/controls"),
    ("POST", "/api/v1/runs/{run_id}/replay"),
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/startupz"),
    ("GET", "/metrics"),
]
STREAMS = [("GET", "/api/v1/runs/{run_id}/events")]
"""Never ends, so nothing can be sent to it that would be answered; see tests/gns_controller/cli/test_server.py."""


@pytest.fixture(scope="module")
def fed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that knows the run "run"."""
    server = Server(tmp_path_factory.mktemp("openapi")).start()
    server.http.put("/api/v1/runs/run", json=registration())
    odd = report(3, loss=float("nan"))
    server.http.post("/api/v1/runs/run/measurements", json={"measurements": [report(1), report(2), odd]})
    yield server
    server.kill()


@pytest.fixture(scope="module")
def schema(fed_server: Server) -> Any:
    return schemathesis.openapi.from_dict(fed_server.http.get("/openapi.json").json())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_finds_a_5xx_or_an_answer_the_document_does_not_name(
    fed_server: Server, schema: Any, method: str, path: str
) -> None:
    operation = schema[path][method]
    known = {"path_parameters": {"run_id": "run"}} if "{run_id}" in path else {}
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    has_input = bool(known) or path == "/api/v1/runs"
    kinds = [operation.as_strategy(mode) for mode in (modes if has_input else modes[:1])]
    if known:
        kinds.append(operation.as_strategy(modes[0], **known))

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(kinds))
    def check(case: Any) -> None:
        if isinstance(case.query, dict):
            case.query.pop("wait", None)
        case.call_and_validate(base_url=fed_server.url, checks=CHECKS, timeout=30)

    check()


def test_the_document_names_exactly_these_operations(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    named = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert named == {*OPERATIONS, *STREAMS}


def test_every_reference_in_the_document_leads_somewhere(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    references = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                references.add(node["$ref"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(document)
    assert references
    for reference in references:
        here = document
        for part in reference.removeprefix("#/").split("/"):
            here = here[part]


def test_every_operation_under_the_api_declares_its_problems(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    for path, item in document["paths"].items():
        for operation in item.values():
            if path.startswith("/api/"):
                assert {"401", "422", "503"} <= set(operation["responses"]), (path, json.dumps(operation)[:200])
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert list(answer["content"]) == ["application/problem+json"]

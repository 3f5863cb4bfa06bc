from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from gns_controller.web.problems import PROBLEM_TYPES
from tests.gns_controller.running_service import Service, registration, report

URL = "/api/v1/runs/run"


def problem_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == response.status_code
    assert problem["request_id"] == response.headers["X-Request-Id"]
    assert problem["type"] in {f"urn:gns-controller:problem:{kind.slug}" for kind in PROBLEM_TYPES}
    return problem


def slug_of(response: httpx.Response) -> str:
    return str(problem_of(response)["type"]).rpartition(":")[2]


def post_raw(service: Service, content: bytes, content_type: str = "application/json") -> httpx.Response:
    return service.client.post(f"{URL}/measurements", content=content, headers={"Content-Type": content_type})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"measurements": [NaN]}',
        b'{"measurements": [-Infinity]}',
        b'{"measurements": "\xff"}',
        b'{"measurements": "\\ud800"}',
        b"[" * 100_000,
        b'{"measurements": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "nan", "infinity", "not utf-8", "lone surrogate", "deep", "huge integer"],
)
def test_a_body_that_is_not_json_is_400(service: Service, content: bytes) -> None:
    assert slug_of(post_raw(service, content)) == "malformed-json"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_415(service: Service, content_type: str) -> None:
    assert slug_of(post_raw(service, b"{}", content_type)) == "unsupported-media-type"


def test_a_compressed_body_is_415(service: Service) -> None:
    response = service.client.put(URL, json=registration(), headers={"Content-Encoding": "gzip"})
    assert slug_of(response) == "unsupported-media-type"


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 1000):
        yield b" " * 1000


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_also_when_it_does_not_say_its_length(
    make_service: Callable[..., Service], chunked: bool
) -> None:
    service = make_service(max_body_bytes=10_000)
    content: Any = chunks(20_000) if chunked else b" " * 20_000
    response = service.client.put(URL, content=content, headers={"Content-Type": "application/json"})
    assert slug_of(response) == "body-too-large"
    assert "10000 bytes" in response.json()["detail"]


def test_too_many_measurements_are_refused_with_the_limit(make_service: Callable[..., Service]) -> None:
    service = make_service(max_measurements_per_request=2)
    service.register()
    problem = problem_of(service.report(report(1), report(2), report(3)))
    assert problem["errors"][0]["pointer"] == "/measurements"
    assert "2" in problem["errors"][0]["detail"]


def test_an_unknown_field_is_422_with_a_pointer_to_it(service: Service) -> None:
    service.register()
    odd = report(1) | {"gns/~": 1}
    problem = problem_of(service.report(report(1), odd))
    assert problem["errors"] == [{"pointer": "/measurements/1/gns~1~0", "detail": "Unknown field"}]


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"policy": {"policy": "noise_scale", "noise_tolerance": -1}}, "/specification/policy/noise_tolerance"),
        ({"policy": {"policy": "secret-name"}}, "/specification/policy"),
        ({"policy": {}}, "/specification/policy"),
        ({"budget_samples": "many"}, "/specification/budget_samples"),
        ({"budget_samples": 10**30}, "/specification/budget_samples"),
        ({"batch": {"global_batch_size": 16}}, "/specification/batch/micro_batch_size"),
        ({"measurement_interval": {}}, "/specification/measurement_interval"),
        ({"batch": {"global_batch_size": 17, "micro_batch_size": 4}}, "/specification"),
    ],
)
def test_every_fault_of_a_specification_has_a_pointer_and_repeats_no_input(
    service: Service, changes: dict[str, Any], pointer: str
) -> None:
    response = service.register(**changes)
    problem = problem_of(response)
    assert [error["pointer"] for error in problem["errors"]] == [pointer]
    assert "secret-name" not in response.text
    assert "many" not in response.text


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/api/v1/runs/.hidden", "run_id"),
        (f"/api/v1/runs/{'x' * 200}", "run_id"),
        ("/api/v1/runs?limit=0", "limit"),
        ("/api/v1/runs?limit=many", "limit"),
        (f"{URL}/measurements?order=up", "order"),
        (f"{URL}/schedule?wait=31", "wait"),
        (f"{URL}/schedule?wait=nan", "wait"),
    ],
)
def test_a_parameter_that_is_not_valid_is_422_and_named(service: Service, path: str, parameter: str) -> None:
    problem = problem_of(service.client.get(path))
    assert problem["status"] == 422
    assert [error["parameter"] for error in problem["errors"]] == [parameter]


def test_an_unknown_address_is_404_and_repeats_nothing_of_it(service: Service) -> None:
    response = service.client.get("/api/v1/<script>")
    assert slug_of(response) == "not-found"
    assert "script" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", URL, "GET, PUT"),
        ("PATCH", "/api/v1/runs", "GET"),
        ("PUT", f"{URL}/measurements", "GET, POST"),
        ("POST", "/livez", "GET"),
    ],
)
def test_a_wrong_method_is_405_and_names_the_right_ones(service: Service, method: str, path: str, allowed: str) -> None:
    response = service.client.request(method, path)
    assert slug_of(response) == "method-not-allowed"
    assert response.headers["Allow"] == allowed


def test_an_exception_nobody_expected_is_500_without_internals_and_logged_with_its_request_id(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(service.controller, "view", fail)
    response = service.client.get(URL, headers={"X-Request-Id": "my-request.7"})
    assert slug_of(response) == "internal-error"
    assert "hunter2" not in response.text
    assert response.json()["request_id"] == "my-request.7"
    assert "my-request.7" in caplog.text


@pytest.mark.parametrize("asked", ["has spaces", "x" * 65, "a;b", "é".encode()])
def test_a_request_id_that_is_not_safe_is_replaced(service: Service, asked: str | bytes) -> None:
    response = service.client.get("/livez", headers={"X-Request-Id": asked})
    assert re.fullmatch(r"[0-9a-f]{16}", response.headers["X-Request-Id"])


class TestTokens:
    TOKEN = "a-token-of-256-random-bits"

    @pytest.fixture
    def guarded(self, make_service: Callable[..., Service]) -> Service:
        return make_service(token_hashes=hashlib.sha256(self.TOKEN.encode()).hexdigest())

    @pytest.mark.parametrize("path", ["/api/v1/runs", URL, f"{URL}/events", "/metrics", "/openapi.json", "/nothing"])
    @pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic a-token-of-256-random-bits", "Bearer", "é"])
    def test_everything_else_is_401_without_a_known_token(
        self, guarded: Service, path: str, header: str | None
    ) -> None:
        headers = {} if header is None else {"Authorization": header.encode()}
        response = guarded.client.get(path, headers=headers)  # type: ignore[arg-type]
        assert slug_of(response) == "unauthorized"
        assert response.headers["WWW-Authenticate"].startswith("Bearer")

    def test_a_known_token_opens_it(self, guarded: Service) -> None:
        for path in ("/api/v1/runs", "/metrics", "/openapi.json"):
            headers = {"Authorization": f"Bearer {self.TOKEN}"}
            assert guarded.client.get(path, headers=headers).status_code == 200

    @pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/", "/runs/run", "/static/app.js"])
    def test_probes_and_the_page_need_none(self, guarded: Service, path: str) -> None:
        assert guarded.client.get(path).status_code == 200


def test_the_page_may_load_nothing_from_elsewhere_and_is_asked_about_each_time(service: Service) -> None:
    for path in ("/", "/runs/run", "/static/app.js"):
        response = service.client.get(path)
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    again = service.client.get("/static/app.js", headers={"If-None-Match": response.headers["ETag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/nothing.js", "/static/"])
def test_static_files_are_those_of_the_page_only(service: Service, path: str) -> None:
    assert slug_of(service.client.get(path)) == "not-found"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "localhost.evil.example"},
        {"Host": "192.0.2.7:8000"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "null"},
    ],
)
def test_without_tokens_no_page_of_another_site_writes(service: Service, headers: dict[str, str]) -> None:
    service.register()
    override = {"kind": "pin", "global_batch_size": 32}
    response = service.client.post(f"{URL}/override", json=override, headers={"If-Match": "*", **headers})
    assert slug_of(response) == "foreign-origin"
    assert service.client.get(f"{URL}/policy", headers=headers).json()["override"] is None


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "127.1.2.3", "LOCALHOST:80", "[::1]:8000", "[::1]"])
def test_this_machine_writes_without_tokens_under_each_of_its_names(service: Service, host: str) -> None:
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host.lower()}"}):
        assert service.client.put(URL, json=registration(), headers=headers).is_success


def test_a_token_writes_under_any_host(make_service: Callable[..., Service]) -> None:
    service = make_service(token_hashes=(hashlib.sha256(b"secret").hexdigest(),))
    headers = {"Host": "gns.example", "Origin": "https://gns.example", "Authorization": "Bearer secret"}
    assert service.client.put(URL, json=registration(), headers=headers).status_code == 201

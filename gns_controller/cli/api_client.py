"""The HTTP client of the commands, and the export of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from gns_controller.core.errors import GnsError, InvalidInputError
from gns_controller.core.policies import KEEP_UNKNOWN
from gns_controller.recordings import ExportedMeasurement, ExportedRun, export_lines

Model = TypeVar("Model", bound=BaseModel)

_TIMEOUT_SECONDS = 30.0
_REPLAY_SECONDS = 600.0
_PAGE = 1000


class _Answer(dict[str, Any]):
    """An object of an answer; one that lacks a field we read is not from a controller of this version."""

    def __missing__(self, key: str) -> Any:
        raise GnsError(f"the answer has no {key!r}: --url does not lead to a controller, or to one of another version.")


class ControllerClient:
    """Requests to the controller at one address; a context to enter.

    Args:
        url: with scheme.
        token: bearer token; empty for none.

    Raises:
        InvalidInputError: the URL is not an address.
    """

    def __init__(self, url: str, token: str) -> None:
        if not is_address(url):
            raise InvalidInputError(f"--url {url!r} is not an address like http://127.0.0.1:8000.")
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """Return one resource as JSON.

        Raises:
            GnsError: no controller answers, or it answers with a problem.
        """
        return self._request("GET", path, params=parameters)

    def pages(self, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """Yield every item of a list, page after page."""
        cursor: dict[str, str] = {}
        while True:
            page = self.get(path, limit=_PAGE, **cursor, **parameters)
            yield from page["items"]
            if page["next_cursor"] is None:
                return
            cursor = {"cursor": page["next_cursor"]}

    def change(self, method: str, run_id: str, what: str, *, note: str = "", body: Any = None) -> dict[str, Any]:
        """Change a run's policy or override and return its control; refused if another command comes first."""
        path = run_path(run_id)
        revision = self.get(f"{path}/policy")["policy_revision"]
        return self._request(
            method,
            f"{path}/{what}",
            params={"note": note} if note else {},
            headers={"If-Match": f'"{revision}"'},
            **({} if body is None else {"json": body}),
        )

    def replay(self, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
        """Let the controller replay a run, however long it takes."""
        return self._request("POST", f"{run_path(run_id)}/replay", json=body, timeout=_REPLAY_SECONDS)

    def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._client.request(method, self._url + path, **options)
            answer = response.json(object_hook=_Answer)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            raise GnsError(
                f"no controller answers at {self._url}; start one with `gns-controller serve` or correct --url."
            ) from None
        if not isinstance(answer, dict):
            raise GnsError(f"{self._url} is not a controller.")
        if response.is_error:
            raise GnsError(_sentence(answer, response.status_code))
        return answer


def is_address(url: str) -> bool:
    """Return whether a URL names scheme and host, so that a request can be sent there."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return address.scheme in ("http", "https") and bool(address.host)


def read_as(model: type[Model], answer: dict[str, Any]) -> Model:
    """Read an answer of the controller as a model.

    Raises:
        GnsError: the answer is something else.
    """
    try:
        return model.model_validate(answer, context=KEEP_UNKNOWN)
    except ValidationError:
        raise GnsError(
            "the controller's answer has fields that this version does not know, or lacks some: it is of another "
            "version. Use the gns-controller command that belongs to it."
        ) from None


def run_path(run_id: str) -> str:
    """Return the path of a run in the API."""
    return f"/api/v1/runs/{quote(run_id, safe='')}"


def decision_shown(client: ControllerClient, view: dict[str, Any]) -> dict[str, Any]:
    """Return the last decision; of a finished run the last one with a reading, for the report at its end has none."""
    last: dict[str, Any] = view["last_decision"] or {}
    if view["state"] == "finished" and last.get("reason") == "hold_no_reading":
        page = client.get(f"{run_path(view['run_id'])}/decisions", order="desc", limit=100)
        decisions = (item["decision"] for item in page["items"])
        return next((decision for decision in decisions if decision["reason"] != "hold_no_reading"), last)
    return last


def exported(client: ControllerClient, run_id: str) -> Iterator[str]:
    """Yield the lines of a run's export, as it is now: later measurements of a run that goes on are left out."""
    path = run_path(run_id)
    newest = client.get(f"{path}/measurements", limit=1, order="desc")["items"]
    until = newest[0]["sequence"] if newest else -1
    view = client.get(path)
    run = read_as(ExportedRun, {key: view[key] for key in ("run_id", "specification", "policy", "policy_revision")})
    controls = [{"kind": "control", **item} for item in client.pages(f"{path}/controls")]
    yield from export_lines(run, _in_order(client, path, controls, until=until))


def _in_order(
    client: ControllerClient, path: str, controls: list[dict[str, Any]], *, until: int
) -> Iterator[ExportedMeasurement | dict[str, Any]]:
    waiting = iter(controls)
    control = next(waiting, None)
    measured = zip(client.pages(f"{path}/measurements"), client.pages(f"{path}/decisions"), strict=False)
    for measurement, decision in measured:
        if measurement["sequence"] > until:
            break
        while control is not None and control["sequence"] < measurement["sequence"]:
            yield control
            control = next(waiting, None)
        yield read_as(ExportedMeasurement, {**measurement, "decision": decision["decision"]})
    while control is not None:
        yield control
        control = next(waiting, None)


def _sentence(problem: dict[str, Any], status: int) -> str:
    errors = problem.get("errors") or []
    if len(errors) == 1 and not (errors[0].get("pointer") or errors[0].get("parameter")):
        return f"{str(errors[0]['detail']).removesuffix('.')}."
    named = [f"{error.get('pointer') or error.get('parameter') or 'body'}: {error['detail']}" for error in errors]
    return "; ".join(named) or str(problem.get("detail", f"the controller answered {status}."))

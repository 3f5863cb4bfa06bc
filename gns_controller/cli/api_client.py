"""A controller over HTTP, as the commands talk to it, and the export of a run."""

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
    """An object of an answer; whoever lacks a field that we read is no controller of ours."""

    def __missing__(self, key: str) -> Any:
        raise GnsError(f"the answer has no {key!r}: --url does not lead to a controller, or to one of another version.")


class Remote:
    """A controller at this address. Close it, or use it as a context.

    Args:
        url: with scheme.
        token: bearer token; empty for none.

    Raises:
        InvalidInputError: this is no address.
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
        """One resource.

        Raises:
            GnsError: nobody answers, or with a problem.
        """
        return self._request("GET", path, params=parameters)

    def pages(self, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page after page."""
        cursor: dict[str, str] = {}
        while True:
            page = self.get(path, limit=_PAGE, **cursor, **parameters)
            yield from page["items"]
            if page["next_cursor"] is None:
                return
            cursor = {"cursor": page["next_cursor"]}

    def speak(self, method: str, run_id: str, what: str, *, note: str = "", body: Any = None) -> dict[str, Any]:
        """Change a run's policy or override, unless somebody else does meanwhile; the answer says who decides now."""
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
        """A replay by the controller, however long it takes."""
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
    """Whether a request can be sent there at all: it names scheme and host."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return address.scheme in ("http", "https") and bool(address.host)


def read_as(model: type[Model], answer: dict[str, Any]) -> Model:
    """An answer of the controller as what it should be.

    Raises:
        GnsError: it is something else.
    """
    try:
        return model.model_validate(answer, context=KEEP_UNKNOWN)
    except ValidationError:
        raise GnsError(
            "the controller's answer has fields that this version does not know, or lacks some: it is of another "
            "version. Use the gns-controller command that belongs to it."
        ) from None


def run_path(run_id: str) -> str:
    """Path of a run in the API."""
    return f"/api/v1/runs/{quote(run_id, safe='')}"


def decision_shown(remote: Remote, view: dict[str, Any]) -> dict[str, Any]:
    """The last decision; of a finished run the last one with a reading, for the report at its end has none."""
    last: dict[str, Any] = view["last_decision"] or {}
    if view["state"] == "finished" and last.get("reason") == "hold_no_reading":
        page = remote.get(f"{run_path(view['run_id'])}/decisions", order="desc", limit=100)
        decisions = (item["decision"] for item in page["items"])
        return next((decision for decision in decisions if decision["reason"] != "hold_no_reading"), last)
    return last


def exported(remote: Remote, run_id: str) -> Iterator[str]:
    """The lines of a run's export, as it is now: later measurements of a run that goes on are left out."""
    path = run_path(run_id)
    newest = remote.get(f"{path}/measurements", limit=1, order="desc")["items"]
    until = newest[0]["sequence"] if newest else -1
    view = remote.get(path)
    run = read_as(ExportedRun, {key: view[key] for key in ("run_id", "specification", "policy", "policy_revision")})
    controls = [{"kind": "control", **item} for item in remote.pages(f"{path}/controls")]
    yield from export_lines(run, _in_order(remote, path, controls, until=until))


def _in_order(
    remote: Remote, path: str, controls: list[dict[str, Any]], *, until: int
) -> Iterator[ExportedMeasurement | dict[str, Any]]:
    waiting = iter(controls)
    control = next(waiting, None)
    measured = zip(remote.pages(f"{path}/measurements"), remote.pages(f"{path}/decisions"), strict=False)
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

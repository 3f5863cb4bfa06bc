"""What every request passes: a request id, the token, the body limit, security headers, timing, the last safety net.

Plain ASGI instead of Starlette's BaseHTTPMiddleware, which would buffer event streams.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gns_controller.service.metrics import Metrics
from gns_controller.service.settings import Settings, is_loopback
from gns_controller.service.tokens import is_accepted
from gns_controller.web.problems import (
    BODY_TOO_LARGE,
    FOREIGN_ORIGIN,
    INTERNAL_ERROR,
    UNAUTHORIZED,
    ProblemError,
    RequestNotes,
    problem_response,
)

logger = logging.getLogger(__name__)

_SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = ("/livez", "/readyz", "/startupz", "/")
_OPEN_FOLDERS = ("/static/", "/runs/")
_READING_METHODS = ("GET", "HEAD")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _SAFE_REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        notes = scope["gns_notes"] = RequestNotes(request_id)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    answer.setdefault(name, value)
                if scope["path"].startswith("/api/"):
                    answer.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._admit(scope, headers)
            await self._app(scope, self._limited(receive), send_with_headers)
        except ProblemError as error:
            notes.problem = error.kind.slug
            await problem_response(error, request_id=request_id)(scope, receive, send_with_headers)
        except Exception:
            logger.exception("request failed: request_id=%s method=%s", request_id, scope["method"])
            if status:
                raise
            failure = ProblemError(INTERNAL_ERROR, "The controller has failed; its log has the request_id.")
            await problem_response(failure, request_id=request_id)(scope, receive, send_with_headers)
        finally:
            self._observe(scope, notes, status=status or 499, seconds=time.perf_counter() - began)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        is_open = path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS)
        hashes = self._settings.token_hashes
        if hashes and not is_open and not is_accepted(headers.get("authorization", ""), token_hashes=hashes):
            raise ProblemError(
                UNAUTHORIZED,
                "Send Authorization: Bearer <token>, with a token that this controller knows.",
                headers={"WWW-Authenticate": 'Bearer realm="gns-controller"'},
            )
        if not hashes and scope["method"] not in _READING_METHODS:
            self._refuse_foreign(host=headers.get("host", "").lower(), origin=headers.get("origin"))
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _refuse_foreign(self, *, host: str, origin: str | None) -> None:
        """Without tokens a page of any site could write through the browser, under its name or one that it rebinds."""
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name and name != self._settings.host.lower() and not is_loopback(name):
            raise ProblemError(
                FOREIGN_ORIGIN,
                "A controller without tokens is written to as localhost, 127.0.0.1 or [::1] only, and the Host header "
                "names another. Use one of these, or set GNS_TOKEN_HASHES.",
            )
        if origin is not None and origin.lower().partition("://")[2] != host:
            raise ProblemError(
                FOREIGN_ORIGIN,
                "A controller without tokens is not written to by pages of another origin. Use its own page, or set "
                "GNS_TOKEN_HASHES.",
            )

    def _limited(self, receive: Receive) -> Receive:
        """Count the body as it arrives: a chunked one does not say its length."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._settings.max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ProblemError:
        return ProblemError(
            BODY_TOO_LARGE,
            f"A body has at most {self._settings.max_body_bytes} bytes; send the measurements in several requests.",
            headers={"Connection": "close"},
        )

    def _observe(self, scope: Scope, notes: RequestNotes, *, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_seconds.labels(route=route, method=method, status=status).observe(seconds)
        if notes.problem is not None and method == "POST" and scope["path"].endswith("/measurements"):
            self._metrics.rejected.labels(reason=notes.problem).inc()

"""One process that serves: store, controller, metrics, application and uvicorn, built up and taken down in order."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
from datetime import UTC, datetime
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from gns_controller.core.errors import InvalidInputError, PortTakenError
from gns_controller.core.policies import plug_ins
from gns_controller.service.controller import Controller
from gns_controller.service.metrics import Metrics
from gns_controller.service.settings import Settings
from gns_controller.store import SqlStore
from gns_controller.store.administration import hide_password
from gns_controller.web import create_app

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 2
"""Requests still open this long after SIGTERM are cut off."""


class _Server(uvicorn.Server):
    """A uvicorn server that ends streams when it stops, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, *, app: FastAPI, listening: str, ready_file: Path | None) -> None:
        super().__init__(config)
        self._app, self._listening, self._ready_file = app, listening, ready_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Write the ready file and print the address once the port answers."""
        await super().startup(sockets=sockets)
        url = self._listening.split(" ")[0]
        if self._ready_file is not None:
            partial = self._ready_file.with_name(self._ready_file.name + ".partial")
            partial.write_text(url)
            os.replace(partial, self._ready_file)
        print(f"gns-controller listening on {self._listening}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wake waiting requests, then shut down as usual."""
        self._app.state.service.streams.stop()
        await super().shutdown(sockets=sockets)


def serve_forever(settings: Settings, *, ready_file: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        InvalidInputError: the settings would open the service to others without tokens.
        PortTakenError: the port is in use.
        StoreError: the database cannot be used.
    """
    if not settings.is_loopback and not settings.token_hashes:
        raise InvalidInputError(
            f"listening on {settings.host} would let others in without a token. Make one with `gns-controller token "
            "create` and set GNS_TOKEN_HASHES, or listen on 127.0.0.1."
        )
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for plug_in in plug_ins():  # a problem is logged where it is found
        if plug_in.problem is None:
            logger.info("policy plug-in: policy=%s distribution=%s", plug_in.name, plug_in.distribution)
    listener = _listen(settings.host, settings.port)
    try:
        metrics = Metrics(_registry())
        store = SqlStore(
            settings.database_url, queue_size=settings.write_queue_size, observe_commit=metrics.observe_commit
        )
        try:
            _run(settings, listener, store=store, metrics=metrics, ready_file=ready_file)
        finally:
            store.close()
    finally:
        listener.close()


def build_app(settings: Settings, *, store: SqlStore, metrics: Metrics) -> FastAPI:
    """Return the application over an open store."""
    controller = Controller(
        store=store,
        metrics=metrics,
        clock=lambda: datetime.now(UTC),
        silent_after_seconds=settings.silent_after_seconds,
        metrics_retention_seconds=settings.metrics_retention_seconds,
        metrics_max_runs=settings.metrics_max_runs,
        replay_max_measurements=settings.replay_max_measurements,
    )
    metrics.watch(controller.live_runs, num_queued=controller.num_queued)
    return create_app(controller, settings, metrics)


def _run(
    settings: Settings, listener: socket.socket, *, store: SqlStore, metrics: Metrics, ready_file: Path | None
) -> None:
    app = build_app(settings, store=store, metrics=metrics)
    config = uvicorn.Config(
        app,
        workers=1,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    listening = f"http://{host}:{listener.getsockname()[1]} (database {hide_password(settings.database_url)})"
    server = _Server(config, app=app, listening=listening, ready_file=ready_file)

    def stop(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again once it is done
        signal.signal(number, stop)
    server.run(sockets=[listener])


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(
                f"port {port} is in use. Stop whatever listens there, or choose another: --port 0 takes a free one."
            ) from None
        raise InvalidInputError(f"this machine cannot listen on {host}:{port}: {error.strerror}.") from None
    return listener

"""The application: routes, the gate around them, and nothing that is not handed in."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from gns_controller.service.controller import Controller
from gns_controller.service.metrics import Metrics
from gns_controller.service.settings import Settings
from gns_controller.web.dependencies import Service
from gns_controller.web.middleware import Gate
from gns_controller.web.openapi import describe
from gns_controller.web.problems import add_handlers
from gns_controller.web.routes import events, health, operators, page, runs
from gns_controller.web.streams import Streams


def create_app(controller: Controller, settings: Settings, metrics: Metrics) -> FastAPI:
    """An ASGI application over this controller; `app.state.service.streams.stop()` ends what waits."""
    app = FastAPI(
        title="gns-controller",
        version=version("gns-controller"),
        description="Batch-size plans from measured gradient noise scales.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    streams = Streams(controller.subscriptions, limit=settings.max_event_streams)
    app.state.service = Service(controller=controller, settings=settings, metrics=metrics, streams=streams)
    routers = (runs.router, operators.router, events.router, health.router, page.router)
    for router in routers:
        app.include_router(router)
    app.state.own_routes = [route for router in routers for route in router.routes]
    page.add_files(app)
    add_handlers(app)
    describe(app, asks_for_tokens=bool(settings.token_hashes))
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    return app

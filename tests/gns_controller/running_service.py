"""A service for tests: the real application over a real SQLite file, in this process or in one of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, generate_latest

from gns_controller.service.controller import Controller
from gns_controller.service.metrics import Metrics
from gns_controller.service.settings import Settings
from gns_controller.store import SqlStore
from gns_controller.web import create_app
from tests.gns_controller.core.measurements import measurement, reading
from tests.running import ControllerProcess


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class _InProcess(httpx.BaseTransport):
    """Requests of any thread, answered by the application on one event loop, as under uvicorn."""

    def __init__(self, app: Any) -> None:
        self._inner = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop).result(30)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        if isinstance(request.stream, httpx.SyncByteStream) and not isinstance(request.stream, httpx.AsyncByteStream):
            content = _chunks(list(request.stream))
            request = httpx.Request(request.method, request.url, headers=request.headers, content=content)
        response = await self._inner.handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


async def _chunks(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


class Service:
    """The application in this process."""

    def __init__(self, database_url: str, **changes: Any) -> None:
        self.settings = Settings(database_url=database_url, **changes)
        self.clock = Clock()
        self.metrics = Metrics(CollectorRegistry())
        self.store = SqlStore(
            database_url, queue_size=self.settings.write_queue_size, observe_commit=self.metrics.observe_commit
        )
        self.controller = Controller(
            store=self.store,
            metrics=self.metrics,
            clock=self.clock,
            silent_after_seconds=self.settings.silent_after_seconds,
            metrics_retention_seconds=self.settings.metrics_retention_seconds,
            metrics_max_runs=self.settings.metrics_max_runs,
            replay_max_measurements=self.settings.replay_max_measurements,
        )
        self.metrics.watch(self.controller.live_runs, num_queued=self.controller.num_queued)
        self.app = create_app(self.controller, self.settings, self.metrics)
        self.transport = _InProcess(self.app)
        self.client = httpx.Client(transport=self.transport, base_url="http://127.0.0.1:8000", timeout=20.0)

    def close(self) -> None:
        self.client.close()
        self.store.close()

    def register(self, run_id: str = "run", **changes: Any) -> httpx.Response:
        return self.client.put(f"/api/v1/runs/{run_id}", json=registration(**changes))

    def report(self, *reports: dict[str, Any], run_id: str = "run") -> httpx.Response:
        return self.client.post(f"/api/v1/runs/{run_id}/measurements", json={"measurements": list(reports)})

    def sample(self, name: str, **labels: str) -> float | None:
        """One value of /metrics."""
        return self.metrics.registry.get_sample_value(name, labels)

    def exposition(self) -> str:
        return generate_latest(self.metrics.registry).decode()


def registration(*, incarnation: str = "incarnation-0", resume_step: int = 0, **changes: Any) -> dict[str, Any]:
    """Body of a PUT: two ranks, 16 samples a step, the published rule."""
    specification = {
        "batch": {"global_batch_size": 16, "micro_batch_size": 32},
        "data_parallel_size": 2,
        "budget_samples": 100_000,
        "policy": {"policy": "noise_scale", "estimator": "rank_variance", "noise_tolerance": 0.5},
        **changes,
    }
    return {"specification": specification, "incarnation": incarnation, "resume_step": resume_step}


def report(step: int, *, noise_scale: float = 16.0, reading_changes: Any = None, **changes: Any) -> dict[str, Any]:
    """One measurement as JSON."""
    one = reading(noise_scale=noise_scale, **(reading_changes or {}))
    document: dict[str, Any] = json.loads(measurement(step, one, **changes).model_dump_json())
    return document


class Server(ControllerProcess):
    """A controller in a process of its own, and one client for as long as the process runs."""

    http: httpx.Client

    def start(self) -> Server:
        super().start()
        self.http = httpx.Client(base_url=self.url, timeout=20.0, trust_env=False)
        return self

    def kill(self) -> None:
        self.http.close()
        super().kill()

    def stop(self) -> int | None:
        status = super().stop()
        self.http.close()
        return status


def run_cli(*arguments: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line in a folder of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GNS_")}
    done = subprocess.run(
        [sys.executable, "-m", "gns_controller", *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr

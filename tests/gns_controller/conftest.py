from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gns_controller.running_service import Server, Service


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """A maker of applications with settings of their own."""
    made: list[Service] = []

    def make(**changes: Any) -> Service:
        made.append(Service(changes.pop("database_url", f"sqlite:///{tmp_path}/gns.db"), **changes))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server in a process of its own."""
    running = Server(tmp_path).start()
    yield running
    running.stop()

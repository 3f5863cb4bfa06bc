"""Every setting, metric, endpoint and problem is named in docs/reference, and nothing there is out of date."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from gns_controller.service.metrics import READING_METRICS, RUN_METRICS, LiveRuns, Metrics
from gns_controller.service.settings import Settings
from gns_controller.web.problems import PROBLEM_TYPES
from tests.gns_controller.running_service import Service

REFERENCE = Path(__file__).parent.parent.parent / "docs" / "reference"


def text_of(name: str) -> str:
    return (REFERENCE / name).read_text()


def test_every_setting_is_documented_with_its_default() -> None:
    text = text_of("configuration.md")
    rows = dict(re.findall(r"^\| `(GNS_[A-Z_]+)` \| ([^|]*) \|", text, re.MULTILINE))
    assert set(rows) == {f"GNS_{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "empty" if default == () else f"`{default}`"
        assert rows[f"GNS_{name.upper()}"].strip() == shown, name


def test_every_metric_is_documented_and_no_other() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.watch(lambda: LiveRuns([], {"running": 0}), num_queued=lambda: 0)
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()}
    assert {metric.name for metric in (*RUN_METRICS, *READING_METRICS)} <= exported
    named = re.findall(r"^\| `(gns_[a-z_]+)", text_of("metrics.md"), re.MULTILINE)
    assert sorted(named) == sorted(exported)


def test_every_endpoint_is_documented_and_no_other(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    exported = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    named = set(re.findall(r"^### `([A-Z]+ [^`]+)`", text_of("rest.md"), re.MULTILINE))
    assert named == exported


def test_every_problem_is_documented_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", text_of("rest.md"), re.MULTILINE))
    assert rows == {kind.slug: str(kind.status) for kind in PROBLEM_TYPES}

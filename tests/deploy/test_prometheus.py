"""deploy/prometheus and deploy/grafana against Prometheus itself, scraping a controller that runs report to."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.browser.feeding import WireRun
from tests.real_run import RealRun
from tests.running import ControllerProcess, tool

pytestmark = pytest.mark.prometheus

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "run.json").read_text())
PATIENCE_SECONDS = 40.0
"""For everything that must have arrived, counted from the start: one fault must not cost this per panel."""
LEAST_PATIENCE_SECONDS = 2.0
RUN_ID = "real-run"
STEADY_RUN_ID = "steady-run"
MAY_BE_MISSING = ("gns_noise_scale_high_samples",)
"""Asked of the steady run: a job as short as ours may end before its noise scale has an upper end."""


def _promtool(*arguments: str, cwd: Path = PROMETHEUS) -> None:
    done = subprocess.run([tool("promtool"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "rules.yml"):
        (tmp_path / name).write_text((PROMETHEUS / name).read_text())
    (tmp_path / "gns-token").write_text("anything")
    _promtool("check", "config", "prometheus.yml", cwd=tmp_path)
    _promtool("check", "rules", "rules.yml")


def test_the_alerts_fire_when_they_should_and_not_before() -> None:
    _promtool("test", "rules", "rules_test.yml")


class ScrapedController:
    """Prometheus under deploy's configuration, made quick, with deploy's rules and a token."""

    def __init__(self, directory: Path, controller: ControllerProcess) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / "rules.yml")]
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{controller.port}"]}]
        (directory / "gns-token").write_text(controller.token or "")
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = directory / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )
        self.started = time.monotonic()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10)

    def get(self, path: str, **parameters: str) -> Any:
        response = self.http.get(f"/api/v1/{path}", params=parameters)
        body = response.json()
        assert body["status"] == "success", f"{parameters}: {body}"
        return body["data"]

    def until(self, question: Any, about: str) -> Any:
        deadline = max(self.started + PATIENCE_SECONDS, time.monotonic() + LEAST_PATIENCE_SECONDS)
        while True:
            try:
                answer = question()
            except (httpx.TransportError, json.JSONDecodeError):
                answer = None
            if answer:
                return answer
            if time.monotonic() > deadline:
                raise AssertionError(f"never seen: {about}\n{self.log.read_text()[-2000:]}")
            time.sleep(0.25)

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(15)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScrapedController]:
    """A controller that a real job reports to, and the Prometheus that watches it."""
    tool("prometheus")
    controller = ControllerProcess(tmp_path_factory.mktemp("controller"), guarded=True).start()
    ended = threading.Event()
    feeder = threading.Thread(target=_feed, args=(controller, ended))
    feeder.start()
    job = RealRun(controller, tmp_path_factory.mktemp("job"), run_id=RUN_ID)
    prometheus = None
    try:
        job.until_registered()
        prometheus = ScrapedController(tmp_path_factory.mktemp("prometheus"), controller)
        yield prometheus
    finally:
        ended.set()
        feeder.join(30)
        job.stop()
        if prometheus is not None:
            prometheus.stop()
        controller.stop()


def _feed(controller: ControllerProcess, ended: threading.Event) -> None:
    """What a healthy job does not do, over and over: retries, refusals, and readings that broke."""
    with controller.client() as client:
        run = WireRun(client, "troubled").register()
        run.report(20)
        steady = WireRun(client, STEADY_RUN_ID).register()
        steady.report(8, readings=(steady.reading("matrices", "spectral", 500.0).model_copy(update={"progress": 1.0}),))
        while not ended.wait(0.2):
            broken = run.reading("matrices", "spectral", 500.0).model_copy(update={"noise": float("inf")})
            run.report(readings=(broken,))
            run.report(validation_loss=3.0)
            run.repeat()
            stale = run.last[0].model_copy(update={"attempt": run.attempt + 1}).model_dump(mode="json")
            client.post("/api/v1/runs/troubled/measurements", json={"measurements": [stale]})


def _expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_prometheus_scrapes_the_controller_with_the_token(scraped: ScrapedController) -> None:
    target = scraped.until(
        lambda: [one for one in scraped.get("targets")["activeTargets"] if one["health"] == "up"], "a target that is up"
    )
    assert target[0]["labels"]["job"] == "gns-controller"


@pytest.mark.parametrize(("title", "expression"), _expressions(), ids=lambda value: re.sub(r"\W+", " ", value)[:60])
def test_every_panel_of_the_dashboard_has_data(scraped: ScrapedController, title: str, expression: str) -> None:
    run_id = STEADY_RUN_ID if expression.startswith(MAY_BE_MISSING) else RUN_ID
    query = expression.replace("$run_id", run_id).replace("$__rate_interval", "10s")
    assert "$" not in query
    result = scraped.until(lambda: scraped.get("query", query=query)["result"], f"{title}: {query}")
    assert all(series["value"][1] not in ("NaN", "+Inf", "-Inf") for series in result), result


def test_the_dashboard_finds_its_runs(scraped: ScrapedController) -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    metric = re.fullmatch(r"label_values\((\w+), run_id\)", variable["definition"])
    assert metric
    names = scraped.until(lambda: scraped.get("label/run_id/values", **{"match[]": metric[1]}), "names of runs")
    assert RUN_ID in names


def test_the_alert_rules_are_loaded_and_healthy(scraped: ScrapedController) -> None:
    def evaluated() -> list[dict[str, Any]]:
        rules = [rule for group in scraped.get("rules")["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] == "ok" for rule in rules) else []

    rules = scraped.until(evaluated, "rules that were evaluated")
    assert {rule["name"] for rule in rules} == {"GnsTrainerSilent", "GnsNoiseScaleUnresolved"}
    assert all({"summary", "description", "runbook"} <= set(rule["annotations"]) for rule in rules)


def test_every_exported_metric_that_an_alert_names_exists(scraped: ScrapedController) -> None:
    for metric in ("gns_run_silent", "gns_unresolved"):
        scraped.until(lambda metric=metric: scraped.get("query", query=metric)["result"], metric)

"""The page in a real Chromium, fed by a real torchrun job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Page
from tests.real_run import RealRun
from tests.running import ControllerProcess

pytestmark = [pytest.mark.browser, pytest.mark.distributed]

DRAWN = (("noise", "--noise"), ("noise", "--ceiling"), ("batch", "--batch"), ("rate", "--rate"), ("loss", "--loss"))
PACE_SECONDS = 0.02
"""Per step: time for a person to open the page while the job trains."""


def get(controller: ControllerProcess, path: str, **query: Any) -> Any:
    return httpx.get(f"{controller.url}/api/v1/{path}", params=query).raise_for_status().json()


def test_a_person_watches_a_real_job_from_its_first_decision_to_its_end(
    page: Page, controller: ControllerProcess, tmp_path: Path
) -> None:
    run = RealRun(controller, tmp_path, run_id="real-run", pace_seconds=PACE_SECONDS)
    try:
        page.open(controller.url)
        run.until_registered()
        page.until(lambda: page.all("tr[data-run='real-run']"), "the run in the list")
        page.open(f"{controller.url}/runs/real-run")
        page.run("window.loadedOnce = true")
        page.until(lambda: page.all(".decisions tbody tr"), "a first decision")
        early = len(page.all(".decisions tbody tr"))
        assert run.is_training(), "the job ended before anyone could watch it"
        page.until(lambda: len(page.all(".decisions tbody tr")) > early, "more decisions, without reload")
        run.wait()
    finally:
        run.stop()
    page.until_seen("finished", "main")
    assert page.run("return window.loadedOnce") is True

    view = get(controller, "runs/real-run")
    assert view["samples_seen"] == run.budget_samples
    grown = view["plan"]["global_batch_size"]
    assert grown > 16
    page.until_seen(f"{grown:,}", ".tiles")
    assert f"{view['last_measurement']['validation_loss']:.3f}" in page.seen("main")
    assert "Muon + AdamW" in page.seen("main")

    decisions = [item["decision"] for item in get(controller, "runs/real-run/decisions", limit=500)["items"]]
    changes = [d for d in decisions if d["plan"]["global_batch_size"] != d["previous_batch_size"]]
    page.find("label:has(input[type=checkbox])").click()
    page.until(lambda: len(page.all(".decisions tbody tr")) == len(changes), "only the changes")
    table = page.seen(".decisions")
    for decision in changes:
        assert decision["explanation"] in table
        assert decision["reason"].replace("_", " ") in table
        assert f"{decision['previous_batch_size']:,} → {decision['plan']['global_batch_size']:,}" in table

    assert f"{view['last_measurement']['loss']:.3f}" in page.seen(".tiles")
    for chart, ink in DRAWN:
        page.until(lambda chart=chart, ink=ink: page.ink(chart, ink) > 100, f"{ink} in chart {chart}")

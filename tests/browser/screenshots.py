"""Take the pictures of the guide: python -m tests.browser.screenshots DATABASE [FOLDER]. Default folder: docs/images.

A real controller seen in Chromium. What a demonstration recorded: run-list.png and run-page.png. A run of
tests.browser.feeding that is still under way: run-ahead.png, and run-what-if.png, another policy tried on its past.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.browser.conftest import Page, start_browser
from tests.browser.feeding import WireRun
from tests.running import ControllerProcess

DRAW_SECONDS = 1.0
PIN = {"kind": "pin", "global_batch_size": 256, "note": "half of the node is on loan until tonight"}
EDIT = """
const text = document.querySelector("#policy-text");
text.value = arguments[0];
text.dispatchEvent(new Event("input"));
"""


def take(database: Path, folder: Path) -> None:
    """All pictures, into `folder`; run-page.png is the run that the split rule ramped."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        controller = ControllerProcess(Path(directory))
        shutil.copy(database, controller.database_url.removeprefix("sqlite:///"))
        controller.start()
        driver = start_browser(Path(directory) / "chromium")
        try:
            runs = httpx.get(f"{controller.url}/api/v1/runs").raise_for_status().json()["items"]
            names = [run["run_id"] for run in runs]
            page = Page(driver)
            page.resize(1360, 560)
            page.open(controller.url)
            page.until_seen("finished")
            _picture(page, folder / "run-list.png")
            page.resize(1360, 1720)
            page.open(f"{controller.url}/runs/{next(name for name in names if name.endswith('-split'))}")
            page.until(lambda: page.all("canvas") and page.all(".decisions tbody tr"), "charts and decisions")
            page.find("label:has(input[type=checkbox])").click()
            _picture(page, folder / "run-page.png")
            _steered(page, controller, folder)
        finally:
            driver.quit()
            controller.stop()


def _steered(page: Page, controller: ControllerProcess, folder: Path) -> None:
    """A run under way that was pinned for a while: as it stands, and another policy tried on its past."""
    name = "llama-160m"
    with controller.client() as client:
        override, tag = f"/api/v1/runs/{name}/override", {"If-Match": "*"}
        run = WireRun(client, name, seed=3).register()
        run.train_until(0.2)
        client.post(override, json=PIN, headers=tag).raise_for_status()
        run.train_until(0.26)
        client.delete(override, headers=tag).raise_for_status()
        run.train_until(0.3)
        while not _has_band(client.get(f"/api/v1/runs/{name}/schedule").raise_for_status().json()["projection"]):
            run.report()
    page.resize(1360, 1060)
    page.open(f"{controller.url}/runs/{name}")
    page.until(lambda: page.find(".edit-policy").is_enabled() and page.all("canvas"), "the policy")
    _picture(page, folder / "run-ahead.png")
    page.resize(1360, 900)
    page.find(".edit-policy").click()
    policy = json.loads(page.run("return document.querySelector('#policy-text').value"))
    page.run(EDIT, json.dumps({**policy, "noise_tolerance": 0.8}, indent=2))
    page.find(".what-if").click()
    page.until_seen("optimizer steps instead of", ".outcome")
    _picture(page, folder / "run-what-if.png")


def _has_band(projection: dict[str, Any]) -> bool:
    return bool(projection["steps_left"]["least"] < projection["steps_left"]["most"])


def _picture(page: Page, path: Path) -> None:
    time.sleep(DRAW_SECONDS)
    page.driver.save_screenshot(str(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("database", type=Path, help="SQLite file that a demonstration wrote")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[2] / "docs" / "images")
    options = parser.parse_args()
    take(options.database, options.folder)

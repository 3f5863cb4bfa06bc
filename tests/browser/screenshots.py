"""Take the pictures of the guide: python -m tests.browser.screenshots [folder, default docs/images].

A real controller, runs from feeding.py, Chromium. Writes run-list.png and run-page.png.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.browser.conftest import Page, start_browser
from tests.browser.feeding import WireRun, holding, specification
from tests.running import ControllerProcess

DRAW_SECONDS = 1.0


def take(folder: Path) -> None:
    """Both pictures, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        controller = ControllerProcess(Path(directory)).start()
        driver = start_browser(Path(directory) / "chromium")
        try:
            page = Page(driver)
            _feed(controller)
            page.resize(1360, 560)
            page.open(controller.url)
            page.until_seen("finished")
            _picture(page, folder / "run-list.png")
            page.resize(1360, 1560)
            page.open(f"{controller.url}/runs/llama-160m.muon")
            page.until(lambda: page.all("canvas") and page.all(".decisions tbody tr"), "charts and decisions")
            _picture(page, folder / "run-page.png")
        finally:
            driver.quit()
            controller.stop()


def _feed(controller: ControllerProcess) -> None:
    with controller.client() as client:
        WireRun(client, "llama-160m.constant", holding(optimizer="AdamW"), seed=2).register().train_until(1.0)
        shadow = specification(mode="shadow", optimizer="Signum", description="What would it have done?")
        WireRun(client, "llama-60m.shadow", shadow, seed=5).register().train_until(0.2)
        described = specification(description="Baseline recipe on two nodes, second seed.")
        run = WireRun(client, "llama-160m.muon", described, seed=3).register()
        run.train_until(0.2)
        run.report(loss="NaN")
        run.train_until(0.62)
        WireRun(client, "llama-1b.queued", seed=1).register()


def _picture(page: Page, path: Path) -> None:
    time.sleep(DRAW_SECONDS)
    page.driver.save_screenshot(str(path))


if __name__ == "__main__":
    take(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "images")

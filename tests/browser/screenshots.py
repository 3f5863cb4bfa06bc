"""Take the pictures of the guide: python -m tests.browser.screenshots DATABASE [FOLDER]. Default folder: docs/images.

What a demonstration recorded, served by a real controller, seen in Chromium. Writes run-list.png and run-page.png.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import httpx

from tests.browser.conftest import Page, start_browser
from tests.running import ControllerProcess

DRAW_SECONDS = 1.0


def take(database: Path, folder: Path) -> None:
    """Both pictures, into `folder`; the page of the run that the split rule ramped."""
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
        finally:
            driver.quit()
            controller.stop()


def _picture(page: Page, path: Path) -> None:
    time.sleep(DRAW_SECONDS)
    page.driver.save_screenshot(str(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("database", type=Path, help="SQLite file that a demonstration wrote")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[2] / "docs" / "images")
    options = parser.parse_args()
    take(options.database, options.folder)

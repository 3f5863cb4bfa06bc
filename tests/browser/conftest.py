"""A person at a browser: Chromium on a real controller that a run reports to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.feeding import WireRun
from tests.running import ControllerProcess, tool

PATIENCE_SECONDS = 15
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1360,1500",
)

COUNT_INK = """
const canvas = document.querySelector(`[data-chart="${arguments[0]}"] canvas`);
const hex = getComputedStyle(document.documentElement).getPropertyValue(arguments[1]).trim();
const wanted = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let count = 0;
for (let at = 0; at < data.length; at += 4) {
  if (data[at + 3] > 200 && wanted.every((value, channel) => Math.abs(data[at + channel] - value) < 12)) count += 1;
}
return count;
"""


class Page:
    """One tab, and the questions the tests ask about what is seen in it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.expected_errors: tuple[str, ...] = ()

    def open(self, url: str) -> None:
        self.driver.get(url)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def seen(self, selector: str = "body") -> str:
        """The visible text of one element."""
        return self.find(selector).text

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def ink(self, chart: str, name: str) -> int:
        """How many pixels of one chart have the colour that the page's style calls by this name."""
        return int(self.run(COUNT_INK, chart, name))

    def run_async(self, script: str) -> Any:
        """The value of an async function's body that runs in the page."""
        wrapped = f"const done = arguments[0]; (async () => {{ {script} }})().then(done, (e) => done(String(e)))"
        return self.driver.execute_async_script(wrapped)

    def until(self, question: Callable[[], Any], about: str) -> Any:
        """Ask until the answer is true, and say what was asked if it never is."""
        wait = WebDriverWait(
            self.driver,
            PATIENCE_SECONDS,
            poll_frequency=0.1,
            ignored_exceptions=[NoSuchElementException, StaleElementReferenceException],
        )
        return wait.until(lambda _: question(), f"never seen: {about}. On the page:\n{self.seen()}")

    def until_seen(self, text: str, selector: str = "body") -> None:
        self.until(lambda: text in self.seen(selector), f"{text!r} in {selector}")

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        ]

    def severe(self) -> list[str]:
        """Console errors since the last call, without those the test announced."""
        messages = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in messages if not any(part in message for part in self.expected_errors)]


def start_browser(profile: Path) -> webdriver.Chrome:
    """Headless Chromium with a profile of its own."""
    options = Options()
    options.binary_location = tool("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(tool("chromedriver")))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = start_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome) -> Iterator[Page]:
    """A fresh tab; a script error or a refused resource fails the test."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    page = Page(browser)
    page.requests()
    page.severe()
    yield page
    errors = page.severe()
    browser.close()
    browser.switch_to.window(first)
    assert errors == []


@pytest.fixture(scope="session")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    """One controller for the tests that do not break it."""
    process = ControllerProcess(tmp_path_factory.mktemp("controller")).start()
    yield process
    process.stop()


@pytest.fixture
def own_controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    """A controller that a test may stop and start; not started yet."""
    process = ControllerProcess(tmp_path)
    yield process
    process.stop()


@pytest.fixture
def guarded_controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    """A controller that answers nobody without a token."""
    process = ControllerProcess(tmp_path, guarded=True).start()
    yield process
    process.stop()


@pytest.fixture
def trainer(controller: ControllerProcess) -> Iterator[Callable[..., WireRun]]:
    """Starts runs that report to `controller`: trainer(run_id, specification=..., seed=...)."""
    with controller.client() as client:
        yield lambda run_id, **arguments: WireRun(client, run_id, **arguments).register()


@pytest.fixture(scope="session")
def ramped_run(controller: ControllerProcess) -> str:
    """A run whose batch has grown several times. Read-only: tests that report use runs of their own."""
    with controller.client() as client:
        WireRun(client, "ramped", seed=3).register().train_until(0.3)
    return "ramped"

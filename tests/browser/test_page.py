"""What a person sees on the page, in a real Chromium, from a real controller."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.browser.conftest import Page
from tests.browser.feeding import WireRun, holding, specification
from tests.running import ControllerProcess

pytestmark = pytest.mark.browser

Trainer = Callable[..., WireRun]

ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def _open_run(page: Page, controller: ControllerProcess, run_id: str) -> None:
    page.open(f"{controller.url}/runs/{run_id}")
    page.until(lambda: page.all(".decisions tbody tr"), "a decision")


def test_an_empty_controller_says_how_to_attach_a_run(page: Page, own_controller: ControllerProcess) -> None:
    own_controller.start()
    page.open(own_controller.url)
    page.until_seen("No runs yet")
    assert "AdaptiveBatch.attach(" in page.seen("main")
    assert own_controller.url in page.seen("main")


def test_the_list_shows_each_run_with_its_state_batch_and_noise_scale(
    page: Page, controller: ControllerProcess, ramped_run: str, trainer: Trainer
) -> None:
    trainer("waiting")
    trainer("complete", specification=holding(budget_samples=128 * 25 * 8)).report(8)
    page.open(controller.url)
    page.until_seen("complete")
    ramped = page.seen(f"tr[data-run='{ramped_run}']")
    assert "running" in ramped
    assert "Muon + AdamW" in ramped
    assert "from 128" in ramped
    assert re.search(r"resolution \d|at least about", ramped)
    assert "registered" in page.seen("tr[data-run='waiting']")
    assert "finished" in page.seen("tr[data-run='complete']")
    assert page.find("tr[data-run='complete'] progress").get_attribute("value") == "1"
    names = [row.get_attribute("data-run") for row in page.all("tr[data-run]")]
    assert names.index("complete") < names.index("waiting") < names.index(ramped_run), "newest first"


def test_the_list_follows_its_runs_without_reload(page: Page, controller: ControllerProcess, trainer: Trainer) -> None:
    page.open(controller.url)
    run = trainer("appears")
    page.until_seen("registered", "tr[data-run='appears']")
    run.report()
    page.until_seen("running", "tr[data-run='appears']")
    page.find("tr[data-run='appears'] a").click()
    page.until_seen("appears", "h1")


def test_the_run_page_shows_the_number_the_batch_and_the_reason(
    page: Page, controller: ControllerProcess, ramped_run: str
) -> None:
    _open_run(page, controller, ramped_run)
    with controller.client() as client:
        view = client.get(f"/api/v1/runs/{ramped_run}").json()
    tiles = page.seen(".tiles")
    assert f"{view['plan']['global_batch_size']:,}" in tiles
    assert f"{view['last_measurement']['loss']:.3f}" in tiles
    assert view["last_decision"]["explanation"] == page.seen(".latest .sentence")
    newest = page.find(".decisions tbody tr")
    assert view["last_decision"]["explanation"] in newest.text
    assert view["last_decision"]["reason"].replace("_", " ") in newest.text
    assert {chart.get_attribute("data-chart") for chart in page.all(".chart")} == {"noise", "batch", "rate", "loss"}
    page.until(lambda: re.search(r"ceiling\s+[\d.]+", page.seen("[data-chart='noise'] .legend")), "a ceiling")


def test_every_chart_is_drawn_in_the_ink_of_its_quantity(
    page: Page, controller: ControllerProcess, ramped_run: str
) -> None:
    _open_run(page, controller, ramped_run)
    page.until(lambda: len(page.all(".chart canvas")) == 4, "four charts")
    for chart, ink in {"noise": "--noise", "batch": "--batch", "rate": "--rate", "loss": "--loss"}.items():
        page.until(lambda chart=chart, ink=ink: page.ink(chart, ink) > 100, f"{ink} in chart {chart}")


def test_the_noise_scale_stands_in_a_band_of_two_standard_errors(
    page: Page, controller: ControllerProcess, ramped_run: str
) -> None:
    _open_run(page, controller, ramped_run)
    with controller.client() as client:
        decision = client.get(f"/api/v1/runs/{ramped_run}").json()["last_decision"]
    assert decision["noise_scale_low"] < decision["noise_scale"] < decision["noise_scale_high"]
    page.until(lambda: re.search(r"\d to \d", page.seen("[data-chart='noise'] .legend")), "the interval")
    assert re.search(r"\d to \S+ samples, resolution", page.seen(".tiles"))
    page.until(lambda: page.run(COUNT_BAND, "noise") > 1000, "a band around the noise scale")
    assert page.run(COUNT_BAND, "batch") == 0


def test_each_group_shows_how_it_was_measured_and_how_well(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    run = trainer("groups")
    run.report(3)
    _open_run(page, controller, "groups")
    followed = page.seen(".readings tr[data-group='matrices']")
    assert "followed" in followed
    assert "spectral" in followed
    assert "split, gradient" in followed
    assert "8 groups of 16, 4 pairs of halves" in followed
    assert followed.count("±") == 2
    assert "followed" not in page.seen(".readings tr[data-group='rest']")
    # noise^2 / (signal * progress) = 36 / 12; 36 / 4^2 and 36 / 3^2 with the full norm and the bare progress.
    exact = run.reading("matrices", "spectral", 500.0).model_copy(
        update={"noise": 6.0, "signal": 4.0, "progress": 3.0, "direction": "update", "num_sign_patterns": None}
    )
    run.report(readings=(exact,))
    page.until_seen("split, update", ".readings")
    only = page.seen(".readings tr[data-group='matrices']")
    assert "2.25 to 4" in only
    assert "pairs of halves" not in only
    assert "followed" not in only
    run.report(readings=(exact.model_copy(update={"progress": -1.0}),))
    page.until_seen("no signal", ".readings")
    page.until_seen("2.25 or more", ".readings")


def test_only_changes_leaves_the_decisions_that_moved_the_batch(
    page: Page, controller: ControllerProcess, ramped_run: str
) -> None:
    _open_run(page, controller, ramped_run)
    page.until(lambda: page.all(".decisions tr.change"), "a change")
    page.find("#only-changes").click()
    page.until(lambda: len(page.all(".decisions tbody tr")) == len(page.all(".decisions tr.change")), "only changes")
    assert all("→" in row.text for row in page.all(".decisions tbody tr"))


def test_a_new_measurement_appears_without_reload(page: Page, controller: ControllerProcess, trainer: Trainer) -> None:
    run = trainer("live")
    run.report(3)
    _open_run(page, controller, "live")
    page.until_seen("live", "#connection")
    page.run("window.sameDocument = true")
    run.report(loss=1.2345)
    page.until_seen("1.234", ".tiles")
    page.until_seen("1.234", "[data-chart='loss'] .legend")
    page.until(lambda: page.seen(".decisions tbody tr").startswith("100"), "step 100 on top of the decisions")
    assert page.run("return window.sameDocument") is True


def test_a_loss_that_is_not_finite_is_a_gap_and_no_script_error(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    run = trainer("diverged")
    run.report(20)
    run.report(loss="NaN", step_seconds="Infinity")
    run.report(loss="-Infinity")
    _open_run(page, controller, "diverged")
    page.until_seen("-Infinity", ".tiles")
    page.until_seen("not finite", "[data-chart='loss'] .legend")
    page.until(lambda: page.ink("loss", "--danger") > 10, "crosses where the loss was not finite")
    run.report(5)
    page.until(lambda: "not finite" not in page.seen("[data-chart='loss'] .legend"), "a finite loss again")


def test_readings_that_are_not_finite_are_named_and_left_out(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    run = trainer("overflow")
    run.report(10)
    broken = run.reading("matrices", "spectral", 500.0).model_copy(update={"noise": float("nan")})
    run.report(readings=(broken,))
    _open_run(page, controller, "overflow")
    page.until_seen("hold not finite", ".decisions")


def test_an_unresolved_reading_says_at_least_and_is_shaded(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    trainer("foggy").report(3)  # fewer measurements than a spread can be trusted from
    _open_run(page, controller, "foggy")
    page.until_seen("unresolved", ".tiles")
    assert "at least about 128" in page.seen(".tiles")
    page.until_seen("unresolved: at least about 128", "[data-chart='noise'] .legend")


def test_text_from_trainers_is_shown_as_text(page: Page, controller: ControllerProcess, trainer: Trainer) -> None:
    trainer("hostile", specification=specification(description=ATTACK, optimizer=ATTACK)).report(2)
    _open_run(page, controller, "hostile")
    assert ATTACK in page.seen(".description")
    assert ATTACK in page.seen(".facts")
    assert page.run("return document.title") == "hostile · gns-controller"
    page.open(controller.url)
    page.until_seen(ATTACK, "tr[data-run='hostile']")
    assert page.run("return document.title") == "gns-controller"
    assert page.all("main script, main img[src='x']") == []


def test_an_unknown_run_is_said_to_be_unknown(page: Page, controller: ControllerProcess) -> None:
    page.expected_errors = ("404",)
    page.open(f"{controller.url}/runs/nowhere")
    page.until_seen("No such run")


def test_no_request_leaves_the_origin(page: Page, controller: ControllerProcess, ramped_run: str) -> None:
    page.open(controller.url)
    page.until_seen(ramped_run)
    _open_run(page, controller, ramped_run)
    asked = [url for url in page.requests() if not url.startswith(("data:", "blob:", "chrome", "about:"))]
    assert asked
    assert [url for url in asked if not url.startswith(controller.url + "/")] == []


def test_the_page_asks_for_a_token_and_works_with_it(page: Page, guarded_controller: ControllerProcess) -> None:
    page.expected_errors = ("401",)
    with guarded_controller.client() as client:
        run = WireRun(client, "guarded").register()
        run.report(3)
        page.open(f"{guarded_controller.url}/runs/guarded")
        page.until_seen("asks for a token")
        page.find("#token").send_keys("not-the-token")
        page.find(".token-form button").click()
        page.until_seen("not accepted")
        page.find("#token").send_keys(guarded_controller.token or "")
        page.find(".token-form button").click()
        page.until(lambda: page.all(".decisions tbody tr"), "a decision")
        run.report()
        page.until(lambda: len(page.all(".decisions tbody tr")) == 4, "a live report behind the token")
        page.open(guarded_controller.url)
        page.until_seen("guarded", "tr[data-run='guarded']")


def test_the_page_finds_its_way_back_after_a_restart(page: Page, own_controller: ControllerProcess) -> None:
    page.expected_errors = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "503")
    own_controller.start()
    with own_controller.client() as client:
        run = WireRun(client, "patient").register()
        run.report(2)
        _open_run(page, own_controller, "patient")
        own_controller.stop()
        page.until_seen("reconnecting", "#connection")
        own_controller.start()
        run.report()
        page.until(lambda: len(page.all(".decisions tbody tr")) == 3, "what was reported meanwhile, once each")
        page.until_seen("live", "#connection")


def test_a_narrow_screen_needs_no_sideways_scrolling(
    page: Page, controller: ControllerProcess, ramped_run: str
) -> None:
    page.resize(390, 844)
    for address, marker in ((controller.url, "tr[data-run]"), (f"{controller.url}/runs/{ramped_run}", "canvas")):
        page.open(address)
        page.until(lambda marker=marker: page.all(marker), marker)
        assert page.run("return document.documentElement.scrollWidth") <= 390


def test_the_page_follows_the_dark_preference(page: Page, controller: ControllerProcess, ramped_run: str) -> None:
    page.prefer("dark")
    _open_run(page, controller, ramped_run)
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert all(int(channel) < 60 for channel in re.findall(r"\d+", ground)[:3])


def test_the_axis_counts_tokens_or_steps_on_request(page: Page, controller: ControllerProcess, ramped_run: str) -> None:
    _open_run(page, controller, ramped_run)
    page.find("label[for='clock-tokens']").click()
    page.find("label[for='clock-steps']").click()
    assert page.find("#clock-steps").is_selected()
    page.until(lambda: page.ink("batch", "--batch") > 100, "the batch, drawn over steps")


def test_a_long_history_stays_bounded_and_keeps_its_changes(page: Page, controller: ControllerProcess) -> None:
    page.open(controller.url)
    kept = page.run_async(
        MAKE_HISTORY
        + """
        for (let step = 1; step <= 40_000; step += 1) history.add(report(step, { batch: step < 12_345 ? 64 : 128 }));
        const points = history.points;
        const first = points.find((point) => point.batch === 128);
        return { count: points.length, change: first.step, last: points.at(-1).step };
        """
    )
    assert kept["count"] <= 3000
    assert kept["change"] == 12_345
    assert kept["last"] == 40_000


def test_a_rewind_replaces_what_it_trains_again(page: Page, controller: ControllerProcess) -> None:
    page.open(controller.url)
    steps = page.run_async(
        MAKE_HISTORY
        + """
        for (const step of [1, 2, 3, 4, 5]) history.add(report(step, {}));
        for (const step of [3, 4]) history.add(report(step, { attempt: 2 }));
        history.add(report(6, {}));
        return history.points.map((point) => point.step);
        """
    )
    assert steps == [1, 2, 3, 4], "attempt 1 up to the checkpoint, then attempt 2; a fenced report changes nothing"


COUNT_BAND = """
const canvas = document.querySelector(`[data-chart="${arguments[0]}"] canvas`);
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let count = 0;
for (let at = 0; at < data.length; at += 4) {
  if (data[at + 3] > 20 && data[at + 3] < 80 && data[at + 2] - data[at] > 80) count += 1;
}
return count;
"""

MAKE_HISTORY = """
const { History } = await import("/static/history.js");
const history = new History({});
const report = (step, { batch = 64, attempt = 1 }) => ({
  sequence: step,
  decision: null,
  measurement: {
    attempt, optimizer_step: step, samples_seen: step * 64, global_batch_size: batch, plan_version: 0, loss: 2.5,
  },
});
"""

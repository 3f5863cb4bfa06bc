"""Overruling a run from its page, in a real Chromium, on a real controller: what is sent, and what is then seen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.conftest import Page
from tests.browser.feeding import WireRun, holding, specification
from tests.running import ControllerProcess

pytestmark = pytest.mark.browser

Trainer = Callable[..., WireRun]

ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
PIN = {"kind": "pin", "global_batch_size": 512, "note": "somebody else"}


def get(controller: ControllerProcess, path: str) -> Any:
    with controller.client() as client:
        return client.get(f"/api/v1/runs/{path}").raise_for_status().json()


def override(controller: ControllerProcess, run_id: str, body: dict[str, Any]) -> None:
    """As somebody else would, whatever the revision is."""
    with controller.client() as client:
        client.post(f"/api/v1/runs/{run_id}/override", json=body, headers={"If-Match": "*"}).raise_for_status()


def open_run(page: Page, controller: ControllerProcess, run_id: str) -> None:
    page.open(f"{controller.url}/runs/{run_id}")
    page.until(lambda: page.all(".decisions tbody tr"), "a decision")
    page.until(lambda: page.find("#control-batch").is_enabled(), "an open panel")


def ask_to_pin(page: Page, size: object, note: str = "") -> None:
    batch, words = page.find("#control-batch"), page.find("#control-note")
    batch.clear()
    batch.send_keys(str(size))
    words.clear()
    words.send_keys(note)
    page.find(".overrule [type=submit]").click()


def answer(page: Page, button: str) -> None:
    """Press the button of the question."""
    page.until(lambda: page.all("dialog.ask"), "a question")
    next(found for found in page.all("dialog.ask button") if button in found.text).click()


def edit(page: Page, document: object) -> None:
    """Open the editor, if it is not, and put this into it."""
    if not page.all("dialog.drawer[open]"):
        page.find(".edit-policy").click()
    text = document if isinstance(document, str) else json.dumps(document, indent=2)
    script = "const box = document.querySelector('#policy-text'); box.value = arguments[0];"
    page.run(script + "box.dispatchEvent(new Event('input'))", text)


def test_a_pin_decides_the_next_measurement_until_it_is_released(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    run = trainer("pinned")
    run.report(3)
    open_run(page, controller, "pinned")
    assert "The policy noise_scale decides, revision 0." in page.seen(".control")
    assert not page.find(".overrule .actions button:nth-child(3)").is_displayed(), "nothing to release"
    ask_to_pin(page, 256, "the other job needs the memory")
    question = page.seen("dialog.ask")
    assert "Pin 256 samples?" in question
    assert "Now: 128 samples. The policy noise_scale decides, revision 0." in question
    assert "From the next measurement on" in question
    assert "the other job needs the memory" in question
    assert get(controller, "pinned/policy")["override"] is None, "nothing is sent before the answer"
    answer(page, "Pin 256")

    page.until_seen("An operator pins 256 samples: the other job needs the memory.", ".in-charge")
    page.until_seen("takes effect at the next measurement", ".said")
    page.until_seen("the next measurement decides by it", ".control")
    assert get(controller, "pinned/policy")["override"] == {
        "kind": "pin",
        "global_batch_size": 256,
        "note": "the other job needs the memory",
    }
    page.until_seen("pins 256 samples: the other job needs the memory", ".decisions tr.control")
    assert "revision 1" in page.seen(".decisions tr.control")
    assert (
        page.find(".decisions tr.control time").get_attribute("datetime")
        == (get(controller, "pinned/policy")["changed_at"])
    )

    assert run.report().plan.global_batch_size == 256
    page.until_seen("256", ".tiles .tile:first-child strong")
    page.until_seen("override", ".decisions tbody tr:first-child .badge[data-tone='person']")
    page.until(lambda: "decides by it" not in page.seen(".control"), "in force, so no longer pending")

    page.find(".overrule .actions button:nth-child(3)").click()
    answer(page, "Release it")
    page.until_seen("The policy noise_scale decides, revision 2.", ".in-charge")
    assert run.report().decision is not None
    assert get(controller, "pinned")["last_decision"]["reason"] != "override"
    page.until_seen("releases the batch to the policy noise_scale", ".decisions")


def test_the_present_batch_can_be_held(page: Page, controller: ControllerProcess, trainer: Trainer) -> None:
    run = trainer("held")
    run.report(2)
    open_run(page, controller, "held")
    page.find(".overrule .actions button:nth-child(2)").click()
    answer(page, "Hold it")
    page.until_seen("An operator holds the batch of 128 samples.", ".in-charge")
    decision = run.report().decision
    assert decision is not None
    assert decision.reason == "override"


def test_a_question_answered_with_escape_sends_nothing(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    trainer("spared").report(2)
    open_run(page, controller, "spared")
    ask_to_pin(page, 256)
    page.until(lambda: page.all("dialog.ask"), "a question")
    page.run("return document.activeElement").send_keys(Keys.ESCAPE)
    page.until(lambda: not page.all("dialog.ask"), "no question any more")
    assert page.run("return document.activeElement.textContent") == "Pin this batch", "focus is back where it was"
    assert get(controller, "spared/policy")["policy_revision"] == 0


def test_whoever_was_slower_is_told_what_changed_and_changes_nothing(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    page.expected_errors = ("412",)
    trainer("contested").report(2)
    open_run(page, controller, "contested")
    ask_to_pin(page, 256)
    page.until(lambda: page.all("dialog.ask"), "a question")
    override(controller, "contested", PIN)
    answer(page, "Pin 256")
    page.until_seen("Somebody else was faster, so nothing was changed.", ".said")
    said = page.seen(".said")
    assert "You saw revision 0; now it is revision 1" in said
    assert "no override → An operator pins 512 samples: somebody else" in said
    assert "pins 512 samples: somebody else" in page.seen(".in-charge")
    assert get(controller, "contested/policy")["override"] == PIN
    ask_to_pin(page, 256)
    answer(page, "Pin 256")
    page.until_seen("pins 256 samples", ".in-charge")


def test_a_batch_that_the_ranks_cannot_make_is_refused_at_its_field(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    page.expected_errors = ("422",)
    trainer("unreachable").report(2)
    open_run(page, controller, "unreachable")
    page.find(".overrule [type=submit]").click()
    page.until_seen("Say how many samples", "#control-batch-fault")
    ask_to_pin(page, 1001)
    answer(page, "Pin 1,001")
    page.until_seen("1001", "#control-batch-fault")
    assert page.find("#control-batch").get_attribute("aria-invalid") == "true"
    page.until(lambda: page.run("return document.activeElement.id") == "control-batch", "focus at the fault")
    page.find("#control-batch").send_keys(Keys.BACKSPACE)
    assert page.seen("#control-batch-fault") == ""


def test_a_mistyped_pin_is_one_step_in_the_question_and_refused_at_its_field(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    """Two reports of 25 steps of 128 samples leave 6,400 of 12,800."""
    page.expected_errors = ("422",)
    trainer("mistyped", specification=holding(budget_samples=12_800)).report(2)
    open_run(page, controller, "mistyped")
    ask_to_pin(page, 1024)
    page.until_seen("Of 12,800 samples 6,400 are left: 7 steps of this batch.", "dialog.ask")
    answer(page, "Cancel")
    ask_to_pin(page, 102_400)
    page.until_seen("Of 12,800 samples 6,400 are left: one step of this batch.", "dialog.ask")
    answer(page, "Pin 102,400")
    page.until_seen("6400 of the 12800 samples", "#control-batch-fault")
    assert get(controller, "mistyped/policy")["override"] is None


def test_a_finished_run_cannot_be_overruled_and_says_why(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    trainer("over", specification=holding(budget_samples=128 * 25 * 4)).report(4)
    page.open(f"{controller.url}/runs/over")
    page.until_seen("The budget is used up: nothing more will be decided, unless another attempt begins.", ".control")
    assert not page.find("#control-batch").is_enabled()
    assert page.seen(".tile:nth-child(7) strong") == "0"


def test_a_run_that_ends_under_the_question_keeps_the_word_for_its_next_attempt(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    """And its last decision is the one about a reading, not that about the report at the end, which has none."""
    run = trainer("ending", specification=specification(budget_samples=128 * 25 * 4))
    last = run.report(3).decision
    assert last is not None
    open_run(page, controller, "ending")
    ask_to_pin(page, 256)
    page.until(lambda: page.all("dialog.ask"), "a question")
    run.report(readings=())
    page.until_seen("finished", ".title-row .state")
    answer(page, "Pin 256")
    page.until_seen("This run is finished: it holds for its next attempt.", ".said")
    assert get(controller, "ending")["last_decision"]["reason"] == "hold_no_reading"
    page.until_seen(f"The last decision: {last.explanation}", ".latest")


def test_null_in_an_edited_policy_is_null(page: Page, controller: ControllerProcess, trainer: Trainer) -> None:
    """noise_scale has a growth_cap of 4 where none is given; left out it takes that, null takes it away."""
    trainer("uncapped").report(2)
    open_run(page, controller, "uncapped")
    document = {**get(controller, "uncapped/policy")["policy"], "growth_cap": None}
    del document["dwell"]
    edit(page, document)
    page.find(".apply").click()
    page.until_seen("growth_cap: 2 → not set", "dialog.ask")
    assert "dwell: 30,000 samples → its default" in page.seen("dialog.ask")
    answer(page, "Apply it")
    page.until_seen("revision 1", ".in-charge")
    applied = get(controller, "uncapped/policy")["policy"]
    assert (applied["growth_cap"], applied["dwell"]) == (None, None)


def test_a_replay_without_readings_says_nothing_about_the_policy(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    trainer("unread").report(6)
    open_run(page, controller, "unread")
    edit(page, {**get(controller, "unread/policy")["policy"], "estimator": "rank_variance"})
    page.find(".what-if").click()
    page.until_seen(
        "None of 6 measurements holds a rank_variance reading that the policy follows: "
        "this says nothing about the policy.",
        ".outcome",
    )
    assert "optimizer steps instead of" not in page.seen(".outcome")


def test_a_token_that_may_not_steer_closes_the_panel_and_says_so(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    """The refusal is made up in the page: which tokens may steer is the controller's business."""
    trainer("forbidden").report(2)
    open_run(page, controller, "forbidden")
    page.run(REFUSE_CHANGES)
    ask_to_pin(page, 256)
    answer(page, "Pin 256")
    page.until_seen("This token may look and not steer. Needs the right to steer.", ".control")
    assert not page.find("#control-batch").is_enabled()
    page.find(".blocked button").click()
    page.find("#token").send_keys("another-one")
    page.find(".token-form button").click()
    page.until(lambda: page.find("#control-batch").is_enabled(), "another try with another token")


def test_a_hostile_note_is_text_wherever_it_is_shown(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    run = trainer("noted")
    run.report(2)
    override(controller, "noted", {"kind": "pin", "global_batch_size": 256, "note": ATTACK})
    run.report()
    open_run(page, controller, "noted")
    page.until_seen(ATTACK, ".in-charge")
    page.until_seen(ATTACK, ".decisions tr.control")
    ask_to_pin(page, 512, ATTACK)
    page.until_seen(ATTACK, "dialog.ask")
    override(controller, "noted", {"kind": "hold", "note": ATTACK + "!"})
    page.expected_errors = ("412",)
    answer(page, "Pin 512")
    page.until_seen(ATTACK + "!", ".said")
    assert page.run("return document.title") == "noted · gns-controller"
    assert page.all("body img[src='x'], main script, dialog script") == []


def test_the_ramp_ahead_is_dashed_in_a_band_and_counted(
    page: Page, controller: ControllerProcess, ramped_run: str
) -> None:
    open_run(page, controller, ramped_run)
    schedule, view = get(controller, f"{ramped_run}/schedule"), get(controller, ramped_run)
    stages, left = schedule["projection"]["stages"], schedule["projection"]["steps_left"]
    page.until_seen(f"{left['expected']:,}", ".tile:nth-child(7) strong")
    assert f"{left['least']:,} to {left['most']:,}" in page.seen(".tile:nth-child(7)")
    legend = page.seen("[data-chart='batch'] .legend")
    assert re.search(rf"expected\s+{stages[-1]['global_batch_size']:,}", legend)
    assert f"{stages[-1]['low']:,} to {stages[-1]['high']:,}" in legend
    page.until(lambda: page.run(COUNT_AHEAD) > 1000, "a band from the present point on")
    saved = view["savings"]
    assert f"{saved['steps_saved']:,}" in page.seen(".tile:nth-child(8) strong")
    assert f"with a constant {saved['constant_batch_size']}" in page.seen(".tile:nth-child(8)")
    spoken = page.find("[data-chart='batch'] [role=img]").get_attribute("aria-label") or ""
    assert "expected at the end" in spoken
    assert str(view["advised_data_parallel_size"]) in page.seen(".facts")
    page.find(".facts .about summary").click()
    assert "nothing here applies it" in page.seen(".facts")


def test_what_was_lost_is_not_called_saved(page: Page, controller: ControllerProcess) -> None:
    page.open(controller.url)
    notes = page.run_async(
        """
        const { savedNote } = await import("/static/run.js");
        const savings = { constant_batch_size: 128, constant_steps: 100, steps_saved: -25, steps_saved_share: -0.25 };
        return [
          savedNote({ ...savings, seconds_saved: -90 }),
          savedNote({ ...savings, steps_saved: 25, steps_saved_share: 0.25, seconds_saved: null }),
          savedNote({ ...savings, steps_saved: 0, steps_saved_share: 0, seconds_saved: 7200 }),
        ];
        """
    )
    assert notes == [
        "25 % more than with a constant 128, 90 s lost",
        "25 % fewer than with a constant 128, time not known yet",
        "as many as with a constant 128, 2 h saved",
    ]


def test_an_edited_policy_is_replayed_before_it_is_applied(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    trainer("whatif", seed=3).train_until(0.2)
    open_run(page, controller, "whatif")
    document = {**get(controller, "whatif/policy")["policy"], "noise_tolerance": 0.5}
    edit(page, document)
    page.find(".what-if").click()
    with controller.client() as client:
        report = client.post("/api/v1/runs/whatif/replay", json={"policy": document}).raise_for_status().json()
    assert report["replayed_steps"] != report["happened_steps"]
    steps = f"{report['replayed_steps']:,} optimizer steps instead of {report['happened_steps']:,}"
    page.until_seen(steps, ".outcome")
    assert f"{report['num_equal']:,} of {report['num_compared']:,} decisions equal" in page.seen(".outcome")
    other = next(row for row in report["rows"] if row["replayed_batch_size"] != row["happened_batch_size"])
    assert other["replayed_explanation"] in page.seen(".outcome")
    page.until(lambda: page.ink("batch", "--person") > 50, "the replayed batches in the chart")
    # Every point reaches back to the report before it: it shows what that report's decision put in force.
    in_force = [128] + [row["replayed_batch_size"] for row in report["rows"][:-1]]
    ramp = [f"{batch:,}" for index, batch in enumerate(in_force) if index == 0 or batch != in_force[index - 1]]
    assert page.run(READ_EDITED) == ramp, "what stands under the cursor from left to right"
    assert get(controller, "whatif/policy")["policy_revision"] == 0, "asking changes nothing"

    page.find("#policy-note").send_keys("larger batches pay here")
    page.find(".apply").click()
    page.until_seen("noise_tolerance: 1 → 0.5", "dialog.ask")
    answer(page, "Apply it")
    page.until_seen("The policy noise_scale decides, revision 1.", ".in-charge")
    assert get(controller, "whatif/policy")["policy"] == document
    page.until_seen("changes the policy to noise_scale: larger batches pay here", ".decisions tr.control")
    assert not page.all("dialog.drawer[open]")
    page.until(lambda: page.ink("batch", "--person") == 0, "no replayed batches any more")


def test_faults_of_a_policy_are_shown_with_their_line(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    page.expected_errors = ("422",)
    trainer("faulty").report(2)
    open_run(page, controller, "faulty")
    policy = get(controller, "faulty/policy")["policy"]
    edit(page, '{\n  "policy": "noise_scale",\n  oops\n}')
    page.find(".what-if").click()
    page.until_seen("Line 3 Not JSON", ".faults")
    for button in (".what-if", ".apply"):
        text = json.dumps({**policy, "noise_tolerance": -1, "surprise": 1}, indent=2)
        line = 1 + text[: text.index('"noise_tolerance"')].count("\n")
        edit(page, text)
        page.find(button).click()
        if button == ".apply":
            answer(page, "Apply it")
        page.until_seen(f"Line {line} noise_tolerance: ", ".faults")
        assert "surprise: Unknown field" in page.seen(".faults")
        page.find(".faults button").click()
        assert page.run(SELECTED).strip() == '"noise_tolerance": -1,'
    assert get(controller, "faulty/policy")["policy_revision"] == 0


def test_an_editor_that_was_overtaken_keeps_the_text_and_says_what_changed(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    page.expected_errors = ("412",)
    trainer("overtaken").report(2)
    open_run(page, controller, "overtaken")
    policy = get(controller, "overtaken/policy")["policy"]
    edit(page, {**policy, "noise_tolerance": 0.5})
    with controller.client() as client:
        change = {"deadband": 0.25}
        client.patch("/api/v1/runs/overtaken/policy", json=change, headers={"If-Match": "*"}).raise_for_status()
    page.find(".apply").click()
    answer(page, "Apply it")
    page.until_seen("you started from revision 0, now it is revision 1", ".outcome")
    assert "deadband: 0 → 0.25" in page.seen(".outcome")
    next(button for button in page.all(".outcome button") if "Begin again" in button.text).click()
    edit(page, {**json.loads(page.run("return document.querySelector('#policy-text').value")), "noise_tolerance": 0.5})
    page.find(".apply").click()
    answer(page, "Apply it")
    page.until_seen("revision 2", ".in-charge")
    now = get(controller, "overtaken/policy")["policy"]
    assert (now["deadband"], now["noise_tolerance"]) == (0.25, 0.5)


def test_another_policy_takes_the_place_of_the_whole_document(
    page: Page, controller: ControllerProcess, trainer: Trainer
) -> None:
    run = trainer("replaced")
    run.report(2)
    open_run(page, controller, "replaced")
    edit(page, {"policy": "stages", "stages": [{"from_samples": 0, "global_batch_size": 512}]})
    page.find(".apply").click()
    page.until_seen("policy: noise_scale → stages", "dialog.ask")
    answer(page, "Apply it")
    page.until_seen("The policy stages decides, revision 1.", ".in-charge")
    assert run.report().plan.global_batch_size == 512


def test_everything_can_be_done_on_a_narrow_screen(page: Page, controller: ControllerProcess, trainer: Trainer) -> None:
    trainer("narrow").report(30)
    page.resize(390, 844)
    open_run(page, controller, "narrow")
    page.find(".policy-document summary").click()
    ask_to_pin(page, 256, "a note that is rather long, because it has a story to tell about this batch and that one")
    answer(page, "Pin 256")
    page.until_seen("An operator pins 256 samples", ".in-charge")
    edit(page, {**get(controller, "narrow/policy")["policy"], "noise_tolerance": 0.5})
    page.find(".what-if").click()
    page.until_seen("optimizer steps instead of", ".outcome")
    assert page.run("return document.documentElement.scrollWidth") <= 390
    chart = page.run("return document.querySelector('[data-chart=batch] canvas').getBoundingClientRect().toJSON()")
    drawer = page.find("dialog.drawer").rect
    assert drawer["width"] <= 390
    page.until(
        lambda: page.run("return document.querySelector('[data-chart=batch]').getBoundingClientRect().top") < 60,
        "the chart beside the drawer",
    )
    assert chart["width"] <= 390


def test_pages_that_were_left_hold_no_connection(page: Page, controller: ControllerProcess, ramped_run: str) -> None:
    """A browser opens six connections to a host, and keeps pages that were left alive to come back to."""
    for _ in range(8):
        open_run(page, controller, ramped_run)
    edit(page, get(controller, f"{ramped_run}/policy")["policy"])
    page.find(".what-if").click()
    page.until_seen("optimizer steps instead of", ".outcome")


def test_corners_ahead_and_differences_are_plain_numbers(page: Page, controller: ControllerProcess) -> None:
    page.open(controller.url)
    found = page.run_async(
        """
        const { cornersAhead, batchesReplayed } = await import("/static/ahead.js");
        const { differences, offsetOf } = await import("/static/jsontext.js");
        const stage = (samples_seen, global_batch_size) => ({
          samples_seen, global_batch_size, low: global_batch_size / 2, high: global_batch_size * 2,
        });
        const projection = { stages: [stage(100, 10), stage(200, 20), stage(400, 40)] };
        const before = { policy: "p", cap: 4, none: null, span: { steps: 1, samples: null } };
        const after = { policy: "p", cap: null, none: null, span: { steps: null, samples: 9 }, more: [1] };
        const text = '{"a": "}",\\n "b": [1,\\n {"c~/": 2}]}';
        const listed = (corner) => [corner.samples, corner.step, corner.expected, corner.least, corner.most];
        return {
          corners: cornersAhead(projection, { samples: 150, step: 7 }, 800).map(listed),
          over: cornersAhead(projection, { samples: 800, step: 7 }, 800),
          none: cornersAhead(null, { samples: 1, step: 1 }, 800),
          replayed: batchesReplayed(
            [{ samples_seen: 10, replayed_batch_size: 2 }, { samples_seen: 20, replayed_batch_size: 3 }],
            [{ samples: 10 }, { samples: 15 }, { samples: 20 }, { samples: 30 }], 1),
          differences: differences(before, after),
          line: text.slice(offsetOf(text, "/b/1/c~0~1")),
        };
        """
    )
    assert found["corners"] == [[150, 7, 10, 5, 20], [200, 12, 10, 5, 20], [400, 22, 20, 10, 40], [800, 32, 40, 20, 80]]
    assert (found["over"], found["none"]) == ([], [])
    assert found["replayed"] == [1, 2, 2, 3]
    assert found["differences"] == ["cap", "span", "more"]
    assert found["line"] == '"c~/": 2}]}'


COUNT_AHEAD = """
const canvas = document.querySelector('[data-chart="batch"] canvas');
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let count = 0;
for (let at = 0; at < data.length; at += 4) {
  if (data[at + 3] > 20 && data[at + 3] < 80 && data[at] - data[at + 2] > 80) count += 1;
}
return count;
"""

READ_EDITED = """
const chart = document.querySelector('[data-chart="batch"]');
const over = chart.querySelector(".u-over");
const item = [...chart.querySelectorAll(".legend li")].find((one) => one.textContent.includes("edited"));
const value = item.querySelector("strong");
const { left, top, width } = over.getBoundingClientRect();
const read = [];
for (let x = 0; x < width; x += 1) {
  over.dispatchEvent(new MouseEvent("mousemove", { clientX: left + x, clientY: top + 50, bubbles: true }));
  if (/^\\d/.test(value.textContent) && value.textContent !== read.at(-1)) read.push(value.textContent);
}
return read;
"""

SELECTED = """
const box = document.querySelector("#policy-text");
return box.value.slice(box.selectionStart, box.selectionEnd);
"""

REFUSE_CHANGES = """
const real = window.fetch;
window.fetch = (address, options = {}) => {
  if (options.method !== "POST" || options.headers.Authorization) return real(address, options);
  const problem = { title: "Forbidden", status: 403, detail: "Needs the right to steer." };
  return Promise.resolve(new Response(JSON.stringify(problem), { status: 403 }));
};
"""

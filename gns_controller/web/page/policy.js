// The policy as a document: edit it as JSON, ask what it would have done, apply it.
//
// A drawer and no modal dialog, because the answer to "what would it have done?" is drawn in the batch chart beside it.

import { ApiError, send } from "./api.js";
import { confirmed } from "./dialogs.js";
import { h, setText } from "./dom.js";
import * as format from "./format.js";
import { differences, isObject, offsetOf } from "./jsontext.js";
import { ownFirst, valueText, whatChanged } from "./words.js";

const LONGEST_NOTE = 500;

export class PolicyEditor {
  /** `onApplied(known)` after a change, `onBlocked(error)` when the token may not, `reload()` gives what is in force. */
  constructor({ path, charts, onApplied, onBlocked, reload }) {
    Object.assign(this, { path, charts, onApplied, onBlocked, reload });
    this.base = null;
    this.working = false;
    this.text = h("textarea", {
      id: "policy-text",
      spellcheck: "false",
      autocapitalize: "off",
      autocomplete: "off",
      "aria-describedby": "policy-help policy-faults",
    });
    this.title = h("h2", { id: "policy-title" });
    this.faults = h("ul", { class: "faults", id: "policy-faults", role: "alert" });
    this.outcome = h("div", { class: "outcome", role: "status", "aria-live": "polite" });
    this.ask = h("button", { type: "button", class: "plain what-if" }, "What would it have done?");
    this.apply = h("button", { type: "button", class: "strong apply" }, "Apply");
    this.close = h("button", { type: "button", class: "plain" }, "Close");
    this.why = h("p", { class: "quiet", hidden: true });
    this.note = h("input", { id: "policy-note", type: "text", maxlength: LONGEST_NOTE, autocomplete: "off", placeholder: "why" });
    this.element = h(
      "dialog",
      { class: "drawer", "aria-labelledby": "policy-title" },
      h("div", { class: "drawer-head" }, this.title, this.close),
      h(
        "div",
        { class: "drawer-body" },
        h(
          "p",
          { class: "quiet", id: "policy-help" },
          "As JSON. A field left out takes its default; null is null: no growth_cap, say. What you apply decides from the next measurement on.",
        ),
        h("label", { class: "hidden", for: "policy-text" }, "Policy as JSON"),
        this.text,
        this.faults,
        this.outcome,
        h("div", { class: "field" }, h("label", { for: "policy-note" }, "Note for whoever looks next"), this.note),
        this.why,
      ),
      h("div", { class: "actions" }, this.ask, this.apply),
    );
    this.text.addEventListener("input", () => this.forget());
    this.ask.addEventListener("click", () => this.replay());
    this.apply.addEventListener("click", () => this.send());
    this.close.addEventListener("click", () => this.shut());
    this.element.addEventListener("keydown", (pressed) => {
      if (pressed.key === "Escape") this.shut();
    });
    document.body.append(this.element);
  }

  open(known, view, opener) {
    if (this.element.open) {
      this.text.focus();
      return;
    }
    this.opener = opener;
    this.view = view;
    this.start(known);
    this.element.show();
    this.text.focus();
    this.text.setSelectionRange(0, 0);
    this.text.scrollTop = 0;
  }

  start(known) {
    this.base = known;
    setText(this.title, `Policy, from revision ${known.policy_revision}`);
    this.text.value = JSON.stringify(ownFirst(known.policy), null, 2);
    this.note.value = "";
    this.forget();
  }

  shut() {
    this.forget();
    this.element.close();
    this.opener?.focus();
  }

  /** What was said about another text than the one that stands here now. */
  forget() {
    this.charts.compare(null);
    this.faults.replaceChildren();
    this.outcome.replaceChildren();
    this.text.removeAttribute("aria-invalid");
  }

  /** Applying may be refused for a reason; asking is always allowed. */
  allowed(why) {
    setText(this.why, why ? `Not to be applied: ${why}` : "");
    this.why.hidden = !why;
    this.enable();
  }

  enable() {
    this.ask.disabled = this.working;
    this.apply.disabled = this.working || !this.why.hidden;
  }

  /** The document, or null after its fault was shown. */
  read() {
    try {
      const document = JSON.parse(this.text.value);
      if (isObject(document)) return document;
      this.complain([{ pointer: "", detail: "A policy is an object: { \"policy\": ... }" }], false);
    } catch (error) {
      this.complain([{ detail: `Not JSON: ${error.message}`, offset: offsetIn(error.message) }], false);
    }
    return null;
  }

  async replay() {
    this.forget();
    const document = this.read();
    if (!document) return;
    await this.during(this.ask, async () => {
      const report = await send("POST", `${this.path}/replay`, { body: { policy: document } });
      this.charts.compare(report.rows);
      this.tell(...replayText(report));
      const chart = window.document.querySelector("[data-chart='batch']");
      chart?.scrollIntoView({ block: "start", behavior: "smooth" });
    });
  }

  async send() {
    this.faults.replaceChildren();
    const document = this.read();
    if (!document) return;
    const names = differences(this.base.policy, document);
    if (names.length === 0) {
      this.tell("Nothing differs from the policy that you started from.");
      return;
    }
    const { policy } = this.base;
    const told = (name) => (name in document ? valueText(document[name]) : "its default");
    const gone = document.policy === policy.policy ? [] : names.filter((name) => !(name in document));
    const list = names
      .filter((name) => !gone.includes(name))
      .map((name) => h("li", {}, `${name}: ${valueText(policy[name])} → ${told(name)}`));
    const note = this.note.value.trim();
    const sure = await confirmed({
      title: `Apply this policy, as revision ${this.base.policy_revision + 1}?`,
      lines: [
        `Run ${this.view.run_id}.`,
        h("ul", {}, ...list),
        ...(gone.length ? [`Every other field is that of a new ${document.policy} policy.`] : []),
        ...(note ? [h("p", {}, "Note: ", h("q", {}, note))] : []),
        this.base.override ? "The operator's override stays above it until it is released." : "It decides from the next measurement on.",
      ],
      yes: "Apply it",
    });
    if (!sure) return;
    await this.during(this.apply, async () => {
      const answer = await send("PUT", `${this.path}/policy${note ? `?note=${encodeURIComponent(note)}` : ""}`, {
        body: document,
        etag: this.base.etag,
      });
      await this.reload().catch(() => {});
      this.shut();
      this.onApplied(answer);
    });
  }

  /** One exchange at a time; what is refused is shown where it belongs. */
  async during(button, work) {
    const label = button.textContent;
    this.working = true;
    this.enable();
    setText(button, "…");
    try {
      await work();
    } catch (error) {
      await this.refused(error, button === this.ask);
    } finally {
      setText(button, label);
      this.working = false;
      this.enable();
    }
  }

  async refused(error, asking) {
    if (!(error instanceof ApiError)) {
      this.complain([{ detail: asking ? "No answer came." : "No answer came, so it is not known whether this was applied." }]);
    } else if (error.status === 412) {
      await this.outrun();
    } else if (error.status === 422 && error.errors.length > 0) {
      const within = (pointer) => (asking ? (pointer ?? "").replace(/^\/policy/, "") : pointer ?? "");
      this.complain(error.errors.map(({ pointer, detail }) => ({ pointer: within(pointer), detail })));
    } else {
      if (error.status === 403 && !asking) this.onBlocked(error);
      this.complain([{ detail: error.message }]);
    }
  }

  /** Somebody else was faster: say what changed, and leave the text alone until the person chooses. */
  async outrun() {
    const seen = this.base;
    const now = await this.reload().catch(() => null);
    if (!now) return this.complain([{ detail: "Somebody else was faster, so nothing was applied. What is in force is not known now." }]);
    const changes = whatChanged(seen, now);
    const keep = h("button", { type: "button", class: "plain" }, `Keep my text, on top of revision ${now.policy_revision}`);
    const again = h("button", { type: "button", class: "plain" }, `Begin again from revision ${now.policy_revision}`);
    keep.addEventListener("click", () => {
      const [mine, why] = [this.text.value, this.note.value];
      this.start(now);
      [this.text.value, this.note.value] = [mine, why];
      this.text.focus();
    });
    again.addEventListener("click", () => {
      this.start(now);
      this.text.focus();
    });
    return this.tell(
      `Somebody else was faster, so nothing was applied: you started from revision ${seen.policy_revision}, now ` +
        `it is revision ${now.policy_revision}.`,
      h("ul", {}, ...changes.map((line) => h("li", {}, line))),
      h("div", { class: "actions" }, keep, again),
    );
  }

  tell(...parts) {
    this.outcome.replaceChildren(...parts.map((part) => (part instanceof Node ? part : h("p", {}, part))));
    this.outcome.scrollIntoView({ block: "nearest" });
  }

  /** Faults as buttons that lead to their place in the text. */
  complain(faults, parses = true) {
    this.text.setAttribute("aria-invalid", "true");
    this.faults.replaceChildren(
      ...faults.map(({ pointer, detail, offset }) => {
        const at = pointer !== undefined && parses ? offsetOf(this.text.value, pointer) : offset ?? null;
        const line = at === null ? null : this.text.value.slice(0, at).split("\n").length;
        const name = pointer ? `${pointer.slice(1).replaceAll("/", ".")}: ` : "";
        const said = `${name}${detail}`;
        if (line === null) return h("li", {}, said);
        const lead = h("button", { type: "button", class: "link" }, `Line ${line}`);
        lead.addEventListener("click", () => this.showLine(line));
        return h("li", {}, lead, ` ${said}`);
      }),
    );
  }

  showLine(line) {
    const lines = this.text.value.split("\n");
    const from = lines.slice(0, line - 1).reduce((sum, one) => sum + one.length + 1, 0);
    this.text.focus();
    this.text.setSelectionRange(from, from + lines[line - 1].length);
    this.text.scrollTop = ((line - 3) * this.text.scrollHeight) / lines.length;
  }
}

/** What a replay found, in sentences. */
function replayText(report) {
  const { rows, replayed_steps: replayed, happened_steps: happened, steps_saved: saved } = report;
  if (rows.length === 0) return ["Nothing was measured yet, so nothing can be replayed."];
  if (rows.every((row) => row.replayed_reason === "hold_no_reading")) {
    return [
      `None of ${format.whole(rows.length)} measurements holds a ${report.policy.estimator} reading that the policy ` +
        "follows: this says nothing about the policy.",
    ];
  }
  const than =
    saved === 0
      ? "as many as happened"
      : `${format.whole(Math.abs(saved))} ${saved > 0 ? "fewer" : "more"} than happened (${format.percent(Math.abs(saved), happened)})`;
  const same = rows.filter((row) => row.replayed_batch_size === row.happened_batch_size).length;
  const first = rows.find((row) => row.replayed_batch_size !== row.happened_batch_size);
  return [
    h(
      "p",
      {},
      h("strong", {}, `${format.whole(replayed)} optimizer steps instead of ${format.whole(happened)}`),
      ` for the same ${format.compact(report.samples)} samples: ${than}.`,
    ),
    `The same batch after ${format.whole(same)} of ${format.whole(rows.length)} measurements; ` +
      `${format.whole(report.num_equal)} of ${format.whole(report.num_compared)} decisions equal in every number and word.`,
    ...(first
      ? [
          `First other batch at step ${format.whole(first.optimizer_step)}: ${format.whole(first.replayed_batch_size)} instead of ` +
            `${format.whole(first.happened_batch_size)}. ${first.replayed_explanation}`,
        ]
      : []),
    h(
      "p",
      { class: "quiet" },
      h("span", { class: "swatch person-swatch", "aria-hidden": "true" }),
      " Its batches are in the chart. A replay folds what was measured: how gradients would have looked along another ramp, it cannot know.",
    ),
  ];
}

/** Chromium and Node name the position of a syntax error; others may not. */
function offsetIn(message) {
  const found = /position (\d+)/.exec(message);
  return found ? Number(found[1]) : null;
}

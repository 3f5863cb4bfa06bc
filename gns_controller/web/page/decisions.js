// The table of decisions and of operator commands: newest first, changes emphasised, a bounded number of rows.

import { h, setText } from "./dom.js";
import * as format from "./format.js";
import { controlText } from "./words.js";

const MOST_ROWS = 150;
const HELD = new Set(["warmup", "hold", "hold_below_deadband", "hold_monotone", "hold_dwell"]);
const WARNED = new Set(["hold_unresolved", "hold_not_finite", "hold_no_reading"]);

/** Which ink a reason's badge has. */
export function toneOf(reason) {
  if (reason === "override") return "person";
  if (WARNED.has(reason)) return "warned";
  return HELD.has(reason) ? "held" : "moved";
}

export class Decisions {
  constructor() {
    this.all = [];
    this.changes = [];
    this.onlyChanges = false;
    this.stale = false;
    this.body = h("tbody");
    this.empty = h("p", { class: "quiet pad" }, "No decision yet.");
    this.count = h("span", { class: "quiet" });
    const filter = h("input", { type: "checkbox", id: "only-changes" });
    filter.addEventListener("change", () => {
      this.onlyChanges = filter.checked;
      this.stale = true;
      this.draw();
    });
    this.element = h(
      "section",
      { class: "card table-card decisions", "aria-labelledby": "title-decisions" },
      h(
        "div",
        { class: "chart-head" },
        h("h2", { id: "title-decisions" }, "Decisions"),
        this.count,
        h("label", { class: "switch", for: "only-changes" }, filter, "only changes"),
      ),
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Decisions, newest first" },
        h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ...["Step", "Samples", "Reason", "Explanation", "Batch", "Noise scale", "Resolution"].map((name) =>
                h("th", { scope: "col" }, name),
              ),
            ),
          ),
          this.body,
        ),
        this.empty,
      ),
    );
  }

  add(sequence, decision) {
    const entry = { sequence, decision };
    push(this.all, entry);
    if (isChange(decision)) push(this.changes, entry);
    this.stale = true;
  }

  /** An operator command: among the changes too, because it changes what decides. */
  addControl(control) {
    const entry = { sequence: control.sequence, control };
    push(this.all, entry);
    push(this.changes, entry);
    this.stale = true;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const entries = this.onlyChanges ? this.changes : this.all;
    const present = new Map([...this.body.children].map((row) => [row.dataset.sequence, row]));
    const rows = entries.map((entry) => present.get(String(entry.sequence)) ?? rowOf(entry)).reverse();
    const wanted = new Set(rows);
    for (const row of present.values()) if (!wanted.has(row)) row.remove();
    rows.forEach((row, index) => {
      if (this.body.children[index] !== row) this.body.insertBefore(row, this.body.children[index] ?? null);
    });
    this.empty.hidden = rows.length > 0;
    setText(this.empty, this.onlyChanges ? "The batch has not changed yet." : "No decision yet.");
    setText(this.count, rows.length >= MOST_ROWS ? `last ${MOST_ROWS}` : rows.length ? String(rows.length) : "");
  }
}

export function isChange(decision) {
  return decision.plan.global_batch_size !== decision.previous_batch_size;
}

function push(entries, entry) {
  let place = entries.length;
  while (place > 0 && entries[place - 1].sequence > entry.sequence) place -= 1;
  if (place > 0 && entries[place - 1].sequence === entry.sequence) return;
  entries.splice(place, 0, entry);
  if (entries.length > MOST_ROWS) entries.shift();
}

export function badge(reason) {
  return h("span", { class: "badge", dataset: { tone: toneOf(reason) } }, reason.replaceAll("_", " "));
}

function rowOf({ sequence, decision, control }) {
  if (control) return controlRow(control);
  const changed = isChange(decision);
  const before = format.whole(decision.previous_batch_size);
  const after = format.whole(decision.plan.global_batch_size);
  return h(
    "tr",
    { class: changed ? "change" : null, dataset: { sequence } },
    h("td", { class: "numeric" }, format.whole(decision.optimizer_step)),
    h("td", { class: "numeric" }, format.compact(decision.samples_seen)),
    h("td", {}, badge(decision.reason)),
    h("td", { class: "sentence" }, decision.explanation),
    h("td", { class: "numeric batch-move" }, changed ? `${before} → ${after}` : after),
    h("td", { class: "numeric" }, format.compact(decision.noise_scale)),
    h("td", { class: "numeric" }, format.ratio(decision.resolution), decision.unresolved ? " (unresolved)" : ""),
  );
}

/** A row for an operator command: its revision, what it did, and when. */
function controlRow(control) {
  const kind = control.action === "override" ? control.override?.kind ?? control.action : control.action;
  const at = new Date(control.received_at);
  return h(
    "tr",
    { class: "control", dataset: { sequence: control.sequence } },
    h("td", { class: "numeric", colspan: 2 }, `revision ${format.whole(control.policy_revision)}`),
    h("td", {}, h("span", { class: "badge", dataset: { tone: "person" } }, kind)),
    h("td", { class: "sentence", colspan: 2 }, controlText(control)),
    h(
      "td",
      { class: "numeric", colspan: 2 },
      h("time", { datetime: control.received_at, title: at.toLocaleString() }, format.moment(control.received_at)),
    ),
  );
}

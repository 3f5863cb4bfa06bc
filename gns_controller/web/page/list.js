// The list of runs: polled, because a handful of small views every two seconds is cheaper than a stream per run.

import { get } from "./api.js";
import { h, setText, showConnection } from "./dom.js";
import * as format from "./format.js";

const POLL_MILLISECONDS = 2000;
const PAGE_SIZE = 100;
const MOST_RUNS = 500;

export async function showList(root) {
  const count = h("p", { class: "quiet" });
  const body = h("tbody");
  const table = h(
    "table",
    { class: "runs" },
    h("caption", { class: "hidden" }, "Runs, newest first"),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ...["Run", "State", "Batch now", "Learning rate", "Noise scale", "Loss", "Progress", "Last report"].map((name) =>
          h("th", { scope: "col" }, name),
        ),
      ),
    ),
    body,
  );
  const filled = h("div", { class: "card table-card", hidden: true }, table);
  const empty = emptyState();
  root.append(h("div", { class: "title-row" }, h("h1", {}, "Runs"), count), filled, empty);
  const rows = new Map();

  async function refresh() {
    if (document.hidden) return;
    try {
      const runs = await allRuns();
      showConnection("live");
      filled.hidden = runs.length === 0;
      empty.hidden = runs.length > 0;
      setText(count, runs.length === 0 ? "" : runs.length >= MOST_RUNS ? `newest ${MOST_RUNS}` : String(runs.length));
      fill(body, rows, runs);
    } catch {
      showConnection("reconnecting");
    }
  }

  document.addEventListener("visibilitychange", refresh);
  for (;;) {
    await refresh();
    await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
  }
}

async function allRuns() {
  const runs = [];
  let cursor = null;
  do {
    const page = await get("/runs", cursor ? { limit: PAGE_SIZE, cursor } : { limit: PAGE_SIZE });
    runs.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor && runs.length < MOST_RUNS);
  return runs.sort((one, other) => Date.parse(other.registered_at) - Date.parse(one.registered_at));
}

function fill(body, rows, runs) {
  const present = new Set(runs.map((run) => run.run_id));
  for (const [name, row] of rows) {
    if (present.has(name)) continue;
    row.element.remove();
    rows.delete(name);
  }
  runs.forEach((run, index) => {
    let row = rows.get(run.run_id);
    if (!row) rows.set(run.run_id, (row = newRow(run)));
    row.update(run);
    if (body.children[index] !== row.element) body.insertBefore(row.element, body.children[index] ?? null);
  });
}

function newRow(run) {
  const state = h("span", { class: "state" });
  const batch = h("strong");
  const start = h("span", { class: "quiet" });
  const rate = h("span");
  const noise = h("strong");
  const resolution = h("span", { class: "quiet" });
  const lossValue = h("strong");
  const progress = h("progress", { max: "1", "aria-label": `Progress of ${run.run_id}` });
  const share = h("span", { class: "quiet" });
  const report = h("span");
  const cell = (label, ...children) => h("td", { "data-label": label }, ...children);
  const element = h(
    "tr",
    { dataset: { run: run.run_id } },
    h(
      "th",
      { scope: "row" },
      h("a", { href: `/runs/${encodeURIComponent(run.run_id)}` }, run.run_id),
      h("span", { class: "quiet" }, optimizerOf(run)),
    ),
    cell("State", state),
    cell("Batch now", h("span", { class: "batch-ink" }, batch), start),
    cell("Learning rate", h("span", { class: "rate-ink" }, rate)),
    cell("Noise scale", h("span", { class: "noise-ink" }, noise), resolution),
    cell("Loss", h("span", { class: "loss-ink" }, lossValue)),
    cell("Progress", progress, share),
    cell("Last report", report),
  );
  return {
    element,
    update(now) {
      const spec = now.specification;
      const decision = now.last_decision;
      state.dataset.state = now.state;
      setText(state, now.state);
      setText(batch, format.whole(batchInForce(now)));
      setText(start, `from ${format.whole(spec.batch.global_batch_size)}`);
      setText(rate, format.factor(factorInForce(now)));
      setText(noise, format.noiseScale(decision));
      setText(resolution, resolutionText(now));
      setText(lossValue, format.loss(now.last_measurement?.loss));
      progress.value = Math.min(1, now.samples_seen / spec.budget_samples);
      setText(share, format.percent(now.samples_seen, spec.budget_samples));
      setText(report, format.age(now.last_report_at));
    },
  };
}

/** The batch the ranks run: the plan's, except in shadow mode, where plans change nothing. */
export function batchInForce(run) {
  if (run.specification.mode !== "shadow") return run.plan.global_batch_size;
  return run.last_measurement?.global_batch_size ?? run.specification.batch.global_batch_size;
}

/** The factor on the learning rate, likewise. */
export function factorInForce(run) {
  return run.specification.mode === "shadow" ? 1 : run.plan.learning_rate_factor;
}

function optimizerOf(run) {
  return run.specification.mode === "shadow" ? `${run.specification.optimizer} · shadow` : run.specification.optimizer;
}

/** What stands beside a noise scale in a list. */
export function resolutionText(run) {
  const decision = run.last_decision;
  if (!decision || format.finite(decision.noise_sq) === null) return "";
  if (decision.unresolved) return `at least about ${format.compact(batchInForce(run))}`;
  return `resolution ${format.ratio(decision.resolution)}`;
}

const SNIPPET = `from trainer_hooks import AdaptiveBatch

session = AdaptiveBatch.attach(
    model, optimizer, run="my-run", controller="ORIGIN",
    global_batch_size=64, micro_batch_size=8, budget_samples=1_562_500,
)
for step in session.steps(dataset):
    for micro_batch in step:
        step.backward(loss_of(model, micro_batch))
    step.apply()`;

function emptyState() {
  return h(
    "section",
    { class: "card empty", hidden: true },
    h("h2", {}, "No runs yet"),
    h("p", {}, "Attach a torchrun job and it appears here with its first step:"),
    h("pre", { tabindex: "0" }, h("code", {}, SNIPPET.replace("ORIGIN", location.origin))),
    h("p", { class: "quiet" }, "Or see one at work: ", h("code", {}, "make demo")),
  );
}

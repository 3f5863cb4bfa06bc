// One run: what it is, where it stands, who decides, four charts and the decisions behind them.
//
// History and news arrive on one event stream, replayed from the beginning, so nothing can fall between the two.

import { ApiError, follow, get } from "./api.js";
import { CLOCKS, Charts } from "./charts.js";
import { Control } from "./control.js";
import { Decisions, badge } from "./decisions.js";
import { h, setText, showConnection } from "./dom.js";
import * as format from "./format.js";
import { History } from "./history.js";
import { batchInForce, factorInForce, resolutionText } from "./list.js";
import { Readings } from "./readings.js";

const VIEW_MILLISECONDS = 3000;
const DRAW_MILLISECONDS = 200;

export async function showRun(root, runId) {
  document.title = `${runId} · gns-controller`;
  const path = `/runs/${encodeURIComponent(runId)}`;
  const view = await firstView(root, runId, path);
  if (!view) return;

  const specification = view.specification;
  const header = new Header(view);
  const history = new History(specification);
  const charts = new Charts(specification);
  const readings = new Readings(specification);
  const decisions = new Decisions();
  const control = new Control({ view, path, charts });
  root.append(
    header.element,
    control.element,
    toolbar(charts, specification),
    charts.element,
    readings.element,
    decisions.element,
  );
  charts.rebuild();
  header.update(view);
  readings.add(view.last_measurement, view.policy);
  readings.draw();

  let waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      charts.update(history.points);
      control.follow(header.view);
      readings.draw();
      decisions.draw();
    }, DRAW_MILLISECONDS);
  };
  let foreseen = null;
  const foresee = async (now) => {
    const key = [now.num_measurements, now.attempt, now.policy_revision].join();
    if (foreseen === key) return;
    const schedule = await get(`${path}/schedule`);
    foreseen = key;
    history.learnPlans(schedule.plans);
    header.foresee(schedule.projection);
    charts.foresee(schedule.projection);
  };
  const refresh = async () => {
    if (document.hidden) return;
    try {
      const now = await get(path);
      header.update(now);
      control.update(now);
      await foresee(now);
    } catch {
      // The stream's own state is what the top bar shows.
    }
  };

  let announced = null;
  const soon = () => {
    clearTimeout(announced);
    announced = setTimeout(refresh, DRAW_MILLISECONDS);
  };

  await foresee(view).catch(() => {}); // factors then come from the decisions alone
  setInterval(refresh, VIEW_MILLISECONDS);
  setInterval(() => header.tick(), 1000);
  document.addEventListener("visibilitychange", refresh);
  follow(`${path}/events`, {
    after: 0,
    signal: new AbortController().signal,
    onState: (state) => showConnection(state),
    onEvent: (event) => {
      if (event.type === "measurement") {
        const news = JSON.parse(event.data);
        history.add(news);
        if (news.decision) decisions.add(news.sequence, news.decision);
        header.news(news);
        if (news.measurement.attempt >= header.view.attempt) readings.add(news.measurement, header.view.policy);
        redraw();
      } else {
        if (event.type === "control") {
          decisions.addControl(JSON.parse(event.data));
          redraw();
        }
        soon();
      }
    },
  });
}

async function firstView(root, runId, path) {
  for (;;) {
    try {
      return await get(path);
    } catch (error) {
      if (error instanceof ApiError && (error.status === 404 || error.status === 422)) {
        showConnection("live");
        root.append(
          h("h1", {}, runId),
          h(
            "section",
            { class: "card empty" },
            h("h2", {}, "No such run"),
            h("p", {}, "No run of this name has registered here. "),
            h("p", {}, h("a", { href: "/" }, "All runs")),
          ),
        );
        return null;
      }
      if (error instanceof ApiError && error.status === 403) {
        showConnection("refused", "not allowed");
        root.append(h("h1", {}, runId), h("p", { role: "alert" }, error.message));
        return null;
      }
      showConnection("reconnecting");
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

function toolbar(charts, specification) {
  const clocks = specification.tokens_per_sample ? ["samples", "tokens", "steps"] : ["samples", "steps"];
  const reset = h("button", { type: "button", class: "plain", hidden: true }, "Show the whole run");
  reset.addEventListener("click", () => {
    charts.resetZoom();
    reset.hidden = true;
  });
  charts.onZoom = () => {
    reset.hidden = !charts.zoomed;
  };
  return h(
    "div",
    { class: "toolbar" },
    h(
      "fieldset",
      { class: "segments" },
      h("legend", {}, "Over"),
      ...clocks.map((clock) => {
        const input = h("input", { type: "radio", name: "clock", id: `clock-${clock}`, checked: clock === "samples" });
        input.addEventListener("change", () => {
          charts.setClock(clock);
          charts.update(charts.points);
          reset.hidden = true;
        });
        return h("span", {}, input, h("label", { for: `clock-${clock}` }, CLOCKS[clock].label));
      }),
    ),
    h("span", { class: "quiet hint" }, "Drag in a chart to zoom, double-click to see it all"),
    reset,
  );
}

class Header {
  constructor(view) {
    const tile = (label, ink) => {
      const value = h("strong", { class: ink });
      const note = h("span", { class: "quiet" });
      return { element: h("div", { class: "tile" }, h("span", { class: "label" }, label), value, note), value, note };
    };
    this.batch = tile("Batch now", "batch-ink");
    this.rate = tile("Learning rate", "rate-ink");
    this.noise = tile("Noise scale", "noise-ink");
    this.loss = tile("Training loss", "loss-ink");
    this.speed = tile("Throughput", "");
    this.report = tile("Last report", "");
    this.left = tile("Steps left", "");
    this.saved = tile("Steps saved", "");
    this.projection = null;
    this.decided = null;
    this.state = h("span", { class: "state", role: "status", "aria-live": "polite" });
    this.progress = h("progress", { max: "1", "aria-label": "Progress" });
    this.share = h("span", { class: "quiet" });
    this.reason = h("span");
    this.sentence = h("span", { class: "sentence" });
    this.facts = h("dl", { class: "facts" });
    const specification = view.specification;
    this.element = h(
      "header",
      { class: "run-head" },
      h("p", { class: "crumbs" }, h("a", { href: "/" }, "Runs")),
      h("div", { class: "title-row" }, h("h1", {}, view.run_id), this.state),
      specification.description ? h("p", { class: "description" }, specification.description) : null,
      this.facts,
      h("div", { class: "progress-row" }, this.progress, this.share),
      h(
        "div",
        { class: "tiles" },
        ...[this.batch, this.rate, this.noise, this.loss, this.speed, this.report, this.left, this.saved].map(
          (one) => one.element,
        ),
      ),
      h("p", { class: "latest", role: "status", "aria-live": "polite" }, this.reason, this.sentence),
    );
    this.view = view;
  }

  /** A measurement that was just reported: newer than the view until the next refresh. */
  news({ sequence, received_at, measurement, decision }) {
    if (sequence <= (this.sequence ?? 0) || measurement.attempt < this.view.attempt) return;
    this.sequence = sequence;
    if (decision && decision.reason !== "hold_no_reading") this.decided = decision;
    if (Date.parse(received_at) < Date.parse(this.view.last_report_at ?? 0)) return;
    const state = this.view.state === "registered" || this.view.state === "silent" ? "running" : this.view.state;
    this.update({
      ...this.view,
      state,
      attempt: measurement.attempt,
      optimizer_step: measurement.optimizer_step,
      samples_seen: measurement.samples_seen,
      plan: decision?.plan ?? this.view.plan,
      last_measurement: measurement,
      last_decision: decision ?? this.view.last_decision,
      last_report_at: received_at,
    });
  }

  /** What is expected to come, or null. */
  foresee(projection) {
    this.projection = projection;
    this.update(this.view);
  }

  update(view) {
    this.view = view;
    const { specification, last_measurement: measurement, last_decision: decision } = view;
    const { batch } = specification;
    this.state.dataset.state = view.state;
    setText(this.state, view.state);
    setText(this.batch.value, format.whole(batchInForce(view)));
    setText(this.batch.note, `samples, from ${format.whole(batch.global_batch_size)}`);
    setText(this.rate.value, format.factor(factorInForce(view)));
    setText(this.rate.note, batch.learning_rate_coupling === "none" ? "not coupled" : `${batch.learning_rate_coupling} coupling`);
    setText(this.noise.value, format.noiseScale(decision));
    setText(this.noise.note, noiseNote(view));
    setText(this.loss.value, format.loss(measurement?.loss));
    const validation = format.number(measurement?.validation_loss);
    setText(this.loss.note, validation === null ? `at step ${format.whole(view.optimizer_step)}` : `validation ${format.loss(validation)}`);
    const perSecond = format.finite(measurement?.samples_per_second);
    setText(this.speed.value, perSecond === null ? "–" : `${format.compact(perSecond)} /s`);
    setText(this.speed.note, measurement?.step_seconds == null ? "samples" : `samples, ${format.seconds(measurement.step_seconds)} per step`);
    const [left, leftNote] = leftTexts(view, this.projection);
    setText(this.left.value, left);
    setText(this.left.note, leftNote);
    setText(this.saved.value, view.savings ? format.whole(view.savings.steps_saved) : "–");
    setText(this.saved.note, savedNote(view.savings));
    this.progress.value = Math.min(1, view.samples_seen / specification.budget_samples);
    setText(this.share, progressText(view));
    const finished = view.state === "finished";
    const reason = finished ? "" : decision?.reason ?? "";
    if (this.reason.dataset.reason !== reason) {
      this.reason.dataset.reason = reason;
      this.reason.replaceChildren(...(reason ? [badge(reason)] : []));
    }
    const end = `Finished after ${format.whole(view.optimizer_step)} steps with a batch of ${format.whole(batchInForce(view))} samples.`;
    const before = decision?.reason === "hold_no_reading" ? this.decided : decision; // the last report has no reading
    const last = before ? ` The last decision: ${before.explanation}` : "";
    setText(this.sentence, finished ? end + last : decision?.explanation ?? "No decision yet.");
    const facts = factsOf(view);
    const key = JSON.stringify(facts);
    if (this.shown !== key) {
      this.shown = key;
      this.facts.replaceChildren(
        ...facts.map(([name, value, about]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, about && question(name, about)))),
      );
    }
    this.tick();
  }

  tick() {
    setText(this.report.value, format.age(this.view.last_report_at));
    setText(this.report.note, `attempt ${this.view.attempt}, step ${format.whole(this.view.optimizer_step)}`);
  }
}

/** A question mark that opens what a fact means: by mouse, touch, keyboard and screen reader alike. */
function question(name, about) {
  return h("details", { class: "about" }, h("summary", { "aria-label": `What ${name.toLowerCase()} means` }, "?"), h("p", {}, about));
}

/** Optimizer steps to the end of the budget, and the interval around them. */
function leftTexts(view, projection) {
  if (view.state === "finished") return ["0", "the budget is used up"];
  if (!projection) return ["–", "known after the first measurement"];
  const { expected, least, most } = projection.steps_left;
  if (least !== most) return [format.whole(expected), `${format.whole(least)} to ${format.whole(most)}`];
  const waits = view.last_decision?.unresolved && !view.override;
  return [format.whole(expected), waits ? "if it stays unresolved" : "expected"];
}

/** What the ramp so far was worth beside the batch of the start, in steps and time; losses are called losses. */
export function savedNote(savings) {
  if (!savings) return "known after the first measurement";
  const { constant_batch_size: batch, steps_saved: saved, steps_saved_share: share, seconds_saved: time } = savings;
  const size = `${format.percent(Math.abs(share), 1)} ${saved < 0 ? "more" : "fewer"} than`;
  const steps = `${saved === 0 ? "as many as" : size} with a constant ${format.whole(batch)}`;
  if (time === null) return `${steps}, time not known yet`;
  return `${steps}, ${format.seconds(Math.abs(time))} ${time < 0 ? "lost" : "saved"}`;
}

const ADVISED =
  "The most ranks that the present batch keeps busy with whole micro-batches: batch over micro-batch size. With more ranks " +
  "each would get a smaller micro-batch; with fewer, ranks accumulate over several passes. Advice for whoever scales " +
  "the job: nothing here applies it. Where the batch is no whole number of micro-batches: the present ranks. In shadow " +
  "mode it is about the trainer's batch.";

function noiseNote(view) {
  const decision = view.last_decision;
  if (!decision || format.finite(decision.noise_sq) === null) return "samples";
  if (decision.unresolved) return resolutionText(view);
  const interval = format.interval(decision.noise_scale_low, decision.noise_scale_high);
  return `${interval ? `${interval} samples` : "samples"}, ${resolutionText(view)}`;
}

function progressText(view) {
  const { budget_samples: budget, tokens_per_sample: tokens } = view.specification;
  const parts = [
    `${format.percent(view.samples_seen, budget)}: ${format.compact(view.samples_seen)} of ${format.compact(budget)} samples`,
  ];
  if (tokens) parts.push(`${format.compact(view.samples_seen * tokens)} of ${format.compact(budget * tokens)} tokens`);
  return parts.join(", ");
}

function intervalText(interval) {
  return interval.steps ? `${interval.steps} steps` : `${format.compact(interval.samples)} samples`;
}

function factsOf(view) {
  const { specification, policy, plan } = view;
  const ranks = view.last_measurement?.data_parallel_size ?? specification.data_parallel_size;
  const { measurement_interval: interval, measurement_budget: budget } = specification;
  const geometries = [...new Set(specification.parameter_groups.map((group) => group.geometry))];
  return [
    ["Optimizer", specification.optimizer],
    ["Geometry", policy.geometry ?? (geometries.join(", ") || "first reading")],
    ["Policy", `${policy.policy}, revision ${view.policy_revision}`],
    ["Estimator", policy.estimator + (policy.direction === "update" ? " of the update" : "")],
    ...(policy.aggregation === "matrices_only" ? [] : [["Groups", policy.aggregation.replaceAll("_", " ")]]),
    ...(policy.correct_few_groups ? [["Corrected", "for few groups"]] : []),
    ...(policy.noise_tolerance === undefined ? [] : [["Noise tolerance", String(policy.noise_tolerance)]]),
    ["Batch", `${plan.micro_batch_size} × ${plan.gradient_accumulation_steps} passes × ${ranks} ranks`],
    ["Advised ranks", format.whole(view.advised_data_parallel_size), ADVISED],
    ["Measured every", interval ? intervalText(interval) : "as often as its budget allows"],
    ...(budget ? [["Measuring may take", `${format.compact(100 * budget)} %`]] : []),
    ...(specification.mode === "shadow" ? [["Mode", "shadow: decides, changes nothing"]] : []),
  ];
}

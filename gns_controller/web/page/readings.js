// The last reading of each parameter group, before any averaging: what was measured, how, and how well.

import { h, setText } from "./dom.js";
import * as format from "./format.js";

const COLUMNS = ["Group", "Measured", "Noise", "Signal", "Progress", "Noise scale", "From"];
const ABOUT =
  "One measurement, not averaged, so far noisier than the noise scale above. ± is one standard error, known where the " +
  "halves were dealt out more than once. Below a split noise scale: what it would be with the full norm of the halves " +
  "for the gradient, which noise makes too large, and with the bare progress, which noise makes too small: on average " +
  "the truth lies between. Below a rank_variance noise scale: what pure noise would read. The policy averages what is marked.";

export class Readings {
  constructor(specification) {
    this.optimizers = new Map(specification.parameter_groups.map((group) => [group.name, group.optimizer]));
    this.measurement = null;
    this.policy = null;
    this.stale = false;
    this.body = h("tbody");
    this.step = h("span", { class: "unit" });
    this.element = h(
      "section",
      { class: "card table-card readings", "aria-labelledby": "title-readings", hidden: true },
      h(
        "div",
        { class: "chart-head" },
        h("h2", { id: "title-readings" }, "Last reading of each group"),
        this.step,
        h(
          "details",
          { class: "about" },
          h("summary", { "aria-label": "What these readings mean" }, "?"),
          h("p", {}, ABOUT),
        ),
      ),
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Last reading of each group" },
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, ...COLUMNS.map((name) => h("th", { scope: "col" }, name)))),
          this.body,
        ),
      ),
    );
  }

  /** The newest measurement with readings, and the policy that looks at it. */
  add(measurement, policy) {
    if (!measurement?.readings.length) return;
    this.measurement = measurement;
    this.policy = policy;
    this.stale = true;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const { readings, optimizer_step: step } = this.measurement;
    const followed = followedBy(this.policy, readings);
    this.element.hidden = false;
    setText(this.step, `step ${format.whole(step)}, not averaged`);
    this.body.replaceChildren(...readings.map((reading) => this.rowOf(reading, followed.includes(reading))));
  }

  rowOf(reading, followed) {
    const { noise, signal, progress } = reading;
    const optimizer = this.optimizers.get(reading.group);
    return h(
      "tr",
      { class: followed ? "followed" : null, dataset: { group: reading.group } },
      h(
        "th",
        { scope: "row" },
        reading.group,
        followed ? h("span", { class: "badge" }, "followed") : null,
        optimizer ? h("span", { class: "quiet" }, optimizer) : null,
      ),
      h("td", {}, reading.geometry, h("span", { class: "quiet" }, `${reading.estimator}, ${reading.direction ?? "gradient"}`)),
      h("td", { class: "numeric" }, format.uncertain(noise, reading.noise_standard_error)),
      h("td", { class: "numeric" }, format.compact(signal)),
      h("td", { class: "numeric" }, format.uncertain(progress, reading.progress_standard_error)),
      h("td", { class: "numeric" }, scaleOf(reading), h("span", { class: "quiet" }, bracketOf(reading))),
      h("td", { class: "numeric" }, originOf(reading)),
    );
  }
}

/** Which readings the policy averages. With "max" it chooses between them after averaging. */
function followedBy(policy, readings) {
  const matching = readings.filter(
    (reading) =>
      reading.estimator === policy.estimator &&
      (reading.direction ?? "gradient") === (policy.direction ?? "gradient") &&
      (policy.geometry === null || reading.geometry === policy.geometry),
  );
  return (policy.aggregation ?? "matrices_only") === "matrices_only" ? matching.slice(0, 1) : matching;
}

function scaleOf(reading) {
  const [noise, signal] = [format.finite(reading.noise), format.finite(reading.signal)];
  const other = reading.estimator === "split" ? format.finite(reading.progress) : signal;
  if (noise === null || signal === null || other === null) return "not finite";
  return signal * other > 0 ? format.compact((noise * noise) / (signal * other)) : "no signal";
}

/** split: the noise scale with the full norm, and with the bare progress, in place of their product. */
function bracketOf(reading) {
  if (reading.estimator !== "split") {
    const ceiling = format.finite(reading.ceiling_samples);
    return ceiling === null ? "" : `ceiling ${format.compact(ceiling)}`;
  }
  const [noise, signal, progress] = [reading.noise, reading.signal, reading.progress].map(format.finite);
  if (noise === null || !(signal > 0)) return "";
  return format.interval((noise / signal) ** 2, progress > 0 ? (noise / progress) ** 2 : null);
}

function originOf(reading) {
  const groups = `${reading.num_groups} groups of ${format.compact(reading.samples_per_group)}`;
  const patterns = reading.num_sign_patterns;
  if (!patterns) return groups;
  return `${groups}, ${patterns === 1 ? "one pair of halves" : `${patterns} pairs of halves`}`;
}

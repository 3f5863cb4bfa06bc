// The four charts of a run: one x axis, one cursor, one ink per quantity.

import { batchesReplayed, cornersAhead } from "./ahead.js";
import { h, setText } from "./dom.js";
import * as format from "./format.js";
import { band, cross, present, shade } from "./marks.js";

/* global uPlot */

const LINKED = "run";
const HEIGHT = 230;

/** What the x axis can count. */
export const CLOCKS = {
  samples: { label: "samples", of: (point) => point.samples },
  tokens: { label: "tokens", of: (point, tokens) => point.samples * tokens },
  steps: { label: "optimizer steps", of: (point) => point.step },
};

const CHARTS = [
  {
    key: "noise",
    title: "Noise scale",
    unit: "samples, log scale",
    log: 10,
    about:
      "Noise over signal of the gradient in the optimizer's own norm, smoothed: roughly the batch beyond which more " +
      "samples per step stop paying. The ceiling is the largest value this estimator could tell from pure noise at " +
      "this batch. The coloured band is two standard errors of noise and signal either way; where it has no upper end it " +
      "goes up to the top. Where the ground is shaded the reading is unresolved: all it says is at least about the present batch.",
    series: [
      {
        key: "noise",
        label: "noise scale",
        ink: "noise",
        width: 2,
        show: format.compact,
        detail: (point) => format.interval(point.low, point.high),
      },
      { key: "ceiling", label: "ceiling", ink: "ceiling", dash: [6, 5], width: 1.5, show: format.compact },
      { key: "batch", label: "batch", ink: "batch", width: 1, stairs: true, show: format.whole },
    ],
    shade: (point) => point.unresolved,
    band: { ink: "interval", ends: (point) => [point.low, point.high] },
  },
  {
    key: "batch",
    title: "Global batch size",
    unit: "samples per optimizer step, log scale",
    log: 2,
    about:
      "Samples per optimizer step over all ranks, as the trainer reported it. It changes only at a step boundary, " +
      "on every rank at once. From the ring on, the dashed line is the ramp to expect if everything measured stays as it is " +
      "now, up to the end of the budget; the band is the same with both ends of the noise scale's interval. In shadow " +
      "mode the dotted line is what the policy asks for and nobody obeys.",
    ahead: true,
    band: { ink: "ahead", ends: (row) => [row.least, row.most], stairs: true },
    series: [
      { key: "batch", label: "batch in force", ink: "batch", width: 2, stairs: true, show: format.whole },
      {
        key: "expected",
        label: "expected",
        ink: "expected",
        dash: [6, 4],
        width: 2,
        stairs: true,
        show: format.whole,
        detail: (row) => (row.expected ? spread(row.least, row.most) : ""),
        when: (panel) => panel.corners.length > 0,
      },
      {
        key: "edited",
        label: "edited policy",
        ink: "person",
        dash: [9, 3],
        width: 2,
        stairs: true,
        show: format.whole,
        when: (panel) => panel.charts.replayed !== null,
      },
      {
        key: "requested",
        label: "asked for",
        ink: "requested",
        dash: [2, 4],
        width: 1.5,
        show: format.compact,
        only: (specification) => specification.mode === "shadow",
      },
    ],
  },
  {
    key: "rate",
    title: "Learning-rate factor",
    unit: "multiple of the scheduled learning rate",
    about:
      "What the batch change does to the learning rate, on top of your own schedule. 1 means as you set it; with the " +
      "square-root coupling a batch four times as large doubles it.",
    series: [{ key: "factor", label: "factor", ink: "rate", width: 2, stairs: true, show: format.factor }],
  },
  {
    key: "loss",
    title: "Loss",
    unit: "as the trainer reports it",
    about:
      "Mean training loss since the last report, and validation loss where the trainer sends one. A gap with a cross " +
      "below it is a loss that was not finite.",
    series: [
      { key: "loss", label: "training", ink: "loss", width: 1.5, show: format.loss, gaps: true },
      { key: "validation", label: "validation", ink: "validation", points: true, show: format.loss },
    ],
    crosses: (point) => point.loss !== null && !Number.isFinite(point.loss),
  },
];

/** All four charts in one grid. `update(history)` redraws them; nothing is drawn more often than a frame. */
export class Charts {
  constructor(specification) {
    this.specification = specification;
    this.clock = "samples";
    this.points = [];
    this.projection = null;
    this.replayed = null;
    this.zoomed = false;
    this.element = h("div", { class: "charts" });
    this.panels = CHARTS.map((chart) => new Panel(chart, this));
    this.element.append(...this.panels.map((panel) => panel.element));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  setClock(clock) {
    this.clock = clock;
    this.zoomed = false;
    this.rebuild();
  }

  rebuild() {
    for (const panel of this.panels) panel.build();
  }

  resetZoom() {
    this.zoomed = false;
    for (const panel of this.panels) panel.draw();
  }

  resize() {
    for (const panel of this.panels) panel.resize();
  }

  update(points) {
    this.points = points;
    for (const panel of this.panels) panel.draw();
  }

  /** What is expected to come, or null. */
  foresee(projection) {
    this.projection = projection;
    for (const panel of this.panels) if (panel.chart.ahead) panel.draw();
  }

  /** The rows of a replay of another policy, or null to take them away again. */
  compare(rows) {
    this.replayed = rows;
    for (const panel of this.panels) if (panel.chart.ahead) panel.draw();
  }

  /** Where a row stands on the x axis. */
  placeOf(row) {
    return CLOCKS[this.clock].of(row, this.specification.tokens_per_sample ?? 1);
  }
}

class Panel {
  constructor(chart, charts) {
    this.chart = chart;
    this.charts = charts;
    this.series = chart.series.filter((series) => !series.only || series.only(charts.specification));
    this.values = this.series.map(() => h("strong", { class: "value" }, "–"));
    this.details = this.series.map((series) => (series.detail ? h("span", { class: "detail" }) : null));
    this.rows = [];
    this.corners = [];
    this.x = [];
    this.now = null;
    this.canvas = h("div", { class: "plot", role: "img" });
    this.waiting = h("p", { class: "waiting" }, "No measurement yet");
    this.note = h("span", { class: "note" });
    const about = `about-${chart.key}`;
    this.element = h(
      "section",
      { class: "card chart", "aria-labelledby": `title-${chart.key}`, dataset: { chart: chart.key } },
      h(
        "div",
        { class: "chart-head" },
        h("h2", { id: `title-${chart.key}` }, chart.title),
        h("span", { class: "unit" }, chart.unit),
        h(
          "details",
          { class: "about", id: about },
          h("summary", { "aria-label": `What ${chart.title.toLowerCase()} means` }, "?"),
          h("p", {}, chart.about),
        ),
      ),
      h(
        "ul",
        { class: "legend" },
        ...this.series.map((series, index) =>
          h(
            "li",
            { hidden: Boolean(series.when) },
            h("span", { class: `swatch ${series.ink}-swatch`, "aria-hidden": "true" }),
            h("span", {}, series.label),
            this.values[index],
            this.details[index],
          ),
        ),
        h("li", {}, this.note),
      ),
      h("div", { class: "plot-frame" }, this.canvas, this.waiting),
    );
  }

  build() {
    this.plot?.destroy();
    this.plot = null;
    this.draw();
  }

  width() {
    return Math.max(240, Math.floor(this.canvas.clientWidth));
  }

  resize() {
    if (this.plot && this.plot.width !== this.width()) this.plot.setSize({ width: this.width(), height: HEIGHT });
  }

  draw() {
    this.gather();
    const { rows, x } = this;
    this.waiting.hidden = rows.length > 0;
    this.series.forEach((series, place) => {
      if (series.when) this.values[place].parentElement.hidden = !series.when(this);
    });
    if (rows.length > 0) {
      const data = [x, ...this.series.map((series) => rows.map((row) => valueOf(series, row)))];
      if (this.plot) {
        const kept = this.charts.zoomed ? { ...this.plot.scales.x } : null;
        this.plot.setData(data, !kept);
        if (kept) this.plot.setScale("x", { min: kept.min, max: kept.max });
      } else {
        this.plot = new uPlot(this.options(), data, this.canvas);
      }
    }
    this.readOut(null);
  }

  /** The rows of this chart: the points, and where it looks ahead, the replayed batches and the corners to come. */
  gather() {
    const { points, projection, replayed, specification } = this.charts;
    this.rows = points;
    if (this.chart.ahead && points.length > 0) {
      const first = specification.batch.global_batch_size;
      const edited = replayed && batchesReplayed(replayed, points, first);
      if (edited) this.rows = points.map((point, index) => ({ ...point, edited: edited[index] }));
      this.corners = cornersAhead(projection, points.at(-1), specification.budget_samples);
      this.now = { index: points.length - 1, value: points.at(-1).batch };
      this.rows = this.rows.concat(this.corners.filter((corner) => corner.samples > points.at(-1).samples));
      if (this.corners[0]?.samples === points.at(-1).samples) {
        this.rows[points.length - 1] = { ...this.rows[points.length - 1], ...this.corners[0] };
      }
    }
    this.x = this.rows.map((row) => this.charts.placeOf(row));
  }

  /** The legend: values under the cursor, or the latest. */
  readOut(index) {
    const { rows } = this;
    const latest = index === null || index === undefined;
    const row = latest ? rows.at(-1) : rows[index];
    this.series.forEach((series, place) => {
      const value = latest ? latestOf(rows, series.key) : row?.[series.key];
      setText(this.values[place], series.show(value ?? null));
      if (series.detail) setText(this.details[place], row ? series.detail(row) : "");
    });
    const words = [];
    if (row && this.chart.shade?.(row)) words.push(`unresolved: at least about ${format.compact(row.batch)}`);
    if (row && this.chart.crosses?.(row)) words.push("not finite");
    setText(this.note, words.join(", "));
    if (!latest) return;
    const spoken = this.series.flatMap((series, place) => {
      if (series.when && !series.when(this)) return [];
      const detail = this.details[place]?.textContent;
      const ahead = series.key === "expected" ? " at the end" : "";
      return [`${series.label}${ahead} ${this.values[place].textContent}${detail ? `, ${detail}` : ""}`];
    });
    this.canvas.setAttribute("aria-label", `${this.chart.title}, latest: ${[...spoken, ...words].join(", ")}`);
  }

  /** Room for the interval ahead too, which is no line. */
  withBand(low, high) {
    const ends = this.corners.flatMap((corner) => [corner.least, corner.most]);
    return low === null ? [low, high] : [Math.min(low, ...ends), Math.max(high, ...ends)];
  }

  options() {
    const style = getComputedStyle(document.documentElement);
    const ink = (name) => style.getPropertyValue(`--${name}`).trim();
    const chart = this.chart;
    const clock = CLOCKS[this.charts.clock];
    const font = `12px ${style.getPropertyValue("--sans").trim()}`;
    const axis = {
      stroke: ink("quiet"),
      font,
      grid: { stroke: ink("grid"), width: 1 },
      ticks: { show: false },
    };
    return {
      width: this.width(),
      height: HEIGHT,
      padding: [8, 12, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: LINKED }, y: false, points: { size: 7 }, drag: { x: true, y: false } },
      scales: {
        x: { time: false, range: (_, low, high) => (low === high ? [Math.max(0, low - 1), high + 1] : [low, high]) },
        y: chart.log
          ? { distr: 3, log: chart.log, range: (_, low, high) => logRange(...this.withBand(low, high), chart.log) }
          : { range: (_, low, high) => linearRange(low, high) },
      },
      axes: [
        {
          ...axis,
          label: clock.label,
          labelFont: font,
          labelSize: 18,
          size: 30,
          space: 70,
          values: (_, splits) => splits.map(format.compact),
        },
        {
          ...axis,
          size: 56,
          space: 28,
          ...(chart.log && {
            splits: (plot, _, low, high) => logSplits(low, high, chart.log, plot.bbox.height / devicePixelRatio / 28),
            filter: (_, splits) => splits,
          }),
          values: (_, splits) => splits.map(chart.log === 2 ? format.power : format.compact),
        },
      ],
      series: [
        {},
        ...this.series.map((series) => ({
          label: series.label,
          stroke: ink(series.ink),
          width: series.width ?? 0,
          dash: series.dash,
          ...(series.stairs && { paths: uPlot.paths.stepped({ align: -1 }) }),
          ...(series.points && { paths: () => null }),
          points: series.points
            ? { show: true, size: 8, width: 2, stroke: ink(series.ink), fill: ink("card") }
            : { show: (plot) => plot.data[0].length < 2, size: 6, fill: ink(series.ink) },
        })),
      ],
      hooks: {
        drawClear: [
          (plot) => {
            if (chart.shade) shade(plot, this, ink);
            if (chart.band) band(plot, this, ink);
          },
        ],
        draw: [
          (plot) => {
            if (chart.crosses) cross(plot, this, ink);
            if (this.corners.length > 0) present(plot, this, ink, style.getPropertyValue("--sans").trim());
          },
        ],
        setCursor: [(plot) => this.readOut(plot.cursor.idx)],
        setSelect: [
          (plot) => {
            if (plot.select.width > 0) this.charts.zoomed = true;
            this.charts.onZoom?.();
          },
        ],
        ready: [
          (plot) =>
            plot.over.addEventListener("dblclick", () => {
              this.charts.zoomed = false;
              this.charts.onZoom?.();
            }),
        ],
      },
    };
  }
}

/** What uPlot draws: null is a gap, undefined is nothing to draw and the line goes on. */
function valueOf(series, point) {
  const value = point[series.key];
  if (value === null || value === undefined) return series.gaps ? undefined : null;
  return Number.isFinite(value) ? value : null;
}

/** The newest value: of the newest point, except where points may come without one. Of `expected`, the last. */
function latestOf(rows, key) {
  const skips = key === "validation" ? null : undefined;
  for (let index = rows.length - 1; index >= 0; index -= 1) {
    if (rows[index][key] !== skips && rows[index][key] !== undefined) return rows[index][key];
  }
  return null;
}

/** "256 to 1,024", or nothing where both ends are the same. */
function spread(least, most) {
  return least === most ? "" : `${format.whole(least)} to ${format.whole(most)}`;
}

function logRange(low, high, base) {
  if (low === null || high === null) return [1, base ** 3];
  const power = (value) => Math.log(value) / Math.log(base);
  const room = base === 2 ? 0.5 : 0.12;
  let [from, to] = [power(low) - room, power(high) + room];
  const least = base === 2 ? 2 : 1;
  if (to - from < least) [from, to] = [from - (least - to + from) / 2, to + (least - to + from) / 2];
  return [base ** from, base ** to];
}

function linearRange(low, high) {
  if (low === null || high === null) return [0, 1];
  const room = (high - low) * 0.12 || Math.abs(high) * 0.25 || 1;
  return [low - room, high + room];
}

/** Powers of the base, thinned to what fits; 1-2-5 where a decade has room. */
function logSplits(low, high, base, fits) {
  const first = Math.floor(Math.log(low) / Math.log(base));
  const last = Math.ceil(Math.log(high) / Math.log(base));
  const every = Math.max(1, Math.ceil((last - first) / Math.max(2, fits)));
  const within = base === 10 && Math.log10(high / low) * 3 <= fits + 1 ? [1, 2, 5] : [1];
  const splits = [];
  for (let power = first; power <= last; power += every) {
    for (const digit of within) {
      const value = digit * base ** power;
      if (value >= low && value <= high) splits.push(value);
    }
  }
  return splits;
}

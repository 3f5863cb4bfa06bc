// What the charts draw beside their lines: shaded ground, bands, crosses, the present point.
//
// Each mark is (plot, panel, ink) => void and draws in the plot's own canvas, clipped to the plot. A panel has `rows`,
// ascending in x, and `x`, where they stand.

/** Shade the stretches where the reading is unresolved. */
export function shade(plot, { chart, rows, x }, ink) {
  clipped(plot, (context, { top, height }) => {
    for (const [first, last] of stretches(rows, (row) => chart.shade(row))) {
      const from = plot.valToPos(x[Math.max(0, first - 1)], "x", true);
      const to = Math.max(plot.valToPos(x[last], "x", true), from + 2);
      context.fillStyle = ink("unresolved");
      context.fillRect(from, top, to - from, height);
      context.fillStyle = ink("unresolved-edge");
      context.fillRect(from, top + height - 3 * devicePixelRatio, to - from, 3 * devicePixelRatio);
    }
  });
}

/** Fill from the lower to the upper end of an interval, up to the top where there is no upper end. */
export function band(plot, { chart, rows, x }, ink) {
  const { ends, stairs } = chart.band;
  clipped(plot, (context, { top, height }) => {
    const at = (index) => plot.valToPos(x[index], "x", true);
    const low = (row) => {
      const value = ends(row)[0];
      return value > 0 ? Math.min(plot.valToPos(value, "y", true), top + height) : top + height;
    };
    const high = (row) => {
      const value = ends(row)[1];
      return value > 0 ? Math.max(plot.valToPos(value, "y", true), top) : top;
    };
    context.fillStyle = ink(chart.band.ink);
    for (const [first, last] of stretches(rows, (row) => (ends(row)[0] ?? null) !== null)) {
      context.beginPath();
      for (let index = first; index <= last; index += 1) {
        if (stairs && index > first) context.lineTo(at(index - 1), high(rows[index]));
        context.lineTo(at(index), high(rows[index]));
      }
      for (let index = last; index >= first; index -= 1) {
        context.lineTo(at(index), low(rows[index]));
        if (stairs && index > first) context.lineTo(at(index - 1), low(rows[index]));
      }
      context.closePath();
      context.fill();
    }
  });
}

/** A small cross at the foot of the chart for each loss that was not finite. */
export function cross(plot, { chart, rows, x }, ink) {
  const arm = 4 * devicePixelRatio;
  clipped(plot, (context, { top, height }) => {
    const y = top + height - 2.5 * arm;
    context.strokeStyle = ink("danger");
    context.lineWidth = 1.5 * devicePixelRatio;
    rows.forEach((row, index) => {
      if (!chart.crosses(row)) return;
      const at = plot.valToPos(x[index], "x", true);
      context.beginPath();
      context.moveTo(at - arm, y - arm);
      context.lineTo(at + arm, y + arm);
      context.moveTo(at + arm, y - arm);
      context.lineTo(at - arm, y + arm);
      context.stroke();
    });
  });
}

/** The present point: a ring on the line and a thin rule through it, between what happened and what is expected. */
export function present(plot, { x, now }, ink, font) {
  if (!now) return;
  clipped(plot, (context, { left, top, width, height }) => {
    const [at, y] = [plot.valToPos(x[now.index], "x", true), plot.valToPos(now.value, "y", true)];
    if (at < left || at > left + width) return;
    context.strokeStyle = ink("quiet");
    context.lineWidth = devicePixelRatio;
    context.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    context.beginPath();
    context.moveTo(at, top);
    context.lineTo(at, top + height);
    context.stroke();
    context.setLineDash([]);
    context.font = `${12 * devicePixelRatio}px ${font}`;
    context.fillStyle = ink("quiet");
    const room = 5 * devicePixelRatio;
    context.textAlign = at > left + width - 40 * devicePixelRatio ? "right" : "left";
    context.textBaseline = "bottom";
    context.fillText("now", context.textAlign === "right" ? at - room : at + room, top + height - room);
    context.beginPath();
    context.arc(at, y, 4.5 * devicePixelRatio, 0, 2 * Math.PI);
    context.fillStyle = ink("card");
    context.fill();
    context.strokeStyle = ink("batch");
    context.lineWidth = 2 * devicePixelRatio;
    context.stroke();
  });
}

/** [first, last] of each run of rows for which `holds`. */
function* stretches(rows, holds) {
  for (let first = 0; first < rows.length; first += 1) {
    if (!holds(rows[first])) continue;
    let last = first;
    while (last + 1 < rows.length && holds(rows[last + 1])) last += 1;
    yield [first, last];
    first = last;
  }
}

function clipped(plot, draw) {
  const { left, top, width, height } = plot.bbox;
  plot.ctx.save();
  plot.ctx.beginPath();
  plot.ctx.rect(left, top, width, height);
  plot.ctx.clip();
  draw(plot.ctx, plot.bbox);
  plot.ctx.restore();
}

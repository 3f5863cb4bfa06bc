// Numbers as people read them. The wire spells NaN and infinity as strings; `number` reads them back.

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const SUFFIXES = [
  [1e15, "P"],
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

/** A wire float: null stays null; "NaN", "Infinity" and "-Infinity" become what they say. */
export function number(value) {
  return value === null || value === undefined ? null : Number(value);
}

/** A wire float that can be plotted, else null. */
export function finite(value) {
  const read = number(value);
  return read !== null && Number.isFinite(read) ? read : null;
}

/** 512, 16,384. */
export function whole(value) {
  const read = finite(value);
  return read === null ? "–" : grouped.format(read);
}

/** 1.23k, 4.5M: three significant digits. */
export function compact(value) {
  const read = number(value);
  if (read === null) return "–";
  if (!Number.isFinite(read)) return String(read);
  const size = Math.abs(read);
  for (const [unit, suffix] of SUFFIXES) {
    if (size >= unit * 0.9995) return trim((read / unit).toPrecision(3)) + suffix;
  }
  if (size !== 0 && size < 1e-3) return read.toExponential(1);
  return trim(read.toPrecision(3));
}

function trim(digits) {
  return digits.includes(".") && !digits.includes("e") ? digits.replace(/\.?0+$/, "") : digits;
}

/** A tick on an axis of powers of two: 2,048, not 2.05k. */
export function power(value) {
  return value >= 1 && value < 1e6 ? whole(value) : compact(value);
}

/** A loss: four decimals, or the word for what it became. */
export function loss(value) {
  const read = number(value);
  if (read === null) return "–";
  if (!Number.isFinite(read)) return String(read);
  return Math.abs(read) >= 1000 ? compact(read) : read.toFixed(3);
}

/** A factor such as 1.414. */
export function factor(value) {
  const read = finite(value);
  return read === null ? "–" : "× " + trim(read.toPrecision(4));
}

/** A share of its ceiling: 0.23. */
export function ratio(value) {
  const read = finite(value);
  return read === null ? "–" : read >= 100 ? compact(read) : read.toFixed(2);
}

export function percent(part, all) {
  return all > 0 ? ((100 * part) / all).toFixed(part / all < 0.1 ? 1 : 0) + " %" : "–";
}

/** Seconds as people say them. */
export function seconds(value) {
  const read = finite(value);
  if (read === null) return "–";
  if (read < 1) return Math.round(read * 1000) + " ms";
  if (read < 100) return trim(read.toPrecision(3)) + " s";
  if (read < 7200) return Math.round(read / 60) + " min";
  if (read < 172800) return Math.round(read / 3600) + " h";
  return Math.round(read / 86400) + " d";
}

/** "12 s ago". */
export function age(isoTime, now = Date.now()) {
  if (!isoTime) return "never";
  const elapsed = Math.max(0, (now - Date.parse(isoTime)) / 1000);
  return elapsed < 1.5 ? "just now" : (elapsed < 100 ? Math.round(elapsed) + " s" : seconds(elapsed)) + " ago";
}

/** An interval that may have no upper end: "310 to 560", "310 or more", or nothing. */
export function interval(low, high) {
  const [least, most] = [finite(low), finite(high)];
  if (least === null) return "";
  return most === null ? `${compact(least)} or more` : `${compact(least)} to ${compact(most)}`;
}

/** A number with its standard error, where it has one: 0.52 ± 0.11. */
export function uncertain(value, error) {
  const read = finite(error);
  return read === null ? compact(value) : `${compact(value)} ± ${trim(read.toPrecision(2))}`;
}

/** The noise scale with its honesty: a resolved number, or "at least about" the present batch. */
export function noiseScale(decision) {
  if (!decision) return "–";
  const value = finite(decision.noise_scale);
  if (!decision.unresolved) return compact(value);
  if (finite(decision.noise_sq) === null) return "–";
  return "unresolved";
}

/** A moment of the past in the reader's own time: 10:41:07 today, else with its date. */
export function moment(isoTime, now = new Date()) {
  const at = new Date(isoTime);
  const clock = at.toLocaleTimeString("en-GB");
  if (at.toDateString() === now.toDateString()) return clock;
  const year = at.getFullYear() === now.getFullYear() ? undefined : "numeric";
  return `${at.toLocaleDateString("en-GB", { day: "numeric", month: "short", year })}, ${clock}`;
}

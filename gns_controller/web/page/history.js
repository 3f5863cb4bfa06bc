// What the charts are drawn from: one bounded, ordered list of points of a run.
//
// A point is one measurement and the decision about it. A rewind to an older checkpoint begins a new attempt at fewer
// samples: the points it will replace are dropped, so the charts follow one line of history. Reports of an attempt
// that was fenced off are ignored.

import { finite, number } from "./format.js";

const MOST_POINTS = 3000;

export class History {
  constructor(specification) {
    this.specification = specification;
    this.points = [];
    this.attempt = 0;
    this.factors = new Map([[0, 1]]);
    this.version = 0;
  }

  /** Plans that were made without a measurement: overrides. */
  learnPlans(plans) {
    for (const plan of plans) this.factors.set(plan.version, plan.learning_rate_factor);
  }

  add({ sequence, measurement, decision }) {
    if (measurement.attempt < this.attempt) return;
    if (measurement.attempt > this.attempt) {
      this.attempt = measurement.attempt;
      while (this.points.length && this.points.at(-1).samples >= measurement.samples_seen) this.points.pop();
    }
    if (decision) this.factors.set(decision.plan.version, decision.plan.learning_rate_factor);
    if (this.factors.size > MOST_POINTS) this.factors.delete(this.factors.keys().next().value);
    const point = this.pointOf(sequence, measurement, decision);
    let place = this.points.length;
    while (place > 0 && this.points[place - 1].samples > point.samples) place -= 1;
    const same = place > 0 && this.points[place - 1].samples === point.samples;
    this.points.splice(same ? place - 1 : place, same ? 1 : 0, point);
    if (this.points.length > MOST_POINTS) this.points = thinned(this.points);
    this.version += 1;
  }

  pointOf(sequence, measurement, decision) {
    const before = this.points.at(-1);
    return {
      sequence,
      samples: measurement.samples_seen,
      step: measurement.optimizer_step,
      batch: measurement.global_batch_size,
      factor: this.factors.get(measurement.plan_version) ?? before?.factor ?? 1,
      requested: decision ? finite(decision.requested_batch_size) : null,
      noise: decision ? positive(decision.noise_scale) : null,
      low: decision ? finite(decision.noise_scale_low) : null,
      high: decision ? finite(decision.noise_scale_high) : null,
      ceiling: decision ? positive(decision.ceiling_samples) : null,
      unresolved: decision ? decision.unresolved && finite(decision.noise_sq) !== null : false,
      loss: number(measurement.loss),
      validation: number(measurement.validation_loss),
    };
  }
}

function positive(value) {
  const read = finite(value);
  return read !== null && read > 0 ? read : null;
}

/** Half of the points: every change, gap and validation loss stays as long as there is room for it. */
export function thinned(points) {
  const tells = (index) => {
    const [before, point, after] = [points[index - 1], points[index], points[index + 1]];
    return (
      !before ||
      !after ||
      before.batch !== point.batch ||
      after.batch !== point.batch ||
      before.factor !== point.factor ||
      after.factor !== point.factor ||
      before.unresolved !== point.unresolved ||
      point.validation !== null ||
      (point.loss !== null && !Number.isFinite(point.loss))
    );
  };
  const kept = points.filter((_, index) => index % 2 === 0 || tells(index));
  return kept.length <= MOST_POINTS * 0.75 ? kept : points.filter((_, index) => index % 2 === 0);
}

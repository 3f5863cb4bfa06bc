// The ramp ahead and the ramp that another policy would have made: plain numbers for the batch chart, nothing drawn.

/**
 * The stages ahead as stairs that reach back: each corner carries the batch in force up to it.
 *
 * The first corner is the present point, the last one the end of the budget. Over optimizer steps a corner stands where
 * the expected ramp reaches its samples; so does the interval there, whose own ramps take more or fewer steps.
 *
 * @returns [{samples, step, expected, least, most}], empty without anything ahead.
 */
export function cornersAhead(projection, last, budget) {
  const stages = projection?.stages ?? [];
  if (!last || stages.length === 0) return [];
  let present = { samples: Math.max(last.samples, stages[0].samples_seen), step: last.step };
  if (present.samples >= budget) return [];
  const passed = stages.findLastIndex((stage) => stage.samples_seen <= present.samples);
  const corners = [{ ...present, ...pathsOf(stages[passed]) }];
  for (let index = passed; index < stages.length; index += 1) {
    const stage = stages[index];
    const samples = Math.min(stages[index + 1]?.samples_seen ?? budget, budget);
    const step = present.step + (samples - present.samples) / stage.global_batch_size;
    present = { samples, step };
    corners.push({ ...present, ...pathsOf(stage) });
  }
  return corners;
}

function pathsOf(stage) {
  return { expected: stage.global_batch_size, least: stage.low, most: stage.high };
}

/** For each point, the batch that the replayed decisions had in force up to it; `first` before the first of them. */
export function batchesReplayed(rows, points, first) {
  let next = 0;
  let batch = first;
  return points.map((point) => {
    while (next < rows.length && rows[next].samples_seen < point.samples) {
      batch = rows[next].replayed_batch_size;
      next += 1;
    }
    return batch;
  });
}

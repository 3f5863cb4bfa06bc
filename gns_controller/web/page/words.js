// What decides about a run, in words: the policy, or the operator above it.

import * as format from "./format.js";
import { differences, isObject } from "./jsontext.js";

/** "An operator pins 64 samples: because", or which policy decides. `batch` is the one in force. */
export function inCharge({ policy, policy_revision: revision, override }, batch) {
  if (override) return `${overrideText(override, batch)}.`;
  return `The policy ${policy.policy} decides, revision ${revision}.`;
}

/** An override as a clause, with its note. */
export function overrideText(override, batch = null) {
  const note = override.note ? `: ${override.note}` : "";
  if (override.kind === "pin") return `An operator pins ${format.whole(override.global_batch_size)} samples${note}`;
  return `An operator holds the batch${batch === null ? "" : ` of ${format.whole(batch)} samples`}${note}`;
}

/** What an operator did, as a sentence for the history. */
export function controlText({ action, policy, override, note }) {
  if (action === "override" && override) return `${overrideText(override)}.`;
  const because = note ? `: ${note}` : "";
  if (action === "release") return `An operator releases the batch to the policy ${policy.policy}${because}.`;
  return `An operator changes the policy to ${policy.policy}${because}.`;
}

/** Differences between two revisions, one line for each thing. */
export function whatChanged(before, after) {
  const lines = differences(before.policy, after.policy).map(
    (name) => `${name}: ${valueText(before.policy[name])} → ${valueText(after.policy[name])}`,
  );
  const [was, is] = [before.override, after.override].map((override) => (override ? overrideText(override) : "no override"));
  if (was !== is) lines.push(`${was} → ${is}`);
  return lines;
}

/** A field of a policy as people read it. */
export function valueText(value) {
  if (value === null || value === undefined) return "not set";
  if (Array.isArray(value)) return value.length ? value.map(valueText).join(", ") : "none";
  if (isObject(value)) {
    const told = Object.entries(value).filter(([, part]) => part !== null);
    if (told.length === 1 && (told[0][0] === "steps" || told[0][0] === "samples" || told[0][0] === "tokens")) {
      return `${format.whole(told[0][1])} ${told[0][0]}`;
    }
    return told.map(([name, part]) => `${name} ${valueText(part)}`).join(", ") || "not set";
  }
  return typeof value === "number" && Number.isInteger(value) && value >= 10_000 ? format.whole(value) : String(value);
}

/** A policy with its own fields first: on the wire they come from `policy` on, after what all policies share. */
export function ownFirst(policy) {
  const fields = Object.entries(policy);
  const own = fields.findIndex(([name]) => name === "policy");
  return Object.fromEntries([...fields.slice(own), ...fields.slice(0, own)]);
}

// Who decides, and the means to overrule: pin a batch, hold the present one, release, change the policy.
//
// Every command names the revision that the operator saw; if another command came first, nothing changes.

import { ApiError, anotherToken, getTagged, send } from "./api.js";
import { confirmed } from "./dialogs.js";
import { h, setText } from "./dom.js";
import * as format from "./format.js";
import { batchInForce } from "./list.js";
import { PolicyEditor } from "./policy.js";
import { inCharge, ownFirst, valueText, whatChanged } from "./words.js";

const LONGEST_NOTE = 500;
const FINISHED = "This run is finished: it holds for its next attempt.";

export class Control {
  constructor({ view, path, charts }) {
    this.path = path;
    this.view = view;
    this.known = null;
    this.blocked = null;
    this.busy = false;
    this.who = h("p", { class: "in-charge", role: "status", "aria-live": "polite" });
    this.pending = h("p", { class: "quiet", hidden: true });
    this.said = h("p", { class: "said", role: "status", "aria-live": "polite", hidden: true });
    this.why = h("p", { class: "quiet", id: "control-why", hidden: true });
    this.token = h("button", { type: "button", class: "plain", hidden: true }, "Use another token");
    this.token.addEventListener("click", () => this.useAnotherToken());
    this.batch = field("control-batch", "Batch, samples", {
      type: "number",
      min: "1",
      step: "1",
      inputmode: "numeric",
      autocomplete: "off",
    });
    this.note = field("control-note", "Note for whoever looks next", {
      type: "text",
      maxlength: LONGEST_NOTE,
      autocomplete: "off",
      placeholder: "why",
    });
    this.pin = h("button", { type: "submit", class: "plain" }, "Pin this batch");
    this.hold = h("button", { type: "button", class: "plain" }, "Hold the present batch");
    this.release = h("button", { type: "button", class: "plain", hidden: true }, "Release");
    this.edit = h("button", { type: "button", class: "plain edit-policy" }, "Edit the policy");
    this.fields = h(
      "fieldset",
      { "aria-describedby": "control-why control-when" },
      h("legend", { class: "hidden" }, "Overrule the policy"),
      ...this.batch.elements,
      ...this.note.elements,
      h("div", { class: "actions" }, this.pin, this.hold, this.release),
    );
    this.form = h("form", { class: "overrule", novalidate: true }, this.fields);
    this.form.addEventListener("submit", (submitted) => {
      submitted.preventDefault();
      this.askToPin();
    });
    this.hold.addEventListener("click", () => this.askToHold());
    this.release.addEventListener("click", () => this.askToRelease());
    this.document = h("dl", { class: "document" });
    this.revision = h("span", { class: "unit" });
    this.editor = new PolicyEditor({
      path,
      charts,
      onBlocked: (error) => this.block(error),
      onApplied: (known) => this.applied(known),
      reload: () => this.load(),
    });
    this.edit.addEventListener("click", () => this.known && this.editor.open(this.known, this.view, this.edit));
    this.when = h(
      "p",
      { class: "quiet", id: "control-when" },
      "Takes effect at the next measurement, not before. Should the ranks change, a pin is rounded down to a batch they can make.",
    );
    this.element = h(
      "section",
      { class: "card control", "aria-labelledby": "title-control" },
      h("div", { class: "chart-head" }, h("h2", { id: "title-control" }, "Who decides"), this.revision, this.edit),
      this.who,
      this.pending,
      this.form,
      this.when,
      h("div", { class: "blocked" }, this.why, this.token),
      this.said,
      h("details", { class: "policy-document" }, h("summary", {}, "The policy in force, field by field"), this.document),
    );
    this.update(view);
  }

  /** Learn who decides now, with the version to name in the next change. */
  async load() {
    const asked = (this.asked = (this.asked ?? 0) + 1);
    const { etag, value } = await getTagged(`${this.path}/policy`);
    if (asked !== this.asked && value.policy_revision <= this.known?.policy_revision) return this.known; // overtaken
    this.known = { ...value, etag };
    this.draw();
    return this.known;
  }

  /** The run as the controller tells it. */
  update(view) {
    if (view.policy_revision !== this.known?.policy_revision) this.load().catch(() => {});
    this.follow(view);
  }

  /** The run as its newest measurement tells it. */
  follow(view) {
    this.view = view;
    this.draw();
  }

  draw() {
    const { view, known } = this;
    const shown = known ?? view;
    const finished = view.state === "finished";
    setText(this.who, inCharge(shown, batchInForce(view)));
    this.who.dataset.by = shown.override ? "person" : "policy";
    setText(this.revision, revisionText(shown));
    const pending = pendingText(shown, view);
    setText(this.pending, pending);
    this.pending.hidden = pending === "" || finished;
    this.batch.input.placeholder = String(batchInForce(view));
    this.release.hidden = !shown.override;
    setText(this.hold, `Hold ${format.whole(batchInForce(view))}`);
    const why = finished ? "The budget is used up: nothing more will be decided, unless another attempt begins." : this.blocked;
    setText(this.why, why ?? "");
    this.why.hidden = !why;
    this.token.hidden = finished || !this.blocked;
    this.form.hidden = this.when.hidden = finished;
    setText(this.edit, finished ? "Try another policy" : "Edit the policy");
    this.fields.disabled = Boolean(why) || !known || this.busy;
    this.edit.disabled = !known || this.busy;
    this.editor.allowed(why);
    const key = JSON.stringify(shown.policy);
    if (this.drawn === key) return;
    this.drawn = key;
    this.document.replaceChildren(
      ...Object.entries(ownFirst(shown.policy)).map(([name, value]) =>
        h("div", { class: value === null ? "unset" : null }, h("dt", {}, name), h("dd", {}, valueText(value))),
      ),
    );
  }

  askToPin() {
    const text = this.batch.input.value.trim();
    this.batch.fault(text === "" ? "Say how many samples, in digits." : "");
    if (text === "") {
      this.batch.input.focus();
      return null;
    }
    const size = Number(text);
    const body = { kind: "pin", global_batch_size: size, note: this.note.input.value.trim() };
    return this.say("POST", body, {
      title: `Pin ${format.whole(size)} samples?`,
      yes: `Pin ${format.whole(size)}`,
      lines: [
        this.now(),
        `From the next measurement on the batch is ${format.whole(size)} samples, whatever the policy asks for, until ` +
          `somebody releases it. ${couplingText(this.view)}`,
        leftText(this.view, size),
      ],
      done: `Pinned ${format.whole(size)} samples.`,
    });
  }

  askToHold() {
    const batch = format.whole(batchInForce(this.view));
    return this.say("POST", { kind: "hold", note: this.note.input.value.trim() }, {
      title: `Hold the batch of ${batch} samples?`,
      yes: "Hold it",
      lines: [
        this.now(),
        "From the next measurement on the batch that is then in force stays, whatever the policy asks for, until " +
          "somebody releases it.",
      ],
      done: "The batch is held.",
    });
  }

  askToRelease() {
    return this.say("DELETE", { note: this.note.input.value.trim() }, {
      title: "Release the batch?",
      yes: "Release it",
      lines: [this.now(), `From the next measurement on the policy ${this.known.policy.policy} decides again.`],
      done: `Released: the policy ${this.known.policy.policy} decides.`,
    });
  }

  now() {
    return `Now: ${format.whole(batchInForce(this.view))} samples. ${inCharge(this.known, batchInForce(this.view))}`;
  }

  /** Confirm, send, and tell what came of it. The version is the one known when the question was asked. */
  async say(method, body, { title, lines, yes, done }) {
    const seen = this.known;
    for (const one of [this.batch, this.note]) one.fault("");
    this.tell("");
    const note = body.note ? [h("p", {}, "Note: ", h("q", {}, body.note))] : [];
    const where = [`Run ${this.view.run_id}.`];
    if (!(await confirmed({ title, lines: [...where, ...lines, ...note], yes }))) return;
    this.busy = true;
    this.draw();
    try {
      const noted = body.note ? `?note=${encodeURIComponent(body.note)}` : "";
      const path = method === "DELETE" ? `${this.path}/override${noted}` : `${this.path}/override`;
      const answer = await send(method, path, { ...(method !== "DELETE" && { body }), etag: seen.etag });
      this.form.reset();
      this.tell(`${done} ${answer.state === "finished" ? FINISHED : "It takes effect at the next measurement."}`);
      await this.load().catch(() => {});
    } catch (error) {
      await this.refused(error, seen);
    } finally {
      this.busy = false;
      this.draw();
    }
  }

  async refused(error, seen) {
    if (!(error instanceof ApiError)) {
      this.tell("No answer came, so it is not known whether this was done. See who decides before you try again.", true);
      await this.load().catch(() => {});
    } else if (error.status === 403) {
      this.block(error);
    } else if (error.status === 412) {
      const now = await this.load().catch(() => seen);
      this.tell(fasterText(seen, now), true);
    } else if (error.status === 422) {
      this.atFields(error);
    } else {
      this.tell(error.message, true);
      await this.load().catch(() => {});
    }
  }

  /** Each fault at its field. A fault of the whole body is about the batch: nothing else can be wrong together. */
  atFields(error) {
    const places = { "/note": this.note, "/global_batch_size": this.batch, "": this.batch };
    const rest = error.errors.filter(({ pointer }) => !(pointer in places));
    for (const { pointer, detail } of error.errors) places[pointer]?.fault(detail);
    if (error.errors.length === 0 || rest.length > 0) this.tell(rest.map(({ detail }) => detail).join(" ") || error.message, true);
    const first = [this.batch, this.note].find((one) => one.isFaulty());
    setTimeout(() => first?.input.focus());
  }

  block(error) {
    this.blocked = `This token may look and not steer. ${error.message}`;
    this.draw();
  }

  async useAnotherToken() {
    await anotherToken();
    this.blocked = null;
    this.draw();
    await this.load().catch(() => {});
  }

  applied(known) {
    const said = `Revision ${known.policy_revision} is in force from the next measurement on.`;
    this.tell(known.state === "finished" ? `${said} ${FINISHED}` : said);
  }

  tell(text, alarming = false) {
    setText(this.said, text);
    this.said.hidden = text === "";
    this.said.dataset.tone = alarming ? "alarm" : "done";
  }
}

/** What the person reads when somebody else was faster. */
export function fasterText(seen, now) {
  const changes = whatChanged(seen, now).join("; ");
  return (
    "Somebody else was faster, so nothing was changed. You saw revision " +
    `${seen.policy_revision}; now it is revision ${now.policy_revision}${changes ? ` (${changes})` : ""}. ` +
    "Look at it, then try again."
  );
}

function revisionText({ policy, policy_revision: revision, override, changed_at: at }) {
  const what = override ? `revision ${revision}, above the policy ${policy.policy}` : "";
  const when = at ? `since ${format.moment(at)}` : "";
  return [what, when].filter(Boolean).join(", ");
}

/** Whether the last decision knows of it yet. */
function pendingText({ policy_revision: revision }, view) {
  const decided = view.last_decision?.policy_revision ?? 0;
  if (revision <= decided) return "";
  return "Said, and not in force yet: the next measurement decides by it.";
}

function couplingText({ specification }) {
  if (specification.mode === "shadow") return "The run is in shadow mode: its trainer follows no plan.";
  const coupling = specification.batch.learning_rate_coupling;
  return coupling === "none" ? "The learning rate stays." : `The learning rate follows by the ${coupling} coupling.`;
}

/** What a batch makes of the rest of the budget. */
function leftText({ specification: { budget_samples: budget }, samples_seen: seen }, size) {
  const left = Math.max(budget - seen, 0);
  const steps = Math.ceil(left / size);
  const count = steps === 1 ? "one step" : `${format.whole(steps)} steps`;
  return `Of ${format.whole(budget)} samples ${format.whole(left)} are left: ${count} of this batch.`;
}

/** A labelled input and the line below it that says what is wrong with it. */
function field(id, label, attributes) {
  const fault = h("p", { class: "fault", id: `${id}-fault`, role: "alert" });
  const input = h("input", { id, "aria-describedby": `${id}-fault`, ...attributes });
  input.addEventListener("input", () => set(""));
  const set = (text) => {
    setText(fault, text);
    if (text) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  };
  return {
    input,
    elements: [h("div", { class: `field ${id}` }, h("label", { for: id }, label), input), fault],
    fault: set,
    isFaulty: () => input.hasAttribute("aria-invalid"),
  };
}

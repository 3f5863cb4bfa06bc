// Talking to the controller: JSON by fetch, events by a stream that reconnects, and the token that all may need.

import { h, showConnection } from "./dom.js";

const BASE = "/api/v1";
const TOKEN = "gns-controller-token";
const FIRST_RETRY_MILLISECONDS = 500;
const LAST_RETRY_MILLISECONDS = 15_000;
const HIDDEN_MILLISECONDS = 10_000;
const SILENCE_MILLISECONDS = 60_000; // the server comments at least this often; a dead socket says nothing

/** A refusal, with the problem+json title and detail where the server sent one. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem?.detail || problem?.title || `The controller answered ${status}.`);
    this.status = status;
    this.errors = problem?.errors ?? [];
  }
}

function headers(extra) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...extra, Authorization: `Bearer ${token}` } : extra;
}

async function problemOf(response) {
  try {
    return await response.json();
  } catch {
    return null;
  }
}

/** GET one resource. */
export async function get(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  const response = await request(path + (query ? `?${query}` : ""), {});
  return response.json();
}

/** GET one resource with its version, for a later `send`. */
export async function getTagged(path) {
  const response = await request(path, {});
  return { etag: response.headers.get("ETag"), value: await response.json() };
}

/** Change something: `etag` is the version that the person saw. Returns the answer, or null where there is none. */
export async function send(method, path, { body, etag } = {}) {
  const response = await request(path, {
    method,
    headers: { ...(body !== undefined && { "Content-Type": "application/json" }), ...(etag && { "If-Match": etag }) },
    ...(body !== undefined && { body: JSON.stringify(body) }),
  });
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** One exchange. A 401 asks the person for a token and tries again with it; other refusals are thrown. */
async function request(path, options) {
  for (;;) {
    const response = await fetch(BASE + path, {
      ...options,
      headers: headers({ Accept: "application/json", ...options.headers }),
      cache: "no-store",
    });
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401) throw new ApiError(response.status, problem);
    await askForToken(problem);
  }
}

/** Let the person type a token that may do more. Resolves once there is one, or once they think better of it. */
export function anotherToken() {
  return askForToken(null, { why: "The token in use may look and not steer. ", optional: true });
}

/**
 * Follow a run's events from `after` on, for as long as the page lives.
 *
 * Not while nobody sees it: browsers open six connections to a host, and a page that was left, or waits in another tab,
 * must not keep one. What was missed is caught up with on return.
 *
 * fetch instead of EventSource, because EventSource cannot send an Authorization header.
 */
export async function follow(path, { after, onEvent, onState, signal }) {
  let last = after;
  let wait = FIRST_RETRY_MILLISECONDS;
  while (!signal.aborted) {
    await shown();
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    let [silence, hidden] = [null, null];
    const look = () => {
      clearTimeout(hidden);
      if (document.hidden) hidden = setTimeout(stop, HIDDEN_MILLISECONDS);
    };
    signal.addEventListener("abort", stop);
    window.addEventListener("pagehide", stop);
    document.addEventListener("visibilitychange", look);
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(stop, SILENCE_MILLISECONDS);
    };
    try {
      heard();
      const response = await fetch(`${BASE}${path}?after=${encodeURIComponent(last)}`, {
        headers: headers({ Accept: "text/event-stream", "Last-Event-ID": String(last) }),
        cache: "no-store",
        signal: attempt.signal,
      });
      if (response.status === 401) {
        await askForToken(await problemOf(response));
        continue;
      }
      if (!response.ok) throw new ApiError(response.status, await problemOf(response));
      onState("live");
      for await (const event of eventsOf(response.body, heard)) {
        wait = FIRST_RETRY_MILLISECONDS;
        if (event.id) last = event.id;
        onEvent(event);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof SyntaxError) console.warn("event left out:", error.message);
    } finally {
      clearTimeout(silence);
      clearTimeout(hidden);
      signal.removeEventListener("abort", stop);
      window.removeEventListener("pagehide", stop);
      document.removeEventListener("visibilitychange", look);
    }
    onState("reconnecting");
    await new Promise((resolve) => setTimeout(resolve, wait * (0.75 + Math.random() / 2)));
    wait = Math.min(wait * 2, LAST_RETRY_MILLISECONDS);
  }
}

/** Until somebody looks at the page. */
async function shown() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

/** Server-sent events out of a byte stream: {id, type, data}. */
async function* eventsOf(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let event = { id: "", type: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      buffer += value;
      const lines = buffer.split(/\r\n|\n|\r(?!$)/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data.length) yield { ...event, data: event.data.join("\n") };
          event = { id: "", type: "message", data: [] };
          continue;
        }
        const colon = line.indexOf(":");
        if (colon === 0) continue;
        const field = colon < 0 ? line : line.slice(0, colon);
        const content = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
        if (field === "id") event.id = content;
        else if (field === "event") event.type = content;
        else if (field === "data") event.data.push(content);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let asking = null;

/** One form for however many requests were refused; resolves once a token was typed. */
function askForToken(problem, { why = null, optional = false } = {}) {
  if (asking) return asking;
  const refused = sessionStorage.getItem(TOKEN) !== null;
  if (!optional) showConnection("refused", "needs a token");
  asking = new Promise((resolve) => {
    const input = h("input", {
      id: "token",
      name: "token",
      type: "password",
      autocomplete: "off",
      spellcheck: "false",
      required: true,
    });
    const form = h(
      "form",
      { class: "token-form" },
      h("h1", {}, "This controller asks for a token"),
      h(
        "p",
        {},
        why ?? (refused ? "That token was not accepted. " : ""),
        "Paste one of its tokens. It is kept in this tab only, until you close it.",
      ),
      h("label", { for: "token" }, "Token"),
      input,
      h("button", { type: "submit" }, optional ? "Use this token" : "Show runs"),
      optional ? h("button", { type: "button", class: "second", onclick: () => close() }, "Keep the present one") : null,
      h("p", { class: "quiet" }, "New token: ", h("code", {}, "gns-controller token create")),
    );
    const veil = h("div", { class: "veil", role: "dialog", "aria-modal": "true", "aria-label": "Token" }, form);
    const close = () => {
      veil.remove();
      asking = null;
      resolve();
    };
    form.addEventListener("submit", (submitted) => {
      submitted.preventDefault();
      const token = input.value.trim();
      if (!token) return;
      sessionStorage.setItem(TOKEN, token);
      if (!optional) showConnection("connecting");
      close();
    });
    if (problem?.detail) form.querySelector("p").title = problem.detail;
    document.body.append(veil);
    input.focus();
  });
  return asking;
}

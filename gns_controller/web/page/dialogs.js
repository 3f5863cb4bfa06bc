// Asking before something is sent.

import { h } from "./dom.js";

/** Ask, and wait for the answer: true only for the button that says `yes`. Escape and Cancel mean no. */
export function confirmed({ title, lines, yes }) {
  return new Promise((resolve) => {
    const opener = document.activeElement;
    const cancel = h("button", { type: "button", class: "plain", autofocus: true }, "Cancel");
    const go = h("button", { type: "button", class: "strong" }, yes);
    const dialog = h(
      "dialog",
      { class: "ask", "aria-labelledby": "ask-title", "aria-describedby": "ask-text" },
      h("h2", { id: "ask-title" }, title),
      h("div", { id: "ask-text" }, ...lines.map((line) => (line instanceof Node ? line : h("p", {}, line)))),
      h("div", { class: "actions" }, cancel, go),
    );
    const close = (answer) => {
      dialog.remove();
      opener?.focus();
      resolve(answer);
    };
    cancel.addEventListener("click", () => close(false));
    go.addEventListener("click", () => close(true));
    dialog.addEventListener("cancel", (cancelled) => {
      cancelled.preventDefault();
      close(false);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

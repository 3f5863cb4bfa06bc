// Building elements. Everything that comes from the server enters the page through textContent here, never as markup.

/** An element: attributes by name, `class`, `dataset`, `onevent` handlers; children are nodes or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "dataset") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

/** Write text only where it changed, so that screen readers and selections are left alone. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** The word in the top bar that says whether what you see is current. */
export function showConnection(state, text = state) {
  const element = document.getElementById("connection");
  if (element.dataset.state !== state) element.dataset.state = state;
  setText(element, text);
}

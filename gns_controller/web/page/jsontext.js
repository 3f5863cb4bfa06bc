// Documents as people edit them: where a JSON pointer stands in the text, and which fields an edit changes.

/** Names of the fields of which two documents say different things, in the order of the first, then of the second. */
export function differences(before, after) {
  const names = new Set([...Object.keys(before), ...Object.keys(after)]);
  return [...names].filter((name) => !same(before[name], after[name]));
}

export function isObject(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

function same(one, other) {
  if (Array.isArray(one) && Array.isArray(other)) {
    return one.length === other.length && one.every((value, index) => same(value, other[index]));
  }
  if (isObject(one) && isObject(other)) return differences(one, other).length === 0;
  return one === other;
}

/** Where the member of a JSON pointer begins in valid JSON text, or the nearest value around it. */
export function offsetOf(text, pointer) {
  const wanted = pointer.split("/").slice(1).map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~"));
  let at = 0;
  let found = { depth: -1, offset: 0 };

  const space = () => {
    while (/\s/.test(text[at] ?? "")) at += 1;
  };
  const string = () => {
    const start = at;
    for (at += 1; text[at] !== '"'; at += 1) if (text[at] === "\\") at += 1;
    at += 1;
    return JSON.parse(text.slice(start, at));
  };
  const value = (depth, offset) => {
    if (depth > found.depth) found = { depth, offset };
    if (text[at] === "{" || text[at] === "[") {
      const list = text[at] === "[";
      const inside = (name) => depth >= 0 && depth < wanted.length && wanted[depth] === name;
      at += 1;
      space();
      for (let index = 0; text[at] !== "}" && text[at] !== "]"; index += 1) {
        const start = at;
        let name = String(index);
        if (!list) {
          name = string();
          space();
          at += 1; // the colon
          space();
        }
        value(inside(name) ? depth + 1 : -2, start);
        space();
        if (text[at] === ",") at += 1;
        space();
      }
      at += 1;
    } else if (text[at] === '"') {
      string();
    } else {
      while (at < text.length && !/[\s,\]}]/.test(text[at])) at += 1;
    }
  };
  space();
  value(0, at);
  return found.offset;
}

// Building the page. What came from outside becomes text nodes only: nothing here writes markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.setAttribute("class", value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

/** Sets an element's text, and touches nothing where it says so already. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Makes the children of `parent` follow `items`: an item that stays keeps its element, and with it focus and hover.
 * `make(item)` returns an element with a method `follow(item)`. */
export function follow(parent, items, keyOf, make) {
  const known = new Map([...parent.children].map((child) => [child.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = known.get(key);
    if (child) known.delete(key);
    else Object.assign((child = make(item)), { key });
    child.follow(item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const child of known.values()) child.remove();
}

// ---- numbers as text -------------------------------------------------------------------------------------------------

const BYTES = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(value) {
  let at = 0;
  for (; value >= 1024 && at < BYTES.length - 1; at++) value /= 1024;
  return `${value < 10 && at ? value.toFixed(1) : Math.round(value)} ${BYTES[at]}`;
}

export function count(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return Number.isInteger(value) ? String(value) : value.toFixed(value < 10 ? 1 : 0);
}

export function fixed(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

export const milliseconds = (value) => (value < 1 ? `${value.toFixed(2)} ms` : value < 1000 ? `${value.toFixed(1)} ms` : `${(value / 1000).toFixed(2)} s`);
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });

/** The time of day, and of another day its date too. */
export function moment(seconds) {
  const day = (date) => date.toLocaleDateString([], { month: "short", day: "numeric" });
  const then = new Date(seconds * 1000);
  return day(then) === day(new Date()) ? clock(seconds) : `${day(then)}, ${clock(seconds)}`;
}

/** MLX's word for a device is `Device(gpu, 0)`. */
export const device = (name) => name.replace(/^Device\((\w+), \d+\)$/, "$1");

// ---- versions ----------------------------------------------------------------------------------------------------------

/** A version's hue: the golden angle keeps neighbours apart, and names begin at places of their own. */
export function hue(name, number) {
  let start = 0;
  for (const letter of name) start = (start * 31 + letter.codePointAt(0)) % 360;
  return Math.round((start + number * 137.508) % 360);
}

export const address = (name, number) => (name === "base" ? "base" : `${name}@${number}`);
export const coloured = (name, number) => (name === "base" ? { "--hue": 0, "--chroma": 0 } : { "--hue": hue(name, number) });
export const swatch = (name, number) => h("span", { class: "swatch", "aria-hidden": "true", ...coloured(name, number) });

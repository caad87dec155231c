// Tokens of a text, shaded by how much each surprised the model that sampled it.

import { address, coloured, fixed, h } from "./dom.js";

const MOST_NATS = 6;

/** Surprise as a share of the scale's end; null where the number is not known. */
const heat = (logprob) => (logprob === null ? 0 : Math.max(0, Math.min(1, -logprob / MOST_NATS)));

/** Spaces and breaks that would not be seen. */
function shown(text) {
  if (text === "") return "·";
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

/** An element with the tokens, and below it the values of the one that is pointed at, or reached with the arrow keys.
 * `tokens`: [{text, logprob, values: {name: text}, version: [name, number] | null, given}] */
export function tokenText(tokens, label) {
  const values = h("p", { class: "values", "aria-live": "polite" }, hint(tokens));
  const marks = [];
  let before = null;
  const elements = tokens.map((token, at) => {
    const version = token.version && address(...token.version);
    if (version && before && version !== before) marks[at] = mark(token.version);
    before = version ?? before;
    return h("span", { class: token.given ? "token given" : "token", "data-at": at, "--heat": heat(token.logprob).toFixed(3), ...(token.version ? coloured(...token.version) : {}) }, shown(token.text));
  });
  const text = h("p", { class: "tokens", tabindex: 0, role: "group", "aria-label": label });
  elements.forEach((element, at) => text.append(...(marks[at] ? [marks[at], element] : [element])));
  let current = -1;
  const show = (at) => {
    elements[current]?.classList.remove("current");
    current = at;
    elements[at]?.classList.add("current");
    if (tokens[at]) values.replaceChildren(...described(tokens[at], at));
    else values.replaceChildren(hint(tokens));
  };
  text.addEventListener("pointerover", (event) => {
    const at = event.target.dataset?.at;
    if (at !== undefined) show(Number(at));
  });
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(Math.max(0, Math.min(tokens.length - 1, current + step)));
  });
  return h("div", { class: "text" }, text, values);
}

function hint(tokens) {
  return h("span", { class: "hint" }, tokens.length ? "Point at a token, or use the arrow keys, for its numbers." : "It has no token.");
}

function mark([name, number]) {
  return h("span", { class: "mark", title: "From here on another version samples.", ...coloured(name, number) }, address(name, number));
}

function described(token, at) {
  const version = token.version ? address(...token.version) : null;
  const probability = token.logprob === null ? null : `${(100 * Math.exp(token.logprob)).toPrecision(3)} %`;
  const pairs = { token: `${at}`, text: JSON.stringify(token.text), logprob: fixed(token.logprob), p: probability, ...token.values, version };
  return Object.entries(pairs)
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => h("span", { class: "pair" }, h("b", {}, name), " ", value));
}

/** Parts of one bar, as shares: [{name, value, class}]. */
export function bar(label, parts, format) {
  const total = parts.reduce((sum, part) => sum + part.value, 0);
  const element = h("div", { class: "bar", role: "img" });
  const words = parts.filter((part) => part.value > 0).map((part) => `${part.name} ${format(part.value)}`);
  element.setAttribute("aria-label", `${label}: ${words.join(", ")}.`);
  element.title = words.join(" · ");
  for (const part of parts) {
    if (part.value > 0) element.append(h("span", { class: `part ${part.class}`, "--share": `${((100 * part.value) / total).toFixed(2)}%` }));
  }
  return element;
}

/** Values as bands of one element's ground: a list of rollouts has too many of them for an element each. */
export function strip(values) {
  const at = (place) => `${((100 * place) / values.length).toFixed(2)}%`;
  const bands = values.map((value, place) => `color-mix(in oklab, var(--fire) ${Math.round(100 * heat(value))}%, transparent) ${at(place)} ${at(place + 1)}`);
  const element = h("span", { class: "strip", "aria-hidden": "true" });
  if (bands.length) element.style.backgroundImage = `linear-gradient(to right, ${bands.join(", ")})`;
  return element;
}

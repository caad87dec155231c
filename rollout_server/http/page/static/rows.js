// The rows that run, a cell each: its colour is the version that samples its next token, its height how far it is.

import { address, byId, coloured, follow, h, say, swatch } from "./dom.js";
import { walk } from "./keys.js";

/** The place of the cell that is told of, if one is. */
let told = null;

/** Shows the rows; null where the engine has not shown them in time: then the last ones stay, and are said to be old. */
export function showRows(seen) {
  const parent = byId("rows");
  parent.classList.toggle("old", seen === null);
  byId("rows-old").hidden = seen !== null;
  if (seen === null) {
    parent.classList.toggle("none", !parent.children.length);
    say(byId("rows-count"), "the engine is busy");
    say(byId("rows-old"), `The engine has not shown its rows within 2 s.${parent.children.length ? " These are what it showed last." : ""}`);
    parent.setAttribute("aria-label", "The engine is busy: its rows are not known.");
    return;
  }
  const { count, versions, counts, requests, rows } = seen;
  const items = rows.map((row, place) => ({ row, place, versions, requests }));
  follow(parent, items, (item) => item.place, makeCell);
  if (told !== null) tellOf(Math.min(told, rows.length - 1));
  const words = versions.map(([name, number], at) => `${counts[at]} on ${address(name, number)}`);
  parent.setAttribute("aria-label", rows.length ? `${count} rows: ${words.join(", ")}.` : "No row is running.");
  parent.classList.toggle("none", !rows.length);
  say(byId("rows-count"), count ? String(count) : "none is running");
  byId("rows-more").hidden = count <= rows.length;
  say(byId("rows-more"), `and ${count - rows.length} more`);
  const legend = versions.map(([name, number], at) => ({ name, number, rows: counts[at] }));
  follow(byId("rows-legend"), legend, (item) => address(item.name, item.number), makeEntry);
}

/** Lets the arrow keys tell what each cell is. */
export function walkRows() {
  const parent = byId("rows");
  walk(parent, () => [...parent.children].map((_, place) => place), tellOf, () => tellOf(null));
}

function tellOf(place) {
  const cells = byId("rows").children;
  told = cells.length ? place : null;
  for (const cell of cells) cell.classList.toggle("current", cell === cells[told]);
  say(byId("rows-said"), cells[told]?.title ?? "");
}

function makeCell() {
  const cell = h("span", { class: "cell" }, h("span", { class: "filled" }));
  cell.drawn = {};
  cell.follow = ({ row, versions, requests }) => draw(cell, row, versions, requests);
  return cell;
}

function draw(cell, [version, tokens, most, preempted, request], versions, requests) {
  const [name, number] = versions[version];
  const wanted = { "--chroma": null, ...coloured(name, number), "--done": `${Math.round((100 * tokens) / Math.max(1, most))}%` };
  for (const [property, value] of Object.entries(wanted)) {
    if (cell.drawn[property] === value) continue;
    cell.drawn[property] = value;
    if (value === null) cell.style.removeProperty(property);
    else cell.style.setProperty(property, value);
  }
  cell.classList.toggle("aside", Boolean(preempted));
  cell.title = `${requests[request]}: ${tokens} of ${most} tokens, ${address(name, number)}${preempted ? ", preempted" : ""}`;
}

function makeEntry({ name, number }) {
  const text = h("span");
  const entry = h("li", {}, swatch(name, number), text);
  entry.follow = (item) => say(text, `${address(name, number)} · ${item.rows}`);
  return entry;
}

// The page: what each frame changes, and what a person does.

import { charts, Samples } from "./charts.js";
import { Compare } from "./compare.js";
import { Server } from "./connection.js";
import { byId, clock, device, h, say } from "./dom.js";
import { merged } from "./frames.js";
import { showReplicas } from "./replicas.js";
import { Rollouts } from "./rollouts.js";
import { showRows, walkRows } from "./rows.js";
import { Versions } from "./versions.js";

const THEMES = ["system", "light", "dark"];
const THEME = "rollout-server-theme";
const NOTICE_MS = 8000;

let hiding = 0;
let standing = "";

/** Says something for a while, over what is said for as long as it is so. */
function notice(text) {
  clearTimeout(hiding);
  const said = text || standing;
  byId("notice").hidden = !said;
  say(byId("notice-text"), said);
  if (text) hiding = setTimeout(() => notice(""), NOTICE_MS);
}

function stand(text) {
  standing = text;
  notice("");
}

const fail = (error) => notice(error.message);

// ---- dialogs -----------------------------------------------------------------------------------------------------------

/** Shows a dialog until `decide(answer)` is called or it is closed, which is null. */
function answered(dialog, begin) {
  return new Promise((done) => {
    let answer = null;
    const leaving = new AbortController();
    const decide = (given) => {
      answer = given;
      dialog.close();
    };
    begin(decide, leaving.signal);
    dialog.addEventListener("close", () => (leaving.abort(), done(answer)), { once: true });
    dialog.showModal();
  });
}

let asked = null;

/** Whoever needs a key while one is asked for waits for the same answer. */
function askForKey(why) {
  asked ??= answered(byId("key-dialog"), (decide, signal) => {
    say(byId("key-why"), why);
    byId("key-value").value = "";
    byId("key-form").addEventListener("submit", (event) => (event.preventDefault(), decide(byId("key-value").value.trim())), { signal });
    byId("key-cancel").addEventListener("click", () => decide(null), { signal });
  }).finally(() => (asked = null));
  return asked;
}

function sure(what) {
  return answered(byId("delete-dialog"), (decide, signal) => {
    say(byId("delete-what"), what);
    byId("delete-do").addEventListener("click", () => decide(true), { signal });
    byId("delete-cancel").addEventListener("click", () => decide(null), { signal });
  });
}

// ---- theme -------------------------------------------------------------------------------------------------------------

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  say(byId("theme"), { system: "◐ System", light: "☀ Light", dark: "☾ Dark" }[theme]);
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
}

useTheme(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "system");
byId("theme").addEventListener("click", () => useTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));

// ---- the server --------------------------------------------------------------------------------------------------------

const server = new Server(askForKey);
const samples = new Samples();
const pictures = charts(byId("tiles"));
const rollouts = new Rollouts(server, fail);
const compare = new Compare(server, fail);
const versions = new Versions(act);
walkRows();

async function act(what, name, number, version) {
  const path = `v1/weights/${encodeURIComponent(name)}`;
  try {
    if (what === "activate") await server.call("POST", server.of(`${path}/activate`), { version: number });
    if (what === "pin") await server.call("PATCH", server.of(`${path}/${number}`), { pinned: !version.pinned });
    if (what === "delete") {
      const rows = version.rows_in_use ? ` ${version.rows_in_use} rows that use it run on.` : "";
      if (!(await sure(`${name}@${number} can be pushed again, but gets another number then.${rows}`))) return;
      await server.call("DELETE", server.of(`${path}/${number}`));
    }
    notice("");
  } catch (error) {
    fail(error);
  }
}

let seen = null;

/** Draws what an event changes, and nothing else: whoever looks takes time of the machine that samples. */
function show(event) {
  // A connection that was lost, or a tab that was hidden, goes on with what a person chose.
  const other = event.history && ["model", "instance", "started"].some((key) => seen?.[key] !== event[key]);
  const frame = (seen = merged(seen, event));
  if (event.history) samples.begin(frame.fields, frame.history);
  if (other) {
    rollouts.begin();
    compare.begin(frame.model);
  }
  samples.add(frame.now);
  for (const picture of pictures) picture.follow(samples);
  say(byId("state"), frame.state);
  byId("state").className = `pill ${frame.state === "ready" ? "good" : "bad"}`;
  byId("state").title = frame.fault ?? "";
  byId("paused").hidden = !frame.paused;
  say(byId("paused"), `paused: ${frame.paused}`);
  offerModels(frame);
  say(byId("base"), frame.base ? `${frame.base.id} · ${frame.base.dtype} · ${device(frame.base.device)}` : "The model is loading.");
  say(byId("instance"), `instance ${frame.instance}`);
  byId("key").hidden = !frame.keys.inference;
  if (event.rows !== undefined) showRows(frame.rows);
  if (event.replicas) showReplicas(frame);
  versions.show(frame);
  rollouts.show(frame);
  if (event.policies || event.base !== undefined) compare.show(frame);
  if (!document.documentElement.dataset.frames) performance.mark("first-frame");
  document.documentElement.dataset.frames = String(Number(document.documentElement.dataset.frames ?? 0) + 1);
}

/** A server of one model offers no choice. */
function offerModels({ model, models }) {
  const select = byId("model");
  byId("models").hidden = models.length < 2;
  const offered = [...select.options].map((option) => option.value);
  if (offered.join(" ") !== models.join(" ")) select.replaceChildren(...models.map((name) => h("option", { value: name }, name)));
  if (select.value !== model) select.value = model;
}

byId("model").addEventListener("change", () => server.show(byId("model").value));
byId("key").addEventListener("click", () => server.askForKey("Another key for this page: an admin key also opens the buttons of versions."));
byId("give-key").addEventListener("click", () => server.askForKey("An inference key opens what this page shows, an admin key also the buttons of versions."));

const LOST = { locked: "locked", closed: "no connection", silent: "silent" };

server.follow(show, (state, why) => {
  byId("give-key").hidden = state !== "locked";
  if (state === "open") {
    if (standing) stand("");
    return;
  }
  say(byId("state"), LOST[state]);
  byId("state").className = "pill bad";
  const old = seen ? ` What is shown is of ${clock(seen.now[0])}.` : "";
  stand((state === "locked" ? `This page needs a key. ${why}` : why) + old);
});

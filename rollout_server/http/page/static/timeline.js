// When which version was live: a lane for each name, over as much time as its versions can be told apart in.

import { address, byId, coloured, follow, h, moment, say } from "./dom.js";
import { walk } from "./keys.js";

/** As many moves as the server keeps of all names. */
const MOST_MOVES = 512;
/** As many of them as have room beside each other. */
const SHOWN_MOVES = 64;
const LEAST_S = 60;

export class Timeline {
  moves = [];

  show(frame, versions) {
    // The first frame has all moves that are kept, each later one those since the frame before.
    this.moves = frame.history ? frame.moves : [...this.moves, ...frame.moves].slice(-MOST_MOVES);
    const end = frame.now[0];
    const cut = this.moves.length > SHOWN_MOVES;
    const start = Math.min(end - LEAST_S, cut ? this.moves.at(-SHOWN_MOVES).time : Math.min(frame.started, ...this.moves.map((move) => move.time)));
    const lanes = frame.policies.map((policy) => ({
      name: policy.name,
      spans: spansOf(policy, this.moves, end).filter((span) => span.to > start),
      pushes: versions.filter((version) => version.name === policy.name && version.created >= start),
      at: (time) => `${((100 * (Math.max(start, time ?? start) - start)) / (end - start)).toFixed(1)}%`,
    }));
    byId("timeline").hidden = byId("timeline-shows").hidden = !lanes.length;
    say(byId("timeline-shows"), cut ? `Which version was live: the last ${SHOWN_MOVES} changes, since ${moment(start)}` : "Which version was live, since the server started");
    follow(byId("timeline"), lanes, (lane) => lane.name, makeLane);
  }
}

/** What a name pointed to, from when to when: `from` is null for what was before the first move that is kept, and
 * `number` where that is not known. */
function spansOf(policy, every, end) {
  const moves = every.filter((move) => move.name === policy.name);
  const spans = moves.map((move, place) => ({ number: move.number, known: true, from: move.time, to: moves[place + 1]?.time ?? end, open: place === moves.length - 1 }));
  if (!moves.length) spans.push({ number: policy.live, known: true, from: null, to: end, open: true });
  else if (every.length >= MOST_MOVES) spans.unshift({ number: null, known: false, from: null, to: moves[0].time });
  return spans.filter((span) => span.number !== null || !span.known);
}

function words(name, { number, known, from, to, open }) {
  if (!known) return `what ${name} was until ${moment(to)} is not kept`;
  const since = from === null ? "since before the first change that is kept" : `from ${moment(from)}`;
  return `${address(name, number)} live ${since} ${open ? "until now" : `to ${moment(to)}`}`;
}

function makeLane({ name }) {
  const track = h("div", { class: "track", role: "group" });
  const lane = h("div", { class: "lane" }, h("span", { class: "lane-name" }, name), track);
  let drawn = "";
  let told = null;
  const tell = (key) => {
    told = key;
    for (const entry of track.children) entry.classList.toggle("current", entry.key === told);
    say(byId("timeline-said"), [...track.children].find((entry) => entry.key === told)?.title ?? "");
  };
  walk(track, () => [...track.children].map((entry) => entry.key), tell, () => tell(null), { last: true });
  lane.follow = ({ at, spans, pushes }) => {
    const places = JSON.stringify([spans.map((span) => [span.number, at(span.from), at(span.to)]), pushes.map((push) => [push.version, at(push.created)])]);
    if (places === drawn) return;
    drawn = places;
    const bars = spans.map((span) => {
      const colours = span.known ? coloured(name, span.number) : {};
      const bar = h("span", { class: span.known ? "live" : "live unknown", title: words(name, span), ...colours, "--from": at(span.from), "--to": at(span.to) }, span.known ? String(span.number) : "?");
      return Object.assign(bar, { key: `live ${span.from}`, time: span.from ?? -Infinity });
    });
    const marks = pushes.map((push) => {
      const mark = h("span", { class: "push", title: `${address(name, push.version)} pushed at ${moment(push.created)}`, ...coloured(name, push.version), "--from": at(push.created) });
      return Object.assign(mark, { key: `push ${push.version}`, time: push.created });
    });
    track.replaceChildren(...[...bars, ...marks].sort((one, other) => one.time - other.time));
    if (told !== null) tell(told);
    const said = spans.map((span) => (span.known ? `version ${span.number} ${span.from === null ? "since before the first change that is kept" : `from ${moment(span.from)}`}` : "at first it is not known"));
    track.setAttribute("aria-label", `${name}: ${said.join(", ") || "nothing was live"}.`);
  };
  return lane;
}

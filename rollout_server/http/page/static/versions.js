// Versions: what each is, what it has sampled, and what can be done with it.

import { address, byId, bytes, clock, coloured, count, device as deviceName, fixed, follow, h, milliseconds, say, swatch } from "./dom.js";
import { Timeline } from "./timeline.js";
import { bar } from "./tokens.js";

const PHASES = ["receive", "validate", "stage", "persist", "activate"];
const ENDS = ["stop", "length", "superseded", "aborted", "error"];

export class Versions {
  /** `act(what, name, number, kept)` does what a button says, and returns when it is done. */
  constructor(act) {
    this.act = act;
    this.timeline = new Timeline();
    this.entries = new WeakMap();
  }

  /** A version with its name. One that stays as it was stays the same object, and its card as it is. */
  named(version, name, changes) {
    const known = this.entries.get(version);
    if (known?.changes === changes) return known;
    const made = { ...version, name, changes };
    this.entries.set(version, made);
    return made;
  }

  show(frame) {
    const versions = frame.policies.flatMap((policy) => policy.versions.map((version) => this.named(version, policy.name, frame.keys.changes)));
    versions.sort((one, other) => other.created - one.created);
    if (this.base?.base !== frame.base) this.base = frame.base && { name: "base", version: 0, base: frame.base };
    const base = this.base;
    const unseen = frame.policies.reduce((sum, policy) => sum + policy.more, 0);
    say(byId("versions-count"), versions.length ? String(versions.length + unseen) : "only the base");
    const more = [unseen && `${unseen} older versions of these policies`, frame.more_policies && `${frame.more_policies} more policies`].filter(Boolean);
    byId("versions-more").hidden = !more.length;
    say(byId("versions-more"), `and ${more.join(", and ")}`);
    follow(byId("versions"), base ? [...versions, base] : versions, (version) => address(version.name, version.version) + version.digest, (version) => this.card(version));
    this.timeline.show(frame, versions);
  }

  card(version) {
    const { name, version: number } = version;
    const [badges, facts, bars, buttons] = [h("span", { class: "badges" }), h("dl", { class: "facts" }), h("div", { class: "bars" }), h("p", { class: "actions" })];
    const title = h("h3", {}, swatch(name, number), h("span", { class: "address" }, address(name, number)), badges);
    const card = h("li", { class: "card", "data-version": address(name, number), ...coloured(name, number) }, title, facts, bars, buttons);
    let drawn = null;
    card.follow = (now) => {
      if (now === drawn) return;
      drawn = now;
      badges.replaceChildren(...badgesOf(now));
      facts.replaceChildren(...factsOf(now).flatMap(([word, value, why]) => [h("dt", { title: why }, word), h("dd", {}, value)]));
      bars.replaceChildren(...barsOf(now));
      if (name !== "base") follow(buttons, buttonsOf(now), (button) => button.what, (button) => this.button(button, name, number));
    };
    return card;
  }

  button(first, name, number) {
    const element = h("button", { type: "button" }, first.word);
    let now = first;
    element.addEventListener("click", async () => {
      element.disabled = true;
      await this.act(now.what, name, number, now.version);
      element.disabled = now.disabled;
    });
    element.follow = (button) => {
      now = button;
      say(element, button.word);
      element.setAttribute("aria-label", `${button.word} ${address(name, number)}`);
      element.disabled = button.disabled;
    };
    return element;
  }
}

function badgesOf(version) {
  if (version.base) return [h("span", { class: "badge" }, "base")];
  const found = [version.live && h("span", { class: "badge on" }, "live"), version.pinned && h("span", { class: "badge" }, "pinned")];
  if (version.label) found.push(h("span", { class: "label" }, version.label));
  return found.filter(Boolean);
}

function factsOf(version) {
  const totals = version.totals ?? version.base?.totals;
  const means = [
    ["sampled", totals ? `${count(totals.tokens)} tokens, ${count(totals.rows)} rows` : "nothing yet", "Tokens that this version sampled, and rows that ended under it."],
    ["entropy", totals?.mean_entropy == null ? "–" : `${fixed(totals.mean_entropy)} nats`, "Mean over tokens of rows that asked for it."],
    ["−log p", totals?.mean_logprob == null ? "–" : `${fixed(-totals.mean_logprob)} nats`, "Mean surprise of sampled tokens."],
    ["length", totals?.mean_length == null ? "–" : `${fixed(totals.mean_length, 1)} tokens`, "Mean length of rows that ended under this version."],
    ["staleness", totals?.mean_staleness == null ? "–" : fixed(totals.mean_staleness, 2), "By how many versions the live one was ahead when a row ended, on average."],
    ["KL to base", totals?.kl_to_base == null ? "–" : `${fixed(totals.kl_to_base, 4)} nats`, "Mean of log π − log base over tokens of rows that asked for base_logprobs."],
  ];
  if (version.base) {
    const { id, digest, dtype, device } = version.base;
    return [["model", id], ["digest", digest.slice(0, 19)], ["runs as", `${dtype} on ${deviceName(device)}`], ...means];
  }
  return [
    ["digest", version.digest.slice(0, 19), version.digest],
    ["kind", `${version.kind}${version.rank ? `, rank ${version.rank}` : ""}, ${version.mode}`],
    ["size", `${bytes(version.bytes)} sent, ${bytes(version.resident_bytes)} on the device`],
    ["‖ΔW‖", version.delta_norm == null ? "–" : fixed(version.delta_norm, 4), "Frobenius norm of all that it changes of the base, as the reply to its push said."],
    ["pushed", clock(version.created)],
    ["in use", `${version.rows_in_use} rows`],
    ...means,
  ];
}

function barsOf(version) {
  const found = [];
  const timings = version.timings_ms;
  if (timings) {
    const total = PHASES.reduce((sum, phase) => sum + (timings[phase] ?? 0), 0);
    const parts = PHASES.map((phase) => ({ name: phase, value: timings[phase] ?? 0, class: `phase-${phase}` }));
    found.push(h("p", { class: "bar-name" }, "push ", h("span", {}, milliseconds(total))), bar("Push", parts, milliseconds));
  }
  const reasons = (version.totals ?? version.base?.totals)?.finish_reasons;
  if (reasons) {
    const parts = ENDS.map((end) => ({ name: end, value: reasons[end] ?? 0, class: `end-${end}` }));
    const words = parts.filter((part) => part.value).map((part) => `${part.value} ${part.name}`);
    found.push(h("p", { class: "bar-name" }, "ends ", h("span", {}, words.join(", "))), bar("Ends", parts, count));
  }
  return found;
}

function buttonsOf(version) {
  if (!version.changes) return [];
  return [
    { what: "activate", word: "Activate", disabled: version.live, version },
    { what: "pin", word: version.pinned ? "Unpin" : "Pin", disabled: false, version },
    { what: "delete", word: "Delete", disabled: version.live, version },
  ];
}

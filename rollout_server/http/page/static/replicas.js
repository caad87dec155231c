// Replicas of a fleet: where each is, what it is given, and how many versions it has.

import { byId, count, device, follow, h, say } from "./dom.js";

const SERVING = ["live", "draining"];

/** A server that computes in its own process has none, and shows no section for them. */
export function showReplicas(frame) {
  const replicas = frame.replicas ?? [];
  byId("replicas-section").hidden = !replicas.length;
  const live = replicas.filter((replica) => replica.state === "live").length;
  say(byId("replicas-count"), `${live} of ${replicas.length} live, at least ${frame.min_replicas} must be live`);
  follow(byId("replicas"), replicas, (replica) => replica.id, (replica) => card(replica, frame));
}

function card({ id }) {
  const [badge, facts] = [h("span", { class: "badge" }), h("dl", { class: "facts" })];
  const title = h("h3", {}, h("span", { class: "address" }, id), h("span", { class: "badges" }, badge));
  const element = h("li", { class: "card", "data-replica": id, "--hue": 0, "--chroma": 0 }, title, facts);
  element.follow = (replica) => {
    say(badge, replica.state);
    badge.className = `badge ${SERVING.includes(replica.state) ? "on" : "off"}`;
    facts.replaceChildren(...factsOf(replica).flatMap(([word, value, why]) => [h("dt", { title: why }, word), h("dd", {}, value)]));
  };
  return element;
}

function factsOf(replica) {
  return [
    ["runs on", replica.device ? device(replica.device) : "–"],
    ["rows", count(replica.rows), "Rows that it was given and has not reported."],
    ["versions", count(replica.versions_staged), "Versions that it has staged: it gets rows when it has all of them."],
    ["heard of", `${replica.last_seen_s.toFixed(1)} s ago`, "When its engine answered last."],
    ["restarts", count(replica.restarts)],
    ["process", replica.pid === null ? "elsewhere" : String(replica.pid)],
  ];
}

// The latest rollouts: a list with a strip of each one's surprise, and one of them token by token.

import { address, byId, clock, fixed, follow, h, milliseconds, say, swatch } from "./dom.js";
import { strip, tokenText } from "./tokens.js";

/** How long a rollout that nobody chose is shown before the newest takes its place: nobody reads one in a second. */
const FOLLOW_MS = 5000;

export class Rollouts {
  constructor(server, fail) {
    Object.assign(this, { server, fail, begun: 0, chosen: null, shown: null, follows: true, since: -Infinity, list: byId("rollouts") });
    this.list.addEventListener("keydown", (event) => this.key(event));
    byId("follow").addEventListener("click", () => this.goOn());
  }

  /** Another server's, or another model's, rollouts have numbers of their own. */
  begin() {
    Object.assign(this, { begun: this.begun + 1, chosen: null, shown: null, follows: true, since: -Infinity });
    this.list.replaceChildren();
    byId("rollout").replaceChildren(h("p", { class: "empty" }, "A rollout that ends is shown here, token by token."));
  }

  show(frame) {
    this.frame = frame;
    follow(this.list, frame.rollouts, (rollout) => rollout.number, (rollout) => this.entry(rollout));
    byId("picked").hidden = this.follows;
    // What a person has chosen stays, also when it has made room in the list: somebody may be reading it.
    const newest = frame.rollouts[0]?.number ?? null;
    if (this.follows && newest !== this.chosen && newest !== null && performance.now() - this.since >= FOLLOW_MS) this.choose(newest);
  }

  /** Follows the newest again. */
  goOn() {
    Object.assign(this, { follows: true, since: -Infinity });
    this.list.focus();
    this.show(this.frame);
  }

  entry(rollout) {
    const versions = [...new Map(rollout.spans.map(([name, number]) => [address(name, number), [name, number]])).values()];
    const when = h("span", { class: "when" });
    const entry = h(
      "li",
      { role: "option", id: `rollout-${rollout.number}`, "aria-selected": "false", onclick: () => this.pick(rollout.number) },
      h("span", { class: "who" }, ...versions.map((version) => h("span", { class: "version" }, swatch(...version), address(...version)))),
      strip(rollout.strip),
      h("span", { class: "what" }, `${rollout.tokens} tokens · ${rollout.finish_reason}${rollout.reward === null ? "" : ` · reward ${fixed(rollout.reward, 2)}`}`),
      when,
    );
    entry.follow = () => {
      const ago = Math.max(0, Math.round(this.frame.now[0] - rollout.ended));
      say(when, ago < 10 ? "just now" : ago < 60 ? `${Math.floor(ago / 10)}0 s ago` : clock(rollout.ended));
    };
    return entry;
  }

  key(event) {
    const numbers = this.frame?.rollouts.map((rollout) => rollout.number) ?? [];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step === undefined || !numbers.length) return;
    event.preventDefault();
    const at = numbers.indexOf(this.chosen) + step;
    this.pick(numbers[Math.max(0, Math.min(numbers.length - 1, at))]);
    byId(`rollout-${this.chosen}`)?.scrollIntoView({ block: "nearest" });
  }

  pick(number) {
    this.follows = false;
    byId("picked").hidden = false;
    this.choose(number);
  }

  async choose(number) {
    for (const entry of this.list.children) entry.setAttribute("aria-selected", String(entry.key === number));
    this.list.setAttribute("aria-activedescendant", `rollout-${number}`);
    this.chosen = number;
    this.since = performance.now();
    if (this.shown === number || this.asking) return;
    this.asking = true;
    const list = this.begun;
    try {
      const view = await this.server.call("GET", `page/rollouts/${number}?model=${encodeURIComponent(this.frame.model)}`);
      if (list === this.begun) {
        this.shown = number;
        byId("rollout").replaceChildren(...detail(view));
      }
    } catch (error) {
      // It may have made room for later ones while it was asked for.
      if (error.status !== 404) this.fail(error);
    } finally {
      this.asking = false;
    }
    // Another may have been chosen in the meantime, also of another model under the same number.
    if (this.chosen !== null && (this.chosen !== number || list !== this.begun)) await this.choose(this.chosen);
  }
}

function detail(view) {
  const version = (at) => view.spans.find(([, , start, end]) => start <= at && at < end)?.slice(0, 2) ?? null;
  const tokens = view.texts.map((text, at) => ({ text, logprob: view.logprobs[at], values: values(view, at), version: version(at), given: at < view.given }));
  const { queued, prefill, decode } = view.timings_ms;
  const { temperature, top_p, top_k } = view.sampling;
  const facts = [
    `${view.texts.length - view.given} tokens, ${view.finish_reason}${view.stop_reason === null ? "" : ` (${JSON.stringify(view.stop_reason)})`}`,
    `queued ${milliseconds(queued)}, prefill ${milliseconds(prefill)}, decode ${milliseconds(decode)}`,
    `temperature ${temperature}${top_p < 1 ? `, top_p ${top_p}` : ""}${top_k > 0 ? `, top_k ${top_k}` : ""}, seed ${view.seed}`,
  ];
  const title = h("h3", {}, h("span", { class: "request" }, view.request_id), h("span", { class: "count" }, `prompt ${view.sample[0]}, sample ${view.sample[1]}`));
  const prompt = h("details", { class: "prompt" }, h("summary", {}, `Prompt · ${view.prompt_tokens} tokens`), h("pre", {}, view.prompt));
  prompt.open = view.prompt.length < 600;
  return [title, prompt, tokenText(tokens, "The tokens of this rollout"), h("p", { class: "timings" }, facts.join(" · "))];
}

function values(view, at) {
  const base = view.base_logprobs?.[at] ?? null;
  const own = view.logprobs[at];
  return {
    id: String(view.token_ids[at]),
    "sampling logprob": view.sampling_logprobs[at] === null ? null : fixed(view.sampling_logprobs[at]),
    entropy: view.entropy?.[at] == null ? null : fixed(view.entropy[at]),
    "base logprob": base === null ? null : fixed(base),
    "log ratio": base === null || own === null ? null : fixed(own - base),
  };
}

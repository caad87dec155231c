// The prompt box: the same prompt to two versions, n samples of each, side by side.

import { address, byId, count, h, say, swatch } from "./dom.js";
import { tokenText } from "./tokens.js";

const PARTIAL = /^bytes:((?:\\x[0-9a-f]{2})+)$/;

export class Compare {
  constructor(server, fail) {
    Object.assign(this, { server, fail });
    byId("compare").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    byId("stop").addEventListener("click", () => this.asking?.abort());
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("compare").requestSubmit();
    });
  }

  /** Another model has versions of its own, whatever was chosen among those of the one before. */
  begin(model) {
    if (model === this.model) return;
    this.model = model;
    for (const side of ["left", "right"]) {
      byId(side).replaceChildren();
      byId(side).touched = false;
      byId(`${side}-answers`).replaceChildren();
    }
  }

  /** Offers every version that is shown; the choice of a person stays. At first: the base, and the newest live one. A
   * model that samples nothing is not asked. */
  show(frame) {
    byId("compare-section").hidden = frame.base !== null && frame.base.task !== "generate";
    const names = frame.policies.flatMap((policy) => policy.versions.filter((version) => !version.task).map((version) => [policy.name, version.version]));
    const options = ["base", ...names.map((name) => address(...name))];
    const live = frame.policies.flatMap((policy) => policy.versions.filter((version) => version.live && !version.task).map((version) => ({ ...version, name: policy.name })));
    const newest = live.reduce((best, version) => (best === null || version.created >= best.created ? version : best), null);
    this.offer(byId("left"), options, "base");
    this.offer(byId("right"), options, newest ? address(newest.name, newest.version) : "base");
    byId("chat-field").hidden = !frame.base?.chat;
  }

  offer(select, options, first) {
    const shown = [...select.options].map((option) => option.value);
    if (shown.join(" ") === options.join(" ")) return;
    const chosen = select.touched && options.includes(select.value) ? select.value : first;
    select.replaceChildren(...options.map((option) => h("option", { value: option }, option)));
    select.value = chosen;
    select.onchange = () => (select.touched = true);
  }

  async ask() {
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    byId("stop").hidden = false;
    say(byId("asked"), "Sampling …");
    const began = performance.now();
    const sides = ["left", "right"].map((side) => this.side(side, asking.signal));
    const tokens = (await Promise.all(sides)).reduce((sum, found) => sum + found, 0);
    if (this.asking !== asking) return;
    byId("stop").hidden = true;
    say(byId("asked"), `${count(tokens)} tokens in ${((performance.now() - began) / 1000).toFixed(2)} s`);
  }

  async side(side, signal) {
    const version = byId(side).value;
    const model = called(this.model, version);
    const parent = byId(`${side}-answers`);
    parent.replaceChildren(h("p", { class: "empty" }, `${model} is sampling …`));
    const chat = byId("chat").checked && !byId("chat-field").hidden;
    const prompt = byId("prompt").value;
    const sampling = { model, n: Number(byId("n").value), max_tokens: Number(byId("max-tokens").value), temperature: Number(byId("temperature").value) };
    try {
      const reply = chat
        ? await this.server.call("POST", "v1/chat/completions", { ...sampling, messages: [{ role: "user", content: prompt }], logprobs: true }, signal)
        : await this.server.call("POST", "v1/completions", { ...sampling, prompt, logprobs: 0 }, signal);
      const found = reply.choices.map((choice) => ({ choice, tokens: chat ? chatTokens(choice) : textTokens(choice) }));
      parent.replaceChildren(heading(version, model), ...found.map(answer));
      return reply.usage.completion_tokens;
    } catch (error) {
      parent.replaceChildren();
      if (error.name !== "AbortError") this.fail(error);
      return 0;
    }
  }
}

/** What a request calls a version of a model: those of a model beside that of --model stand behind its name. */
function called(model, version) {
  if (model === "base") return version;
  return version === "base" ? model : `${model}/${version}`;
}

function heading(version, model) {
  const [name, number] = version.split("@");
  return h("h3", {}, swatch(name, Number(number ?? 0)), model);
}

function answer({ choice, tokens }, at) {
  return h("article", { class: "answer" }, h("p", { class: "count" }, `${at + 1} · ${tokens.length} tokens · ${choice.finish_reason}`), tokenText(tokens, `Sample ${at + 1}`));
}

function textTokens(choice) {
  const { tokens, token_logprobs } = choice.logprobs;
  const texts = pieces(tokens);
  return texts.map((text, at) => ({ text, logprob: token_logprobs[at], values: {}, version: null, given: false }));
}

function chatTokens(choice) {
  const content = choice.logprobs?.content ?? [];
  const texts = pieces(content.map((token) => token.token));
  return texts.map((text, at) => ({ text, logprob: content[at].logprob, values: {}, version: null, given: false }));
}

/** Tokens that are parts of a character are written as bytes; the last of them shows it. */
function pieces(tokens) {
  const decoder = new TextDecoder();
  return tokens.map((token) => {
    const partial = PARTIAL.exec(token);
    if (!partial) return decoder.decode() + token;
    const raw = partial[1].split("\\x").slice(1);
    return decoder.decode(Uint8Array.from(raw, (byte) => Number.parseInt(byte, 16)), { stream: true });
  });
}

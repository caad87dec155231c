// The three charts of what happens over time, from the samples that the server keeps one of a second.

import { bytes, clock, count, h, say, svg } from "./dom.js";
import { walk } from "./keys.js";

const WIDTH = 600;
const HEIGHT = 120;
const MOST = 600;
const LEAST = 120;

/** Samples as they come, without their repeats. */
export class Samples {
  constructor() {
    this.rows = [];
    this.fields = [];
  }

  begin(fields, history) {
    this.fields = fields;
    this.rows = [...history];
  }

  add(row) {
    if (this.rows.length && row[0] <= this.rows.at(-1)[0]) return;
    this.rows.push(row);
    if (this.rows.length > MOST) this.rows.shift();
  }

  /** Places on the axis of time: a young server's line begins in the middle of one. */
  get places() {
    return Math.max(LEAST, this.rows.length);
  }

  get times() {
    return this.rows.map((row) => row[0]);
  }

  of(field) {
    const at = this.fields.indexOf(field);
    return this.rows.map((row) => row[at]);
  }

  /** Increase a second of a count, smoothed over the last few samples; a restart begins at zero. */
  rate(field, over = 3) {
    const [times, values] = [this.times, this.of(field)];
    return values.map((value, at) => {
      const before = Math.max(0, at - over);
      const seconds = times[at] - times[before];
      return seconds > 0 ? Math.max(0, (value - values[before]) / seconds) : 0;
    });
  }
}

class Chart {
  /** `series`: [{name, of(samples)}]; the first is filled. `unit(samples)` is what the number counts. */
  constructor(title, unit, format, series) {
    Object.assign(this, { title, unit, format, series });
    this.counts = h("span", { class: "unit" });
    this.value = h("strong", { class: "value" }, "–");
    this.paths = series.map((one, at) => svg("path", { class: `line line-${at}` }));
    this.area = svg("path", { class: "area" });
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, x1: -1, x2: -1 });
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, this.area, ...this.paths, this.cursor);
    this.most = h("span", { class: "most" });
    this.said = h("p", { class: "said", "aria-live": "off" });
    this.plot = h("div", { class: "plot", role: "group", "aria-label": `${title} over time: the arrow keys tell the values` }, this.most, this.picture);
    const keys = series.length > 1 ? series.map((one, at) => h("span", { class: `key key-${at}` }, one.name)) : [];
    this.element = h(
      "figure",
      { class: "tile" },
      h("figcaption", {}, h("span", { class: "title" }, title), ...keys),
      h("p", { class: "number" }, this.value, " ", this.counts),
      this.plot,
      this.said,
    );
    this.picture.addEventListener("pointermove", (event) => this.point(event));
    this.picture.addEventListener("pointerleave", () => this.leave());
    const tell = (time) => {
      this.said.setAttribute("aria-live", "polite");
      this.tell(time);
    };
    walk(this.plot, () => this.times ?? [], tell, () => this.leave(), { last: true });
  }

  follow(samples) {
    this.times = samples.times;
    this.values = this.series.map((one) => one.of(samples));
    const peak = Math.max(0, ...this.values.flat());
    const top = peak * 1.1 || 1;
    this.places = samples.places;
    this.values.forEach((values, at) => this.paths[at].setAttribute("d", this.line(values, top)));
    const first = this.values[0];
    this.area.setAttribute("d", first.length > 1 ? `${this.line(first, top)}L${WIDTH},${HEIGHT}L${this.place(0)},${HEIGHT}Z` : "");
    say(this.counts, this.unit(samples));
    const now = first.at(-1) ?? 0;
    say(this.value, this.format(now));
    say(this.most, this.format(top));
    this.picture.setAttribute("aria-label", `${this.title}: ${this.format(now)} now, ${this.format(peak)} at most.`);
    if (this.times.includes(this.told)) this.tell(this.told);
    else this.leave();
  }

  point(event) {
    const box = this.picture.getBoundingClientRect();
    const count = this.times?.length ?? 0;
    if (!count) return;
    const share = (event.clientX - box.left) / box.width;
    const at = Math.max(0, Math.min(count - 1, Math.round(share * (this.places - 1)) - (this.places - count)));
    this.tell(this.times[at]);
  }

  /** Tells the values of one moment, until another is pointed at or none. */
  tell(time) {
    this.told = time;
    const at = this.times.indexOf(time);
    const x = this.place(at);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    const parts = this.series.map((one, index) => `${one.name} ${this.format(this.values[index][at])}`);
    say(this.said, `${clock(time)} · ${parts.join(" · ")}`);
  }

  /** The newest sample is at the right edge. */
  place(at) {
    return (((this.places - this.times.length + at) / (this.places - 1)) * WIDTH).toFixed(1);
  }

  line(values, top) {
    return values.map((value, at) => `${at ? "L" : "M"}${this.place(at)},${(HEIGHT - 2 - (value / top) * (HEIGHT - 6)).toFixed(1)}`).join("");
  }

  leave() {
    this.told = null;
    this.said.setAttribute("aria-live", "off");
    this.cursor.setAttribute("x1", -1);
    this.cursor.setAttribute("x2", -1);
    const parts = this.series.map((one, at) => `${one.name} ${this.format(this.values?.[at].at(-1) ?? 0)}`);
    say(this.said, parts.join(" · "));
  }
}

export function charts(parent) {
  const found = [
    new Chart("Throughput", () => "tokens/s", count, [{ name: "sampled", of: (samples) => samples.rate("tokens") }]),
    new Chart("Rows", () => "running", count, [
      { name: "running", of: (samples) => samples.of("running") },
      { name: "requests waiting", of: (samples) => samples.of("waiting") },
      { name: "preempted", of: (samples) => samples.of("preempted") },
    ]),
    new Chart("KV memory", (samples) => `filled by rows, of ${bytes(samples.of("kv_limit").at(-1) ?? 0)}`, bytes, [
      { name: "rows", of: (samples) => samples.of("kv_filled") },
      { name: "prefix cache", of: (samples) => samples.of("kv_kept") },
    ]),
  ];
  parent.append(...found.map((chart) => chart.element));
  return found;
}

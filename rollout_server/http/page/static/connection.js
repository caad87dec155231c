// The server: a stream of frames, and calls that may need a key. Keys live in this tab, and are sent to this server only.

export class Refused extends Error {
  constructor(status, problem) {
    super(problem?.message ?? `The server answered ${status}.`);
    this.status = status;
  }
}

class Silent extends Error {}

const KEY = "rollout-server-key";
const MODEL = "rollout-server-model";
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;
/** A frame is due each second, and up to two later where the engine is slow to show its rows. */
const SILENT_MS = 5000;

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export class Server {
  /** `ask(why)` lets a person give a key; null where none is given. */
  constructor(ask) {
    this.ask = ask;
    this.key = sessionStorage.getItem(KEY);
    this.model = sessionStorage.getItem(MODEL);
  }

  /** The path as the model that is shown answers it; without a choice, that of --model does. */
  of(path) {
    return this.model === null ? path : `${path}?model=${encodeURIComponent(this.model)}`;
  }

  /** Shows another model from now on; null is that of --model. */
  show(model) {
    this.model = model;
    if (model === null) sessionStorage.removeItem(MODEL);
    else sessionStorage.setItem(MODEL, model);
    this.leaving?.abort();
  }

  async askForKey(why) {
    const key = await this.ask(why);
    if (key === null) return false;
    this.key = key;
    sessionStorage.setItem(KEY, key);
    this.given?.();
    return true;
  }

  get headers() {
    return this.key ? { authorization: `Bearer ${this.key}` } : {};
  }

  /** The reply's JSON. Asks for a key where one is wanted, or another; throws `Refused`. */
  async call(method, path, body, signal) {
    for (;;) {
      const headers = { ...this.headers, ...(body === undefined ? {} : { "content-type": "application/json" }) };
      const reply = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
      const said = await reply.json().catch(() => null);
      if (reply.ok) return said;
      const refused = new Refused(reply.status, said?.error);
      const wantsKey = reply.status === 401 || (reply.status === 403 && this.key !== null);
      if (!wantsKey || !(await this.askForKey(refused.message))) throw refused;
    }
  }

  /** Tells `told(frame)` of every frame and `now(state, why)` of the connection, for as long as the page is seen. */
  async follow(told, now) {
    let wait = FIRST_WAIT_MS;
    for (;;) {
      while (document.hidden) await new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true }));
      const leaving = (this.leaving = new AbortController());
      const hide = () => document.hidden && leaving.abort();
      document.addEventListener("visibilitychange", hide);
      try {
        await this.read(leaving, (frame) => {
          wait = FIRST_WAIT_MS;
          now("open");
          told(frame);
        });
        now("closed", "The server has ended the connection.");
      } catch (error) {
        if (error instanceof Refused && error.status === 404 && this.model !== null) {
          // This tab showed a model of another server here.
          this.show(null);
          continue;
        }
        if (error instanceof Refused && error.status === 401) {
          now("locked", error.message);
          const given = new Promise((done) => (this.given = done));
          // Whoever gives none now is not asked again, and may give one later.
          if (!(await this.askForKey(error.message))) await given;
          continue;
        } else if (leaving.signal.reason instanceof Silent) {
          now("silent", `The server has said nothing for ${SILENT_MS / 1000} s. Connecting again.`);
        } else if (!leaving.signal.aborted) {
          now("closed", error instanceof Refused ? error.message : "The server does not answer.");
        }
      } finally {
        document.removeEventListener("visibilitychange", hide);
      }
      if (!document.hidden && (!leaving.signal.aborted || leaving.signal.reason instanceof Silent)) {
        await pause(wait);
        wait = Math.min(2 * wait, LONGEST_WAIT_MS);
      }
    }
  }

  /** Reads the stream to its end, and leaves one in which nothing comes for a while. */
  async read(leaving, told) {
    const watch = () => setTimeout(() => leaving.abort(new Silent()), SILENT_MS);
    let watching = watch();
    try {
      // EventSource sends no keys, so events are read from the reply's body.
      const reply = await fetch(this.of("page/events"), { headers: this.headers, signal: leaving.signal });
      if (!reply.ok) throw new Refused(reply.status, (await reply.json().catch(() => null))?.error);
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let left = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(watching);
        watching = watch();
        const events = (left + value).split("\n\n");
        left = events.pop();
        for (const event of events) if (event.startsWith("data: ")) told(JSON.parse(event.slice(6)));
      }
    } finally {
      clearTimeout(watching);
    }
  }
}

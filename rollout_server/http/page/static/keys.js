// What can be pointed at, by the keyboard: the arrow keys go through what one element shows, which the tab key reaches.

const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

/** Calls `show(key)` with the one of `keys()` that is reached, beginning with the first or, where it is `last`, the last;
 * and `leave()` when the focus goes elsewhere. What is shown may change meanwhile. */
export function walk(element, keys, show, leave, { last = false } = {}) {
  let current = null;
  element.tabIndex = 0;
  element.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    const known = keys();
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey || !known.length) return;
    event.preventDefault();
    const at = known.indexOf(current);
    const next = at >= 0 || !Number.isFinite(step) ? at + step : last ? known.length - 1 : 0;
    current = known[Math.max(0, Math.min(known.length - 1, next))];
    show(current);
  });
  element.addEventListener("blur", () => {
    current = null;
    leave();
  });
}

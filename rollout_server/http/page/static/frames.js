// A whole frame, from the first and from what was new in each later one: what is not told is as it was.

/** The frame after `event`, which is the first where it has a history. What stays as it was stays the same object. */
export function merged(before, event) {
  if (event.history) return event;
  const frame = { ...before, history: null, ...event };
  if (event.rollouts) frame.rollouts = filled(event.rollouts, before.rollouts, "number");
  if (event.policies) {
    const known = new Map(before.policies.map((policy) => [policy.name, policy]));
    frame.policies = event.policies.map((policy) => {
      if (typeof policy === "string") return known.get(policy);
      return { ...policy, versions: filled(policy.versions, known.get(policy.name)?.versions ?? [], "version") };
    });
  }
  return frame;
}

/** Items that are told as their keys are those of before. */
function filled(told, before, key) {
  const known = new Map(before.map((item) => [item[key], item]));
  return told.map((item) => (typeof item === "number" ? known.get(item) : item));
}

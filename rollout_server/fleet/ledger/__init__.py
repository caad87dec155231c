"""The rules of a fleet, without input or output: events in, actions out."""

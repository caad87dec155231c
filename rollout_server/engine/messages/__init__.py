"""What crosses the border of the engine thread: frozen commands in, plain events out; no arrays, locks or futures."""

"""A loop whose sampling overlaps with its training, timed beside loops that do one after the other."""

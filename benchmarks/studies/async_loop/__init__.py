"""Whether a loop whose sampling overlaps with its training is there sooner than one after the other."""

"""How much sooner a loop is there whose sampling overlaps with its training."""

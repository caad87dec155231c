"""A trainer's step from its push to its arrays, and whoever can do it."""

"""The vision half of a checkpoint, read beside its decoder."""

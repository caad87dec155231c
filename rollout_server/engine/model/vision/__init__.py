"""The vision half of a checkpoint, read beside its decoder, which is given what it makes."""

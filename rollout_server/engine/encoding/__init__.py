"""The engine of an encoder: sequences read whole, those of similar length together, within a turn's budget."""

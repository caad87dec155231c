"""From logits to tokens, for the whole batch in one call."""

"""Pictures on the host: decoded within limits, made pixels of as the model's own processor makes them, and their placeholders in text."""

"""Pictures on the host: decoded within limits, as pixels that the model's processor makes, and as placeholders."""

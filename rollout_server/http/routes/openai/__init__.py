"""OpenAI's routes, in its shapes."""

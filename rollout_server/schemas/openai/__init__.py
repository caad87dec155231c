"""The bodies of OpenAI's routes."""

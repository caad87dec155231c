"""The bodies of vLLM's routes."""

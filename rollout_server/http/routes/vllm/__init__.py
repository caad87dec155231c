"""Routes that vLLM has, as it has them."""

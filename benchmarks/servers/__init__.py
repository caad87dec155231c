"""Servers that are compared, as processes, and the load on them."""

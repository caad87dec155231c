"""The bodies of routes that score, rank and pool."""

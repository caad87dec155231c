"""Replicas as actors of a Ray cluster that runs already: placed, restarted and watched by Ray."""

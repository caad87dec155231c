"""Who waits, and what the owner of a request is told."""

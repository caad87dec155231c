"""What several ranks make of one model: layers cut into parts, ids that all agree on, and a digest of each turn."""

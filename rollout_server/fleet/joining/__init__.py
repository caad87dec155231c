"""Replicas of other machines: how each side proves that it has the fleet's key, and who is let in."""

"""Versions on paper and on disk: what names point at, what is kept, and what survives a crash."""

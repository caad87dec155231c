"""Sections that drive the engine in their own process."""

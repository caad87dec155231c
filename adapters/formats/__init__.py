"""Adapter files as trainers write them: read, checked against the base, and written again."""

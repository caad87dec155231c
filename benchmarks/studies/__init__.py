"""Figures of docs/figures.md that are no section."""

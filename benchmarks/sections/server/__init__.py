"""Sections that ask servers over HTTP, and what replies weigh."""

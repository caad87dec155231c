"""Connections: accepting them, and how each is spoken to below HTTP."""

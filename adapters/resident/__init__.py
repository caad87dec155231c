"""Versions on the device: stacked adapters, their gains, and whole parameter sets."""

"""A model directory before it is a module: its files, and what config.json means."""

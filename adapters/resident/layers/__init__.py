"""Layers that add what the version of each row changes, in the places of the model's own."""

"""Encoders, which read a sequence in both directions, and their heads; parameters have the names of transformers."""

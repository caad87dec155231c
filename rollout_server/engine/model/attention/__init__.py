"""Attention of decode steps in which every row reads its own columns, and where it is used."""

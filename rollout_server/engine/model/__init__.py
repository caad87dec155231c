"""The base in memory and what it can do."""

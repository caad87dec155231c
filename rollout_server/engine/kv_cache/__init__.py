"""Keys and values: where they are, what is kept of them, and what fits."""

"""What a server remembers of its latest work, within bounds, for the page and the metrics."""

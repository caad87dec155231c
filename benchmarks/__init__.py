"""Speed, measured side by side in one process. Not shipped; run with `make bench`."""

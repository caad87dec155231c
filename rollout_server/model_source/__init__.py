"""Where a model comes from: a directory, the Hub, or the package itself."""

"""Where a loaded module is not what config.json says, and what makes it so."""

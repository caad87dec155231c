"""How versions change and survive a restart; no HTTP."""

"""The routes: each reads a request, asks the engine, and writes a reply."""

"""The HTTP face: Litestar controllers over the four verbs of `EngineHandle`."""

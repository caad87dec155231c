"""What a request asks for: read, checked, and put in the engine's words."""
